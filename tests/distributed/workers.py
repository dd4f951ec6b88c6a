"""Four processes of one group, which run functions of tests; nothing in here can wait without end.

On the CPU with gloo; with ``RAINFUSION_TEST_DEVICE=cuda`` on GPUs with NCCL, a process a GPU and at most four.
``RAINFUSION_TEST_BACKEND`` names the backend that computes: Triton's on GPUs, otherwise the one that is chosen.
"""

from __future__ import annotations

import multiprocessing
import os
import traceback
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

DEVICE = os.environ.get("RAINFUSION_TEST_DEVICE", "cpu")
BACKEND = os.environ.get("RAINFUSION_TEST_BACKEND", "triton" if DEVICE == "cuda" else "") or None


def _most() -> int:
    if DEVICE == "cpu":
        return 4
    if DEVICE != "cuda":
        raise pytest.UsageError(f"RAINFUSION_TEST_DEVICE is {DEVICE!r}; give cpu or cuda")
    import torch

    found = torch.cuda.device_count()
    if found < 2:
        raise pytest.UsageError(f"RAINFUSION_TEST_DEVICE=cuda needs two GPUs or more; there are {found}")
    return min(found, 4)


WORLD = _most()
on_the_cpu = pytest.mark.skipif(DEVICE != "cpu", reason="computes on the CPU")
# For a function on all ranks; the first one waits until every process has imported torch, and kernels are compiled.
_SECONDS = 60.0 if DEVICE == "cpu" else 300.0


class Failed(Exception):
    """A function raised on a rank; the message is the traceback there."""


class Workers:
    """Processes that call functions with a `Ranks` group of the first `world` of them.

    Args:
        rendezvous: a file that does not exist yet.
        most: how many processes there are.
    """

    def __init__(self, rendezvous: Path, most: int = WORLD) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch.distributed", "rainfusion.distributed"])  # imported once for all
        self._processes, self._pipes = [], []
        for rank in range(most):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, rank, most, str(rendezvous)), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)

    def __call__(self, world: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        """What `function(group, *args)` returns on each of the first ranks; an exception where it raises one."""
        for pipe in self._pipes[:world]:
            pipe.send((world, function, args))
        answers = []
        for rank, pipe in enumerate(self._pipes[:world]):
            if not pipe.poll(_SECONDS):
                self.stop()
                raise TimeoutError(f"rank {rank} of {world} has not answered in {_SECONDS} s")
            answers.append(pipe.recv())
        return answers

    def results(self, world: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        """As a call; raises where a rank has."""
        answers = self(world, function, *args)
        for answer in answers:
            if isinstance(answer, Exception):
                raise answer
        return answers

    def stop(self) -> None:
        """End the processes, by force where they do not end by themselves."""
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(5)
            process.kill()
            process.join(5)


def _serve(pipe: Connection, rank: int, most: int, rendezvous: str) -> None:
    unused = {"openvino", "torch_npu", "triton"} - {BACKEND}  # slow to import
    os.environ["RAINFUSION_DISABLED_PLUGINS"] = ",".join(sorted(unused))
    import torch
    import torch.distributed as dist

    from rainfusion.core.errors import SparsityWarning, SpeedWarning

    torch.set_num_threads(1)
    warnings.simplefilter("error")
    warnings.simplefilter("ignore", SparsityWarning)  # small grids cannot spend a budget well
    warnings.simplefilter("ignore", SpeedWarning)  # 8 bits are emulated here
    warnings.filterwarnings("ignore", "`torch.distributed._functional_collectives", FutureWarning)  # diffusers
    if DEVICE == "cuda":
        warnings.filterwarnings("ignore", module="torch.distributed")  # advice on NCCL
        torch.cuda.set_device(rank)  # before NCCL, which takes the current device
    dist.init_process_group(
        "nccl" if DEVICE == "cuda" else "gloo",
        init_method=f"file://{rendezvous}",
        rank=rank,
        world_size=most,
        timeout=timedelta(seconds=_SECONDS / 2),
    )
    groups = {world: dist.new_group(list(range(world))) for world in range(1, most + 1)}
    while True:
        try:
            world, function, args = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send(function(groups[world], *args))
        except Exception as error:
            error.__cause__ = error.__context__ = None
            pipe.send(error if _travels(error) else Failed(traceback.format_exc()))


def _travels(error: Exception) -> bool:
    return type(error).__module__.startswith("rainfusion.")


@pytest.fixture(scope="session")
def workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workers]:
    """Four processes of one group."""
    pytest.importorskip("torch")
    started = Workers(tmp_path_factory.mktemp("rendezvous") / "file")
    yield started
    started.stop()
