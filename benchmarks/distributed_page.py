"""Writes the tables of docs/several_devices.md from the records of `distributed.py`.

    python benchmarks/distributed_page.py

Records are hw_matrix/results/distributed/*.json.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parent))

from generated import filled

ROOT = Path(__file__).parents[1]
RECORDS, PAGE = ROOT / "hw_matrix/results/distributed", ROOT / "docs/several_devices.md"
MACHINE = 8  # devices
BETWEEN_MACHINES = 50e9  # bytes a second of each device

Record = dict[str, Any]


def main() -> None:
    records = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(RECORDS.glob("*.json"))]
    if not records:
        raise SystemExit(f"there is no record in {RECORDS}; make one with benchmarks/distributed.py --json")
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8"), tables(records)), encoding="utf-8")


def tables(records: Sequence[Record]) -> dict[str, str]:
    """Every table of the page, as Markdown, by name."""
    records = sorted(records, key=lambda record: record["world"])
    return {"measured": _measured(records), "computed": _computed(records[-1])}


# -- measured --------------------------------------------------------------------------------------------


def _measured(records: Sequence[Record]) -> str:
    lines = [
        f"Milliseconds of an attention call on {records[0]['device']}, {_versions(records[0])} "
        "(`benchmarks/distributed.py`). *Over one* is the speed-up over one device that does the same,",
        "*over dense* that over dense Ulysses on as many. *Sent* is what a rank sends, *transfers* how long that takes",
        "alone, *hidden* the share of it in which a rank computes.",
        "",
        "| attention | skipped | devices | method | ms | over one | over dense | sent, MB | transfers, ms | hidden |",
        "|" + "---|" * 10,
    ]
    for world, row in [(record["world"], row) for record in records for row in record["rows"] if "methods" in row]:
        head = f"| {row['size']}, {row['heads']} heads, {row['tokens']} tokens | {row['sparsity']:.0%} "
        for name, ms in row["one_device"].items():
            lines.append(f"{head}| 1 | {name.removeprefix('one device, ')} | {ms:.1f} | | | | | |")
        for name, it in row["methods"].items():
            lines.append(
                f"{head}| {world} | {name} | {it['ms']:.1f} | {it['over_one_device']:.2f} "
                f"| {it['over_dense_ulysses']:.2f} | {it['bytes_sent'] / 1e6:.0f} | {it['transfers_ms']:.2f} "
                f"| {it['hidden']:.0%} |"
            )
    return "\n".join([*lines, *_objections(records)])


def _versions(record: Record) -> str:
    return f"torch {record['environment']['torch']}"


def _objections(records: Sequence[Record]) -> Iterator[str]:
    """What a record says of itself that a reader has to know."""
    for record in records:
        for row in record["rows"]:
            name = f"{record['world']} devices, {row['size']}, {row['sparsity']:.0%}"
            if "not_measured" in row:
                yield f"\nNot measured: {name} ({row['not_measured']})."
            for method, how in row.get("differs", {}).items():
                yield f"\nNot equal to one device: {name}, {method}: {how}."


# -- computed --------------------------------------------------------------------------------------------


class Estimate(NamedTuple):
    """What a call should take, in milliseconds."""

    devices: int
    method: str
    attention: float
    exchanged: float  # by Ulysses
    passed: float  # around a ring

    @property
    def ms(self) -> float:
        return self.exchanged + max(self.attention, self.passed)


def _computed(record: Record) -> str:
    lines = [
        f"More devices, computed from the measurement on {record['world']}, in milliseconds: attention takes as much",
        "longer than its share of the work, and transfers run at the same rate. What Ulysses exchanges is waited for;",
        "what a ring passes around is hidden while attention is computed. Between machines of "
        f"{MACHINE}, where nothing was\nmeasured, every device has a link of {BETWEEN_MACHINES / 1e9 * 8:.0f} Gbit/s.",
        "",
        "| attention | devices | method | attention | exchanged | passed around | call | over one device |",
        "|" + "---|" * 8,
    ]
    for row in record["rows"]:
        if "methods" not in row:
            continue
        alone = row["one_device"]["one device, sparse"]
        for it in estimates(row, record["world"]):
            lines.append(
                f"| {row['size']}, {row['sparsity']:.0%} skipped | {it.devices} | {it.method} | {it.attention:.2f} "
                f"| {it.exchanged:.2f} | {it.passed:.2f} | {it.ms:.2f} | {alone / it.ms:.1f} |"
            )
    return "\n".join(lines)


def estimates(row: Record, world: int) -> list[Estimate]:
    """8 devices of one machine, and 64 of eight."""
    size = 4 if row["dtype"] == "float32" else 2
    whole = row["tokens"] * row["heads"] * row["head_dim"] * size  # bytes of q, and of each of the others
    ulysses, ring = row["methods"]["ulysses"], row["methods"]["ring"]
    exchange, passing = (it["bytes_sent"] / it["transfers_ms"] for it in (ulysses, ring))  # bytes a millisecond
    attention = {name: it["computations_ms"] * world for name, it in row["methods"].items()}  # of all devices together
    both = attention.get("unified", attention["ring"])
    found, machines = [], MACHINE
    if row["heads"] >= MACHINE:
        exchanged = 4 * whole / MACHINE * (MACHINE - 1) / MACHINE / exchange
        found.append(Estimate(MACHINE, "ulysses", attention["ulysses"] / MACHINE, exchanged, 0.0))
    passed = 2 * whole * (MACHINE - 1) / MACHINE / passing
    found.append(Estimate(MACHINE, "ring", attention["ring"] / MACHINE, 0.0, passed))
    if row["heads"] >= MACHINE:
        total = MACHINE * machines
        exchanged = 4 * whole / total * (MACHINE - 1) / MACHINE / exchange
        passed = 2 * whole / MACHINE * (machines - 1) / machines / BETWEEN_MACHINES * 1000
        found.append(Estimate(total, f"unified, {machines} x {MACHINE}", both / total, exchanged, passed))
    return found


if __name__ == "__main__":
    main()
