"""Agreement: before ranks exchange tensors they compare what they were asked, so that one that differs is named.

A rank that fails takes part and says why, so that all of them raise, and none waits for it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

from rainfusion.core.errors import readable, said
from rainfusion.distributed.ranks import DistributedError, Ranks

__all__ = ["DistributedError", "agree", "raise_together"]

Lengths = tuple[tuple[int, int], ...]


def agree(
    ranks: Ranks,
    record: Mapping[str, str],
    lengths: tuple[int, int],
    known: Lengths | None = None,
    error: Exception | None = None,
) -> tuple[Lengths, bool]:
    """Compare a call with those of the other ranks.

    Args:
        record: what has to be the same on all ranks, by name.
        lengths: query and key tokens of this rank, which may differ.
        known: the lengths of all ranks for which this rank has prepared such a call; None if it has not.
        error: why this rank cannot take part.

    Returns:
        The lengths of all ranks, and whether every rank has prepared such a call for them.

    Raises:
        DistributedError: what differs, and on which ranks; or which other rank failed, and why.
        Exception: `error` itself, on the rank that gave it.
    """
    told = ranks.gather_objects((dict(record), lengths, None if error is None else said(error), known))
    _raise_first([failure for _, _, failure, _ in told], error)
    records = [theirs for theirs, *_ in told]
    if any(theirs != records[0] for theirs in records):
        raise DistributedError(f"the ranks disagree: {'; '.join(_differences(records))}. Give all ranks the same")
    found = tuple(theirs for _, theirs, _, _ in told)
    return found, all(theirs == found for *_, theirs in told)


def raise_together(ranks: Ranks, error: Exception | None) -> None:
    """Raise on every rank if one of them has failed.

    Raises:
        DistributedError: which other rank failed, and why.
        Exception: `error` itself, on the rank that gave it.
    """
    _raise_first(ranks.gather_objects(None if error is None else said(error)), error)


def _raise_first(failures: list[str | None], error: Exception | None) -> None:
    if error is not None:
        raise error
    for rank, failure in enumerate(failures):
        if failure is not None:
            raise DistributedError(f"rank {rank} cannot take part in this call: {failure}")


def _differences(records: list[dict[str, str]]) -> list[str]:
    """For every name of which the ranks say different things, who says what."""
    found = []
    for name in dict.fromkeys(name for record in records for name in record):
        ranks_of: defaultdict[str, list[int]] = defaultdict(list)
        for rank, record in enumerate(records):
            ranks_of[record.get(name, "not known")].append(rank)
        if len(ranks_of) > 1:
            said_by = [f"{readable(value, 120)} on {_ranks(who)}" for value, who in ranks_of.items()]
            found.append(f"{name} is {' and '.join(said_by)}")
    return found


def _ranks(ranks: list[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
