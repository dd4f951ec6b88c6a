"""A fork while other threads hold every lock of rainfusion: the child's calls go on, and never hang."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path
from threading import Thread

import pytest

from rainfusion.core.locks import ProcessLock

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")

ROOT = Path(__file__).parents[2]
CALL = """
    import os, sys, warnings, numpy as np, rainfusion
    BACKEND = os.environ["BACKEND"]
    from threading import Event, Thread
    from rainfusion.core import locks
    warnings.simplefilter("ignore")

    x = np.random.default_rng(0).standard_normal((1, 2, 640, 64)).astype(np.float32)
    if BACKEND in ("torch", "triton"):
        import torch
        x = torch.from_numpy(x)
    call = lambda sparsity=0.5: rainfusion.attention(x, x, x, sparsity=sparsity, backend=BACKEND)

    def end_like_parent(child, right):
        if child == 0:
            os._exit(0 if right else 7)
        assert right and os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""


def run(code: str, **environ: str) -> None:
    command = [sys.executable, "-c", textwrap.dedent(CALL) + textwrap.dedent(code)]
    environ = {**os.environ, "PYTHONPATH": str(ROOT), **environ}
    ended = subprocess.run(command, env=environ, timeout=120, check=False, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


HELD = """
    first, held, done = call(), Event(), Event()

    def hold():
        for lock in list(locks._all):
            lock.__enter__()
        held.set()
        done.wait()
        for lock in list(locks._all):
            lock.__exit__()

    assert len(locks._all) >= 4
    thread = Thread(target=hold)
    thread.start()
    held.wait()
    child = os.fork()
    if child == 0:
        same = bool((call() == first).all())
        call(0.7)  # a plan of its own
        end_like_parent(0, same and rainfusion.devices() != ())
    _, status = os.waitpid(child, 0)
    done.set()
    thread.join()
    assert os.waitstatus_to_exitcode(status) == 0
    assert bool((call() == first).all())
"""


@pytest.mark.parametrize("backend", ["reference", "torch", "openvino"])
def test_a_fork_while_another_thread_holds_every_lock(backend: str) -> None:
    run(HELD, BACKEND=backend)


@pytest.mark.interpreter
def test_a_fork_while_another_thread_holds_the_interpreter() -> None:
    run(HELD, TRITON_INTERPRET="1", BACKEND="triton")


@pytest.mark.parametrize("backend", ["torch", "openvino"])
def test_a_fork_after_work_on_several_threads(backend: str) -> None:
    """OpenMP's threads are not in the child; torch and OpenVINO then work on fewer, or start their own."""
    code = """
        x = x.repeat(8, 1, 4, 1) if BACKEND == "torch" else np.tile(x, (8, 1, 4, 1))
        first = call()
        child = os.fork()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            again = [call(), call()]
        told = [str(w.message) for w in caught if "before this process was forked" in str(w.message)]
        due = int(child == 0 and BACKEND == "torch")
        end_like_parent(child, np.allclose(again, first, atol=1e-6) and len(told) == due)
    """
    run(code, BACKEND=backend, OMP_NUM_THREADS="2")


def test_a_fork_within_a_lock_leaves_it_held() -> None:
    code = """
        lock = locks.ProcessLock()
        with lock:
            child = os.fork()
            held = lock._lock._is_owned()
        taken = Event()

        def take():
            with lock:
                taken.set()

        Thread(target=take, daemon=True).start()
        end_like_parent(child, held and taken.wait(10))
    """
    run(code, BACKEND="reference")


def test_locks_are_re_entrant_and_between_threads() -> None:
    lock, order = ProcessLock(), []

    def take() -> None:
        with lock:
            order.append("thread")

    with lock, lock:
        thread = Thread(target=take)
        thread.start()
        thread.join(0.05)
        order.append("main")
    thread.join()
    assert order == ["main", "thread"]
