"""Record the conformance kit on the stand-in of each chip: contracts checked, no Ascend device involved.

make .venv-npu/ready && python tests/ascend/record.py && python -m hw_matrix build
"""

from __future__ import annotations

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from npu_environment import CHIPS, PYTHON, ROOT, build_stand_in, environ, kit_arguments, missing, run


def record(folder: Path) -> int:
    """Run the whole kit on every stand-in and write its reports; the kit's worst exit status."""
    if reason := missing():
        print(reason, file=sys.stderr)
        return 2
    with TemporaryDirectory() as scratch:
        libraries = build_stand_in(Path(scratch) / "cann")
        return max(_record(chip, folder, libraries) for chip in CHIPS)


def _record(chip: str, folder: Path, libraries: Path) -> int:
    report = folder / f"torch_npu-stand-in-{chip.lower()}.json"
    names = {"STAND_IN_SOC": CHIPS[chip], "RAINFUSION_STAND_IN": f"CANN stand-in, {chip}"}
    done = run(PYTHON, *kit_arguments(f"--rainfusion-report={report}"), **environ(libraries, **names))
    print(report.name, done.stdout.strip().splitlines()[-1])
    return done.returncode


if __name__ == "__main__":
    sys.exit(record(ROOT / "hw_matrix" / "results"))
