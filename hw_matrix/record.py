"""Record a target on this machine: ``python -m hw_matrix record torch-h100``.

Runs the conformance kit on the target's device, then its benchmark, and writes both to
``hw_matrix/results/<target>.json``. Needs pytest and what the backend needs; a checkout that is not installed will do.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from hw_matrix.matrix import misfits, untraceable
from hw_matrix.targets import HARDWARE, MatrixError, Target, read_targets, read_text, read_toml
from rainfusion import __version__
from rainfusion.testing.report import Report, read_report
from rainfusion.testing.target import STAND_IN

_ROOT = Path(__file__).parents[1]


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
        if benchmark and self.target.benchmark:
            report = replace(report, benchmark=self._benchmark())
            status = status if report.benchmark else 1
        path = self.folder / "results" / f"{self.target.name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(report.to_json(), encoding="utf-8")
        print(f"wrote {path}; now: python -m hw_matrix build", flush=True)
        return status

    def _look(self) -> None:
        """Refuse another machine, and code that could not be found again."""
        status, look = self._kit("-k", "test_contract_claims")
        if status:
            raise MatrixError("the backend finds no such device, or its claims are invalid; see the output above")
        if found := "; ".join(misfits(look, self.target)):
            raise MatrixError(f"this is not {self.target.name}, nothing was written: {found}")
        if unknown := untraceable(look):
            raise MatrixError(f"the record could not be traced, nothing was written: {unknown}")

    def _kit(self, *options: str) -> tuple[int, Report]:
        """Run the conformance kit, by the folder's test_kit.py where there is one; its exit status and report."""
        target, file, own = self.target, self.scratch / "report.json", self.folder.resolve() / "test_kit.py"
        file.unlink(missing_ok=True)
        plugins = ("-p", "no:cacheprovider", "-p", "rainfusion.testing.pytest_plugin")
        command = [sys.executable, "-m", "pytest", "--quiet", *plugins]
        command += [str(own)] if own.exists() else ["--pyargs", "rainfusion.testing"]
        command += [f"--rainfusion-backend={target.backend}", f"--rainfusion-device={self.device or target.device}"]
        command += [f"--rainfusion-report={file}", *options]
        status = subprocess.run(command, env=self._environ(), cwd=self.scratch, check=False).returncode
        if not file.exists():
            raise MatrixError("the conformance kit wrote no report; its output above says why")
        return status, read_report(file)

    def _benchmark(self) -> dict[str, Any]:
        """What the target's benchmark measured; nothing where it failed."""
        file = self.scratch / "benchmark.json"
        script, *arguments = self.target.benchmark
        command = [sys.executable, str(_ROOT / script), *arguments, "--json", str(file)]
        if subprocess.run(command, env=self._environ(), check=False).returncode:
            print(f"the benchmark {script} failed; the record has no ratios", file=sys.stderr)
            return {}
        try:
            measured = dict(json.loads(read_text(file)))
        except (ValueError, TypeError, RecursionError) as error:
            raise MatrixError(f"the benchmark {script} wrote no JSON object: {str(error)[:200]}") from error
        return {"script": " ".join(self.target.benchmark), **measured}

    def _environ(self) -> dict[str, str]:
        """What the target asks for, the name of what stands in for its hardware, and this very package."""
        stand_in = {} if self.target.chip.evidence == HARDWARE else {STAND_IN: self.target.chip.name}
        path = [str(_ROOT), *_as_if_installed(self.scratch), os.environ.get("PYTHONPATH", "")]
        return {**os.environ, **self.target.environ, **stand_in, "PYTHONPATH": os.pathsep.join(filter(None, path))}


def _as_if_installed(scratch: Path) -> list[str]:
    """Where rainfusion is not installed: a folder with its entry points, as an installer lays them down."""
    with suppress(PackageNotFoundError):
        distribution("rainfusion")
        return []
    metadata = scratch / f"rainfusion-{__version__}.dist-info"
    metadata.mkdir(exist_ok=True)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: rainfusion\nVersion: {__version__}\n")
    entries = read_toml(_ROOT / "pyproject.toml")["project"]["entry-points"]["rainfusion"]
    lines = ["[rainfusion]", *(f"{name} = {value}" for name, value in entries.items())]
    (metadata / "entry_points.txt").write_text("\n".join(lines) + "\n")
    return [str(scratch)]
