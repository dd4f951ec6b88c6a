"""``python -m hw_matrix check|build|record``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from hw_matrix.matrix import Matrix, read_matrix
from hw_matrix.page import page
from hw_matrix.record import record
from hw_matrix.targets import read_text
from rainfusion.core.errors import RainfusionError

_OUT_OF_DATE, _REFUSED = 1, 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; 0 where all is well, 1 where the table cannot be relied on or the kit failed, 2 for a refusal."""
    args = _parser().parse_args(arguments)
    try:
        if args.command == "record":
            return record(args.target, args.folder, args.device, huge=args.huge, benchmark=args.benchmark)
        return (check if args.command == "check" else build)(read_matrix(args.folder))
    except RainfusionError as error:
        print(f"error: {error}", file=sys.stderr)
        return _REFUSED


def check(matrix: Matrix) -> int:
    """Say what is wrong with the matrix, and what to do about it."""
    found = matrix.problems()
    written = read_text(matrix.page) if matrix.page.exists() else ""
    if written != page(matrix):
        found.append(f"{matrix.page.name} is not what the records say; run python -m hw_matrix build, commit the file")
    print(
        "\n".join(found) or f"{matrix.page.name} is right: {len(matrix.records)} records, {len(matrix.targets)} targets"
    )
    return _OUT_OF_DATE if found else 0


def build(matrix: Matrix) -> int:
    """Write the table."""
    matrix.page.write_text(page(matrix), encoding="utf-8")
    print("\n".join([f"wrote {matrix.page}", *matrix.problems()]))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m hw_matrix", description="What runs where, and on what evidence.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("check", help="exit status 1 where the table cannot be relied on, with what to do")
    commands.add_parser("build", help="write MATRIX.md from targets.toml and results/")
    recording = commands.add_parser("record", help="run the kit and the benchmark on this machine, and write results/")
    recording.add_argument("target", help="backend and chip, such as torch-h100; listed in targets.toml")
    recording.add_argument("--device", help="address of the device (default: the first of the target's type)")
    recording.add_argument("--huge", action="store_true", help="also tensors of 2**31 elements: 22 GB on a GPU")
    recording.add_argument("--no-benchmark", dest="benchmark", action="store_false", help="leave the benchmark out")
    for command in commands.choices.values():
        command.add_argument("--folder", type=Path, default=Path(__file__).parent, help="of the matrix")
    return parser


if __name__ == "__main__":
    sys.exit(main())
