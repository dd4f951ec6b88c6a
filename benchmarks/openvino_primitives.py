"""What it costs that OpenVINO's oneDNN keeps fewer kernels: CPU time with rainfusion's limit over that without.

    python benchmarks/openvino_primitives.py --rounds 40

Two processes, one with the limit and one with oneDNN's own 1024, take turns call by call on the same shapes; each line
is a number of shapes in rotation, and the median over rounds of the ratio of their CPU times (all threads).
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
import warnings
from typing import IO, Any

import numpy as np

SHAPES = (1, 12, 48, 96)  # in rotation


def work() -> None:
    """Answer every line, the number of a shape, with the CPU seconds of one call of that shape."""
    import rainfusion

    warnings.simplefilter("ignore", rainfusion.RainfusionWarning)
    rng = np.random.default_rng(0)
    for line in sys.stdin:
        frames, height, width = 4 + int(line) % 4, 12 + int(line) // 4 % 6, 16 + int(line) // 24
        q, k, v = (rng.standard_normal((1, 4, frames * height * width, 64), np.float32) for _ in range(3))
        start = time.process_time()
        rainfusion.attention(q, k, v, grid=(frames, height, width), block=64, sparsity=0.7, backend="openvino")
        print(time.process_time() - start, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        work()
        return
    for shapes in SHAPES:
        limited, unlimited = _start({}), _start({"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "1024"})
        ratios = []
        for turn in range(-1, args.rounds):  # the first round plans and compiles everything
            pair = [0.0, 0.0]
            for shape in range(shapes):
                for side in (0, 1) if (turn + shape) % 2 else (1, 0):
                    pair[side] += _ask((limited, unlimited)[side], shape)
            ratios += [pair[0] / pair[1]] * (turn >= 0)
        for process in (limited, unlimited):
            _pipe(process.stdin).close()
            process.wait()
        low, middle, high = statistics.quantiles(ratios, n=4)
        print(f"{shapes:3} shapes in rotation: {middle:.3f} of the CPU time ({low:.3f} to {high:.3f})", flush=True)


def _start(environ: dict[str, str]) -> subprocess.Popen[str]:
    command = [sys.executable, __file__, "--work"]
    return subprocess.Popen(
        command, env={**os.environ, **environ}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def _ask(process: subprocess.Popen[str], shape: int) -> float:
    print(shape, file=_pipe(process.stdin), flush=True)
    return float(_pipe(process.stdout).readline())


def _pipe(pipe: IO[Any] | None) -> IO[Any]:
    assert pipe is not None
    return pipe


if __name__ == "__main__":
    main()
