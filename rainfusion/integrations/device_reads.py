"""What a device says later: the time of a call, and small arrays on their way to the host, without a wait for either.

PyTorch's CUDA devices are known here by the tensors that come from them; torch itself is not imported.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

from rainfusion.core.arrays import to_numpy

Array = Any
Arrival = Callable[[], list[float] | None]


def stopwatch(like: Array) -> Callable[[], Callable[[], float]]:
    """Starts to measure; the function it returns stops, and what that returns gives the milliseconds.

    On a CUDA device by events on its stream, which cost no wait until the time is read.
    """
    torch = _torch_of_cuda(like)
    if torch is None:
        start = time.perf_counter()

        def stop() -> Callable[[], float]:
            ms = 1e3 * (time.perf_counter() - start)
            return lambda: ms

        return stop
    begun = torch.cuda.Event(enable_timing=True)
    begun.record(torch.cuda.current_stream(like.device))

    def stop_event() -> Callable[[], float]:
        ended = torch.cuda.Event(enable_timing=True)
        ended.record(torch.cuda.current_stream(like.device))

        def read() -> float:
            ended.synchronize()
            return float(begun.elapsed_time(ended))

        return read

    return stop_event


def arriving(numbers: Array) -> Arrival:
    """Starts to copy numbers to the host; the function it returns gives them, or None while they are on their way.

    PyTorch's CUDA devices copy into pinned memory behind the work that is queued, and the function asks an event. All
    other arrays are read at once: those of a CPU are there, and another accelerator makes the host wait.

    Args:
        numbers: ``[n]``, of any library.
    """
    torch = _torch_of_cuda(numbers)
    if torch is None:
        here = [float(number) for number in to_numpy(numbers)]
        return lambda: here
    pinned = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
    pinned.copy_(numbers, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record(torch.cuda.current_stream(numbers.device))
    return lambda: pinned.tolist() if copied.query() else None


def _torch_of_cuda(x: Array) -> Any:
    """torch, where an array is on a CUDA device of its."""
    is_cuda = getattr(getattr(x, "device", None), "type", "cpu") == "cuda"
    return sys.modules.get("torch") if is_cuda else None
