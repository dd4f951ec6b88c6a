"""The table of Ascend chips: every fact has a source, documentation says the same, and a plan is refused by it."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest

from rainfusion.backends.torch_npu.chips import CHIPS, SOURCES, Chip, chip_of

PAGE = Path(__file__).parents[2] / "docs" / "ascend.md"
SOFTMAX = {0: "float32", 4: "16 bits, rescaled in float32"}


def rows() -> list[str]:
    """The rows of the table by chip in docs/ascend.md."""

    def row(head: str, attribute: str, *cells: str) -> str:
        return f"| {' | '.join([head, *cells, SOURCES[attribute]])} |"

    def each(head: str, attribute: str, say) -> str:
        return row(head, attribute, *(say(getattr(chip, attribute)) for chip in CHIPS))

    def joined(values: tuple[object, ...]) -> str:
        return ", ".join(map(str, values)) or "none"

    def yes(value: bool) -> str:
        return "yes" if value else "no"

    def numbers(socs: range) -> str:
        return f"{socs.start} to {socs.stop - 1}" if len(socs) > 1 else str(socs.start)

    return [
        each("SoC numbers of torch_npu", "socs", numbers),
        each("dtypes", "dtypes", joined),
        each("softmax (`inner_precise`)", "inner_precise", lambda n: f"{SOFTMAX[n]} ({n})"),
        each("key blocks: multiples of", "key_block", str),
        each("head dims, others padded", "head_dims", joined),
        each("layouts", "layouts", joined),
        each("log-sum-exp", "has_lse", yes),
        each("lists of blocks (operator 3)", "has_index_lists", yes),
        each("dtypes in graphs", "graph_dtypes", joined),
        each("quantised, not lowered to yet", "precisions", joined),
    ]


def test_every_fact_has_a_source() -> None:
    assert {field.name for field in fields(Chip)} == {"name", *SOURCES}


def test_documentation_has_the_table() -> None:
    head = f"| | {' | '.join(chip.name for chip in CHIPS)} | where it is written |"
    table = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    start = table.index(head)
    assert table[start + 2 : start + 2 + len(rows())] == rows()


def test_numbers_of_chips_do_not_overlap() -> None:
    numbers = [soc for chip in CHIPS for soc in chip.socs]
    assert len(numbers) == len({*numbers})
    assert [chip_of(soc) for soc in (220, 255, 260, 261)] == [*CHIPS, None]


@pytest.mark.parametrize("chip", CHIPS, ids=lambda chip: chip.name)
def test_a_softmax_in_sixteen_bits_is_not_asked_for_where_there_is_another(chip: Chip) -> None:
    assert (chip.inner_precise == 0) == chip.has_index_lists
    assert {*chip.graph_dtypes} <= {*chip.dtypes}
