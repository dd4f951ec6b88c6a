"""Numbers on their way from a device to the host; CUDA as a stand-in here, as it is in the tests of its backend."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from rainfusion.integrations.device_reads import arriving, stopwatch


@pytest.mark.parametrize("library", [np.asarray, torch.from_numpy])
def test_numbers_of_the_host_are_there_and_stay_what_they_were(library):
    numbers = library(np.asarray([0.5, 2.0], dtype=np.float32))
    read = arriving(numbers)
    numbers += 1
    assert read() == read() == [0.5, 2.0]


class Device:
    """Stands in for a CUDA device of torch: a queue of work that is done when the test says so."""

    def __init__(self):
        self.queue, self.device = [], SimpleNamespace(type="cuda")
        self.cuda = SimpleNamespace(Event=lambda **_: Event(self), current_stream=self.stream)

    def stream(self, device):
        assert device is self.device
        return self

    def empty(self, shape, *, dtype, pin_memory):
        assert pin_memory
        return Pinned(self, np.zeros(shape, dtype))

    def tensor(self, numbers):
        numbers = np.asarray(numbers, dtype=np.float32)
        return SimpleNamespace(device=self.device, shape=numbers.shape, dtype=numbers.dtype, numbers=numbers)

    def work(self):
        for task in self.queue:
            task()
        self.queue.clear()


class Pinned:
    def __init__(self, device, numbers):
        self.on, self.numbers = device, numbers

    def copy_(self, source, *, non_blocking):
        assert non_blocking
        self.on.queue.append(lambda: self.numbers.__setitem__(slice(None), source.numbers))

    def tolist(self):
        return self.numbers.tolist()


class Event:
    def __init__(self, device):
        self.is_done = False

    def record(self, stream):
        stream.queue.append(lambda: setattr(self, "is_done", True))

    def query(self):
        return self.is_done

    def synchronize(self):
        assert self.is_done

    def elapsed_time(self, other):
        return 3.5


def test_numbers_of_a_cuda_device_arrive_behind_its_work(monkeypatch):
    device = Device()
    monkeypatch.setitem(sys.modules, "torch", device)
    read = arriving(device.tensor([0.5, 2.0]))
    assert read() is None
    device.work()
    assert read() == [0.5, 2.0]


def test_a_stopwatch_is_read_when_the_work_is_done(monkeypatch):
    device = Device()
    monkeypatch.setitem(sys.modules, "torch", device)
    read = stopwatch(device.tensor([0.0]))()
    device.work()
    assert read() == 3.5
