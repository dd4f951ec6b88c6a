"""Who runs it: argument before `use` before the environment before the best; and what is kept between calls."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from counting_backend import CountingBackend

import rainfusion
from rainfusion import AttentionProblem, BackendSpec, TokenLayout, TopK
from rainfusion.core.errors import (
    BackendUnavailableError,
    DuplicateBackendError,
    LoweringError,
    NoBackendError,
    UnknownBackendError,
)
from rainfusion.dispatch import ENVIRONMENT

CLIP = {"grid": (8, 8, 8), "block": 32, "sparsity": 0.5, "sink": None}
DENSE = rainfusion.plan(AttentionProblem(1, 2, 512, 512, 16), policy=TopK(0))


@pytest.fixture(autouse=True)
def no_wish(monkeypatch):
    monkeypatch.delenv(ENVIRONMENT, raising=False)


@pytest.fixture
def qkv(rng):
    return [rng.standard_normal((1, 2, 512, 16), dtype=np.float32) for _ in range(3)]


@pytest.fixture
def announce():
    """Announce backends of `counting_backend` for one test."""
    names = []

    def announce(name, target, **spec):
        rainfusion.register(BackendSpec(name, f"counting_backend:{target}", **spec))
        names.append(name)

    yield announce
    for name in names:
        rainfusion.unregister(name)


@pytest.fixture
def counting(announce):
    announce("counting", "CountingBackend")
    CountingBackend.lowered.clear()
    return CountingBackend.lowered


def chosen(**how) -> str:
    return rainfusion.choose(DENSE, like=np.zeros(1), **how).candidate.backend.name


def test_argument_before_use_before_environment_before_the_best(counting, monkeypatch):
    best = chosen()
    assert best != "counting"
    monkeypatch.setenv(ENVIRONMENT, "counting")
    assert chosen() == "counting"
    with rainfusion.use("reference"):
        assert chosen() == "reference"
        assert chosen(backend="counting") == "counting"
        with rainfusion.use("counting"):
            assert chosen() == "counting"
        assert chosen() == "reference"
    assert chosen() == "counting"
    monkeypatch.setenv(ENVIRONMENT, "")
    assert chosen() == best


def test_a_choice_explains_itself(counting, monkeypatch):
    assert "reference on cpu" in rainfusion.choose(DENSE, like=np.zeros(1), backend="reference").why
    with rainfusion.use("counting"):
        assert rainfusion.choose(DENSE, like=np.zeros(1)).why == (
            "counting on cpu: asked for by rainfusion.use('counting')"
        )
    monkeypatch.setenv(ENVIRONMENT, "counting")
    assert f"asked for by {ENVIRONMENT}=counting" in rainfusion.choose(DENSE, like=np.zeros(1)).why


def test_use_ends_with_its_block_however_it_ends(counting):
    with pytest.raises(ZeroDivisionError), rainfusion.use("counting"):
        raise ZeroDivisionError
    assert chosen() != "counting"
    with pytest.raises(UnknownBackendError, match="backend 'cudnn' is not known"), rainfusion.use("cudnn"):
        pytest.fail("never entered")


def test_use_is_local_to_its_thread(counting):
    inside, checked = threading.Event(), threading.Event()

    def elsewhere() -> str:
        inside.wait(10)
        name = chosen()
        checked.set()
        return name

    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(elsewhere)
        with rainfusion.use("counting"):
            inside.set()
            checked.wait(10)
            assert chosen() == "counting"
    assert other.result() != "counting"


def test_the_environment_reaches_a_fresh_process():
    code = "import numpy as n, rainfusion as r; x = n.ones((1, 1, 64, 8), 'f4'); r.attention(x, x, x, sparsity=0)"
    environment = os.environ | {ENVIRONMENT: "cudnn"}
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert "UnknownBackendError: backend 'cudnn' is not known" in ran.stderr


def test_the_second_call_reuses_plan_and_executable(counting, qkv):
    first = rainfusion.attention(*qkv, **CLIP, backend="counting")
    assert len(counting) == 1
    again = rainfusion.attention(*qkv, **CLIP, backend="counting")
    with rainfusion.use("counting"):
        rainfusion.attention(*qkv, **CLIP)
    assert len(counting) == 1
    np.testing.assert_array_equal(first, again)
    rainfusion.attention(*qkv, **CLIP | {"sparsity": 0.25}, backend="counting")
    rainfusion.attention(*(x[:1] for x in qkv), **CLIP, backend="counting")
    assert len(counting) == 2


def test_calls_from_many_threads_do_not_mix(qkv):
    sizes = [16, 32, 64, 128] * 3
    calls = [CLIP | {"block": block, "sparsity": 0.1 + 0.05 * i} for i, block in enumerate(sizes)]
    alone = [rainfusion.attention(*qkv, **call, backend="reference") for call in calls]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda call: rainfusion.attention(*qkv, **call, backend="reference"), calls * 2))
    for one, many in zip(alone * 2, together, strict=True):
        np.testing.assert_array_equal(one, many)


def test_a_changed_announcement_is_seen_by_the_next_call(announce, qkv):
    announce("counting", "CountingBackend")
    CountingBackend.lowered.clear()
    rainfusion.attention(*qkv, **CLIP, backend="counting")
    rainfusion.unregister("counting")
    with pytest.raises(UnknownBackendError, match="backend 'counting' is not known"):
        rainfusion.attention(*qkv, **CLIP, backend="counting")
    rainfusion.register(BackendSpec("counting", "counting_backend:CountingBackend"))
    rainfusion.attention(*qkv, **CLIP, backend="counting")
    assert len(CountingBackend.lowered) == 2


def test_an_explicit_choice_never_falls_back(announce, qkv):
    announce("narrow", "HeadDim64Only")
    with pytest.raises(NoBackendError, match="backend='narrow' cannot run this plan") as caught:
        rainfusion.attention(*qkv, **CLIP, return_lse=True, backend="narrow")
    assert "no head dim 16 (it has 64); no returning the log-sum-exp" in str(caught.value)


def test_a_backend_that_lacks_something_says_what_to_install(announce, qkv):
    announce("absent", "CountingBackend", requires=("no_such_library",), install="pip install no-such-library")
    with pytest.raises(BackendUnavailableError, match="backend 'absent' needs no_such_library, not installed"):
        rainfusion.attention(*qkv, **CLIP, backend="absent")
    refused = [r for r in rainfusion.choose(DENSE, like=qkv[0]).refusals if r.backend == "absent"]
    assert [(r.stage, r.install) for r in refused] == [("load", "pip install no-such-library")]


def test_a_backend_whose_probe_breaks_is_passed_over_with_its_reason(announce, qkv):
    announce("broken", "BrokenProbe")
    assert rainfusion.attention(*qkv, **CLIP).shape == qkv[0].shape
    refused = [r for r in rainfusion.choose(DENSE, like=qkv[0]).refusals if r.backend == "broken"]
    assert [(r.stage, r.reason) for r in refused] == [("probe", "OSError: the driver is older than the library")]
    with pytest.raises(NoBackendError, match="the driver is older than the library"):
        rainfusion.attention(*qkv, **CLIP, backend="broken")


def test_names_are_announced_once_and_taken_back_by_who_announced_them(counting):
    with pytest.raises(DuplicateBackendError, match=r"'counting' .* is already announced by rainfusion.register"):
        rainfusion.register(BackendSpec("counting", "elsewhere:Backend"))
    for name in ("reference", "nobody"):
        with pytest.raises(UnknownBackendError, match=f"'{name}' was not announced by rainfusion.register"):
            rainfusion.unregister(name)


def test_lower_takes_a_device_by_its_address():
    run = rainfusion.lower(DENSE, backend="reference", device="cpu")
    assert str(run) == "reference on cpu\n  definition attend"
    with pytest.raises(NoBackendError, match="has no device cuda:7"):
        rainfusion.lower(DENSE, device="cuda:7")


def test_strict_forbids_gaps_and_names_them():
    planned = rainfusion.plan(AttentionProblem(1, 2, 512, 512, 16), TokenLayout((8, 8, 8), block=32), TopK(0.5))
    with pytest.raises(LoweringError, match=r"reference on cpu has no kernel for `%qb = block_mean .*strict=False"):
        rainfusion.lower(planned, backend="reference", strict=True)


def test_importing_rainfusion_loads_no_vendors_library():
    code = (
        "import sys, rainfusion; rainfusion.attention, rainfusion.plan, rainfusion.use, rainfusion.BlockMask; "
        "print([m for m in ('torch', 'triton', 'torch_npu', 'openvino') if m in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


def test_every_public_name_is_there_and_no_other():
    for name in rainfusion.__all__:
        assert getattr(rainfusion, name) is not None
    assert {*rainfusion.__all__, "__version__"} <= {*dir(rainfusion)}
    with pytest.raises(AttributeError, match="module 'rainfusion' has no attribute 'atention'"):
        _ = rainfusion.atention


@pytest.mark.parametrize("device", [rainfusion.Device("cpu"), torch.device("cpu")])
def test_what_prints_as_an_address_is_one(device):
    assert str(rainfusion.lower(DENSE, backend="reference", device=device).device) == "cpu"
    assert rainfusion.choose(DENSE, device=device).candidate.device.type == "cpu"
