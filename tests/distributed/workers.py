"""Four processes of one group on gloo, which run functions of tests; nothing in here can wait without end."""

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

WORLD = 4
_SECONDS = 60.0  # for a function on all ranks; the first one waits until every process has imported torch


class Failed(Exception):
    """A function raised on a rank; the message is the traceback there."""


class Workers:
    """Processes that call functions with a `Ranks` group of the first `world` of them.

    Args:
        rendezvous: a file that does not exist yet.
    """

    def __init__(self, rendezvous: Path) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch.distributed", "rainfusion.distributed"])  # imported once for all
        self._processes, self._pipes = [], []
        for rank in range(WORLD):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, rank, str(rendezvous)), daemon=True)
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


def _serve(pipe: Connection, rank: int, rendezvous: str) -> None:
    os.environ["RAINFUSION_DISABLED_PLUGINS"] = "openvino,torch_npu,triton"  # slow to import, and of no use here
    import torch
    import torch.distributed as dist

    from rainfusion.core.errors import SparsityWarning, SpeedWarning

    torch.set_num_threads(1)
    warnings.simplefilter("error")
    warnings.simplefilter("ignore", SparsityWarning)  # small grids cannot spend a budget well
    warnings.simplefilter("ignore", SpeedWarning)  # 8 bits are emulated here
    warnings.filterwarnings("ignore", "`torch.distributed._functional_collectives", FutureWarning)  # diffusers
    dist.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=WORLD, timeout=timedelta(seconds=_SECONDS / 2)
    )
    groups = {world: dist.new_group(list(range(world))) for world in range(1, WORLD + 1)}
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
    """Four processes on gloo."""
    pytest.importorskip("torch")
    started = Workers(tmp_path_factory.mktemp("rendezvous") / "file")
    yield started
    started.stop()
