"""What rainfusion keeps between calls: bounded, and let go of by `rainfusion.cache.clear()`."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
from counting_backend import CountingBackend

import rainfusion
from rainfusion import BackendSpec, TokenLayout
from rainfusion.core import executable, lowering
from rainfusion.dispatch import ExecutableCache, LruDict

CLIP = {"grid": (4, 8, 8), "block": 32, "sparsity": 0.5, "sink": None, "backend": "reference"}


@pytest.fixture(autouse=True)
def empty():
    rainfusion.cache.clear()
    gc.collect()
    yield
    rainfusion.cache.clear()


@pytest.fixture
def qkv(rng):
    return [rng.standard_normal((1, 2, 256, 16), dtype=np.float32) for _ in range(3)]


def kept() -> list[int]:
    cache = rainfusion.cache
    return [len(entries) for entries in (cache._plans, cache._choices, cache._calls)]


def test_clear_lets_go_of_executables_and_their_constants(qkv):
    before = len(executable.live), len(lowering._shared)
    rainfusion.attention(*qkv, **CLIP)
    gc.collect()
    assert kept() == [1, 1, 1]
    assert (len(executable.live), len(lowering._shared)) > before
    rainfusion.cache.clear()
    gc.collect()
    assert kept() == [0, 0, 0]
    assert (len(executable.live), len(lowering._shared)) == before


def test_calls_after_clear_lower_again_and_give_the_same(qkv):
    rainfusion.register(BackendSpec("counting", "counting_backend:CountingBackend"))
    CountingBackend.lowered.clear()
    try:
        first = rainfusion.attention(*qkv, **CLIP | {"backend": "counting"})
        rainfusion.cache.clear()
        again = rainfusion.attention(*qkv, **CLIP | {"backend": "counting"})
    finally:
        rainfusion.unregister("counting")
    assert len(CountingBackend.lowered) == 2
    np.testing.assert_array_equal(first, again)


def test_an_executable_in_use_outlives_clear(qkv):
    problem = rainfusion.AttentionProblem.from_tensors(*qkv)
    plan = rainfusion.plan(problem, TokenLayout((4, 8, 8), block=32, sink=None), rainfusion.TopK(0.5))
    run = rainfusion.lower(plan, like=qkv[0], backend="reference")
    expected = run(*qkv)
    rainfusion.cache.clear()
    gc.collect()
    np.testing.assert_array_equal(run(*qkv), expected)


def test_what_is_kept_does_not_grow_with_the_number_of_shapes(rng):
    rainfusion.attention(*rng.standard_normal((3, 1, 1, 8, 4), np.float32), sparsity=0, backend="reference")
    for length in range(8, 320):
        x = rng.standard_normal((1, 1, length, 4), np.float32)
        rainfusion.attention(x, x, x, grid=(1, 1, length), block=8, sparsity=0.1, backend="reference")
    gc.collect()
    plans, choices, calls = kept()
    assert plans <= 128
    assert choices <= 128
    assert calls <= 128
    assert len(executable.live) <= 256  # a call holds its executable
    assert len(lowering._shared) <= 3 * 256


def test_the_constants_of_one_layout_are_shared_by_its_plans(qkv):
    for sparsity in (0.2, 0.4, 0.6):
        rainfusion.attention(*qkv, **CLIP | {"sparsity": sparsity})
    # Backends that tests of wrong plugins announced may still hold theirs.
    own = [key for key in lowering._shared if type(key[0]).__module__.startswith("rainfusion.")]
    assert len([key for key in own if "order" in key]) == 1


def test_a_bounded_dictionary_forgets_what_was_used_least_recently():
    entries: LruDict[int] = LruDict(2)
    entries.keep("a", 1)
    entries.keep("b", 2)
    assert entries.find("a") == 1
    entries.keep("c", 3)
    assert [*entries] == ["a", "c"]
    assert entries.keep("a", 9) == 1  # another thread was first
    assert entries.find("b") is None


def test_a_cache_of_ones_own_is_bounded_too(qkv):
    cache = ExecutableCache(limit=2)
    problem = rainfusion.AttentionProblem.from_tensors(*qkv)
    choice = rainfusion.choose(rainfusion.plan(problem, policy=rainfusion.TopK(0)), like=qkv[0], backend="reference")
    lowered = []
    for sparsity in (0.0, 0.3, 0.6):
        plan = rainfusion.plan(problem, policy=rainfusion.TopK(sparsity))
        found = cache.executable(plan, choice.candidate.backend, choice.candidate.device)
        lowered.append(weakref.ref(found))
        del found
    gc.collect()
    assert [ref() is not None for ref in lowered] == [False, True, True]
