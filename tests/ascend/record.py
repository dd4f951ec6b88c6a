"""Record the conformance kit on the stand-in device: contracts checked, no Ascend device involved.

make .venv-npu/ready && python tests/ascend/record.py hw_matrix/results/torch_npu-stand-in.json
"""

from __future__ import annotations

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from npu_environment import PYTHON, build_stand_in, environ, kit_arguments, missing, run


def record(report: Path) -> int:
    """Run the whole kit and write its report; the exit status of the kit."""
    if reason := missing():
        print(reason, file=sys.stderr)
        return 2
    with TemporaryDirectory() as folder:
        libraries = build_stand_in(Path(folder) / "cann")
        done = run(PYTHON, *kit_arguments(f"--rainfusion-report={report.resolve()}"), **environ(libraries))
    print(done.stdout[-2000:])
    return done.returncode


if __name__ == "__main__":
    sys.exit(record(Path(sys.argv[1])))
