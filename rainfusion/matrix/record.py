"""Record a target on this machine: ``python -m rainfusion.matrix.record torch-h100``.

Runs the conformance kit on the target's device, then its benchmark, and writes both to
``hw_matrix/results/<target>.json``. Needs pytest and what the backend needs, not the command line's packages; a
checkout that is not installed will do (``PYTHONPATH=.``).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rainfusion import __version__
from rainfusion.core.errors import RainfusionError
from rainfusion.matrix.records import misfits, read_record, untraceable
from rainfusion.matrix.targets import HARDWARE, MatrixError, Target, read_targets, read_toml
from rainfusion.plugins.conformance.report import as_lines
from rainfusion.plugins.conformance.target import STAND_IN

_ROOT = Path(__file__).parents[2]
_REFUSED = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Record a target; the kit's exit status, 2 where there is nothing to record."""
    args = _parser().parse_args(arguments)
    try:
        return record(args.target, args.folder, args.device, huge=args.huge, benchmark=args.benchmark)
    except RainfusionError as error:
        print(f"error: {error}", file=sys.stderr)
        return _REFUSED


def record(name: str, folder: Path, device: str | None, *, huge: bool, benchmark: bool) -> int:
    """Run the kit and the benchmark of a target, and write the record if this machine is that target.

    Raises:
        MatrixError: no such target, this machine is another one, no commit has this code, or the kit wrote no report.
    """
    targets = read_targets(folder / "targets.toml")[1]
    if name not in targets or isinstance(targets[name].unsupported, str):
        can = ", ".join(key for key, target in targets.items() if not isinstance(target.unsupported, str))
        raise MatrixError(f"{name!r} is no target to record; list it in targets.toml, or choose one of {can}")
    with TemporaryDirectory() as scratch:
        return _Session(targets[name], folder, device, Path(scratch)).record(huge=huge, benchmark=benchmark)


@dataclass(frozen=True)
class _Session:
    """One target on this machine, with a folder for what is not kept."""

    target: Target
    folder: Path
    device: str | None
    scratch: Path

    def record(self, *, huge: bool, benchmark: bool) -> int:
        """Record, after a first look that takes seconds: all cases take minutes."""
        self._look()
        status, report = self._kit(*["--rainfusion-huge"] * huge)
        document = json.loads(report.read_text(encoding="utf-8"))
        if benchmark and self.target.benchmark:
            measured = self._benchmark()
            document |= {"benchmark": measured} if measured else {}
            status = status if measured else 1
        path = self.folder / "results" / f"{self.target.name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(as_lines(document) + "\n", encoding="utf-8")
        print(f"wrote {path}; now: rainfusion matrix", flush=True)
        return status

    def _look(self) -> None:
        """Refuse another machine, and code that nobody could find again."""
        status, report = self._kit("-k", "test_contract_claims")
        if status:
            raise MatrixError("the backend finds no such device, or claims nonsense; the output above says which")
        look = read_record(report)
        found = list(misfits(look, self.target))
        if found:
            raise MatrixError(f"this is not {self.target.name}, nothing was written: {'; '.join(found)}")
        unknown = untraceable(look)
        if unknown:
            raise MatrixError(f"the record could not be traced, nothing was written: {unknown}")

    def _kit(self, *options: str) -> tuple[int, Path]:
        """Run the conformance kit; its exit status and report."""
        target, report = self.target, self.scratch / "report.json"
        report.unlink(missing_ok=True)
        xfails = self.folder.resolve() / "xfails" / f"{target.backend}.toml"
        command = [sys.executable, "-m", "pytest", "--quiet", "-p", "no:cacheprovider"]
        command += ["--pyargs", "rainfusion.plugins.conformance"]
        command += [f"--rainfusion-backend={target.backend}", f"--rainfusion-device={self.device or target.device}"]
        command += [f"--rainfusion-report={report}", *options]
        command += [f"--rainfusion-xfails={xfails}"] * xfails.exists()
        status = subprocess.run(command, env=self._environ(), cwd=self.scratch, check=False).returncode
        if not report.exists():
            raise MatrixError("the conformance kit wrote no report; its output above says why")
        return status, report

    def _benchmark(self) -> dict[str, Any] | None:
        """What the target's benchmark measured; None where it failed."""
        file = self.scratch / "benchmark.json"
        script, *arguments = self.target.benchmark
        command = [sys.executable, str(_ROOT / script), *arguments, "--json", str(file)]
        if subprocess.run(command, env=self._environ(), check=False).returncode:
            print(f"the benchmark {script} failed; the record has no ratios", file=sys.stderr)
            return None
        return {"script": " ".join(self.target.benchmark), **json.loads(file.read_text(encoding="utf-8"))}

    def _environ(self) -> dict[str, str]:
        """What the target asks for, the name of what stands in for its hardware, and this very package."""
        stand_in = {} if self.target.chip.evidence == HARDWARE else {STAND_IN: self.target.chip.name}
        path = [str(_ROOT), *_as_if_installed(self.scratch), os.environ.get("PYTHONPATH", "")]
        return {**os.environ, **self.target.environ, **stand_in, "PYTHONPATH": os.pathsep.join(filter(None, path))}


def _as_if_installed(scratch: Path) -> list[str]:
    """Where rainfusion is not installed: a folder with its entry points, as an installer lays them down."""
    try:
        distribution("rainfusion")
        return []
    except PackageNotFoundError:
        metadata = scratch / f"rainfusion-{__version__}.dist-info"
    project = read_toml(_ROOT / "pyproject.toml")["project"]
    metadata.mkdir(exist_ok=True)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: rainfusion\nVersion: {__version__}\n")
    lines = [
        line
        for group, entries in project["entry-points"].items()
        for line in (f"[{group}]", *(f"{name} = {value}" for name, value in entries.items()))
    ]
    (metadata / "entry_points.txt").write_text("\n".join(lines) + "\n")
    return [str(scratch)]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m rainfusion.matrix.record",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("target", help="backend and chip, such as torch-h100; listed in targets.toml")
    parser.add_argument("--folder", type=Path, default=_ROOT / "hw_matrix", help="of the matrix (default: %(default)s)")
    parser.add_argument("--device", help="address of the device (default: the first of the target's type)")
    parser.add_argument("--huge", action="store_true", help="also tensors of 2**31 elements: 22 GB on an accelerator")
    parser.add_argument("--no-benchmark", dest="benchmark", action="store_false", help="leave the benchmark out")
    return parser


if __name__ == "__main__":
    sys.exit(main())
