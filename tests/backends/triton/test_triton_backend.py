"""The Triton backend as a whole: what it takes over, what it leaves alone, what it says of itself."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from triton.runtime.errors import OutOfResources

import rainfusion
from rainfusion import AttentionProblem, BlockMask, Fixed, Hybrid, TokenLayout, TopK, TopP
from rainfusion.backends.triton import attend as attend_module
from rainfusion.backends.triton import cost, hardware, tuning
from rainfusion.backends.triton.attend import AttentionKernel
from rainfusion.backends.triton.backend import TritonBackend
from rainfusion.backends.triton.eight_bits import EightBits
from rainfusion.backends.triton.lowering import CapturedTensors, Lowered
from rainfusion.backends.triton.tuning import CANDIDATES
from rainfusion.core.backend import Device, Segment
from rainfusion.core.choice import Candidate, choose
from rainfusion.core.errors import LoweringError, RainfusionWarning, SpeedWarning
from rainfusion.core.ops import Quantise
from rainfusion.core.passes import from_means
from rainfusion.core.stages import Stages
from rainfusion.plugins.manager import host

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.filterwarnings("ignore::rainfusion.core.errors.SparsityWarning"),  # problems are small here
]

DEVICE = "cuda:0" if torch.cuda.is_available() else "cpu"
GRID = (3, 4, 8)
LAYOUT = TokenLayout(GRID, block=16)


def problem(**settings: Any) -> AttentionProblem:
    return AttentionProblem(**{"batch": 1, "heads": 2, "q_len": 96, "kv_len": 96, "head_dim": 16, **settings})


def tensors(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, 2, 96, 16, generator=generator).to(DEVICE, dtype) for _ in range(3)]


PLANS: dict[str, dict[str, Any]] = {
    "whole plan": {"policy": TopK(0.3)},
    "summaries": {"policy": TopK(0.3), "omitted": "summary"},
    "share of the mass": {"policy": TopP(0.5)},
    "quota and mass": {"policy": Hybrid(0.3, 0.5)},
    "shares of heads": {"policy": TopK((0.3, 0.4))},
    "published counting": {"policy": TopK(0.3, counting="paper")},
    "mask only": {"policy": TopK(0.3), "returns": ("%mask",)},
    "means and score": {"policy": TopK(0.3), "returns": ("%qb", "%kb", "%score")},
    "given mask": {"policy": Fixed()},
    "given mask and summaries": {"policy": Fixed(), "omitted": "summary"},
    "given quotas and lengths": {"policy": TopK(0.3), "omitted": "summary", "quotas": True, "kv_lengths": True},
    "order given": {"policy": TopK(0.3), "order": "given"},
    "dense": {"policy": TopK(0.0)},
    "dense, with lengths": {"policy": TopK(0.0), "kv_lengths": True},
    "everything": {"policy": TopK(0.3), "omitted": "summary", "returns": ("%out", "%lse", "%mask", "%kb", "%score")},
}


@pytest.mark.parametrize("settings", PLANS.values(), ids=PLANS)
def test_every_plan_is_one_step_of_its_own(settings: dict[str, Any]) -> None:
    plan = rainfusion.plan(problem(), LAYOUT, **settings)
    run = rainfusion.lower(plan, device=DEVICE, backend="triton", strict=True)
    assert [step.by for step in run.steps] == ["triton"]


def test_a_selection_may_start_from_means_that_are_given() -> None:
    q, k, v = tensors()
    selects = rainfusion.plan(problem(), LAYOUT, TopK(0.3), returns=("%mask", "%qb", "%kb"))
    mask, qb, kb = rainfusion.lower(selects, like=q, backend="triton")(q, k, v)
    run = rainfusion.lower(from_means(replace(selects, returns=("%mask",))), like=q, backend="triton", strict=True)
    assert torch.equal(run(qb=qb, kb=kb).blocks, mask.blocks)


def test_wide_heads_are_left_to_the_definition() -> None:
    plan = rainfusion.plan(problem(head_dim=320), LAYOUT, TopK(0.3))
    run = rainfusion.lower(plan, device=DEVICE, backend="triton")
    assert [step.by for step in run.steps] == ["triton", "definition"]


def test_plans_of_a_layout_share_their_order() -> None:
    runs = [
        rainfusion.lower(rainfusion.plan(problem(heads=heads), LAYOUT, TopK(0.3)), device=DEVICE, backend="triton")
        for heads in (2, 3)
    ]
    first, second = (run.steps[0].run for run in runs)
    assert isinstance(first, Lowered)
    assert isinstance(second, Lowered)
    assert first._orders["%order"] is second._orders["%order"]


def test_captured_tensors_are_kept_once_until_they_are_cleared() -> None:
    captured, x = CapturedTensors(), torch.ones(1)
    for _ in range(2):
        captured.keep([x, torch.ones(1)])
    assert len(captured) == 3
    captured.clear()
    assert len(captured) == 0


@pytest.mark.parametrize("settings", [{}, {"omitted": "summary"}, {"policy": TopP(0.5)}], ids=str)
@pytest.mark.parametrize("tensor_layout", ["bhsd", "bshd"])
def test_output_without_a_log_sum_exp(settings: dict[str, Any], tensor_layout: str) -> None:
    """The kit always asks for the log-sum-exp; without one, other kernels may run."""
    q, k, v = (x if tensor_layout == "bhsd" else x.transpose(1, 2).contiguous() for x in tensors())
    arguments = {"grid": GRID, "block": 16, "tensor_layout": tensor_layout, **settings}
    if "policy" not in settings:
        arguments["sparsity"] = 0.3
    out, mask = rainfusion.attention(q, k, v, backend="triton", return_mask=True, **arguments)
    arguments = {**arguments, "sparsity": None, "policy": None, "mask": mask}
    expected = rainfusion.attention(q, k, v, backend="torch", **arguments)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    assert out.is_contiguous()


def test_rows_that_keep_nothing_give_zeros() -> None:
    q, k, v = tensors()
    blocks = torch.ones(1, 2, 6, 6, dtype=torch.bool, device=DEVICE)
    blocks[:, :, 2] = False
    mask = BlockMask.from_bool(blocks, 96, 96, (16, 16))
    out, lse = rainfusion.attention(q, k, v, block=16, mask=mask, backend="triton", return_lse=True)
    assert not out[:, :, 32:48].any()
    assert (lse[:, :, 32:48] == float("-inf")).all()
    dense = rainfusion.attention(q, k, v, sparsity=0.0, backend="triton")
    rows = [i for i in range(96) if i // 16 != 2]
    torch.testing.assert_close(out[:, :, rows], dense[:, :, rows], rtol=1e-4, atol=1e-5)


def test_interpreted_kernels_are_never_chosen_automatically(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = rainfusion.plan(problem(), LAYOUT, TopK(0.3))
    if DEVICE == "cpu":
        assert rainfusion.choose(plan, like=tensors()[0]).candidate.backend.name != "triton"
    for interprets, preference in ((True, -1), (False, 100)):
        monkeypatch.setattr(hardware, "interprets", lambda interprets=interprets: interprets)
        assert host().backend("triton").preference(plan, Device("cuda", 0)) == preference


def test_without_a_device_it_says_what_is_missing() -> None:
    code = "import rainfusion; print([d for d in rainfusion.devices() if d.backend == 'triton'])"
    environ = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "0"}
    said = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=True).stdout
    assert "finds no CUDA device" in said
    assert "TRITON_INTERPRET=1" in said


# A few cases for every part; the whole kit takes minutes in the interpreter and is recorded in hw_matrix/results.
CASES = (
    "video-bf16 or text_at_the_start-f16 or summary_of_ragged_blocks-f32 or exact_ties-f32 or mass_with_floor-bf16 "
    "or lengths_and_summary-f32 or empty_rows-bf16 or two_sinks-f16"
)
CONTRACT = "test_contract and not every_claimed_shape and not beyond and not what_is_not_claimed"


@pytest.mark.kit
@pytest.mark.slow
def test_the_kit_passes() -> None:
    here = {"TRITON_INTERPRET": "0" if torch.cuda.is_available() else "1"}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:benchmark",  # where it is installed, it warns of the workers that this test may run on
        "-p",
        "rainfusion.testing.pytest_plugin",
        "--pyargs",
        "rainfusion.testing",
    ]
    command += ["--rainfusion-backend=triton", f"--rainfusion-device={DEVICE}", "-k", f"{CASES} or ({CONTRACT})"]
    done = subprocess.run(command, env={**os.environ, **here}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]


# -- compiling for devices that are not here ------------------------------------------------------------

# An H100 gives a program 227 KiB, an A100 163, an RTX 4090 99, an MI300X 64. Beyond that, a smaller setting takes over.
SHARED = {"cuda 80": 163, "cuda 89": 99, "cuda 90": 227, "cuda 100": 227, "hip gfx942": 64}


@pytest.mark.slow
@pytest.mark.parametrize("target", SHARED)
def test_kernels_compile_for(target: str) -> None:
    script = Path(__file__).parent / "compile_only.py"
    environ = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONWARNINGS": "error"}
    command = [sys.executable, str(script), *target.split()]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    kernels = dict(line.split(" shared=") for line in done.stdout.splitlines())
    attend = "launch._attend" if target == "cuda 90" else "attend_blocks._attend"
    assert {attend, "fold_blocks._fold", "score_blocks._score", "select_blocks._select_row"} <= {*kernels}
    half = next(line for line in done.stdout.splitlines() if line.startswith(attend))  # the first is bfloat16
    others = [line for line in done.stdout.splitlines() if "attend" not in line]
    assert all(int(line.partition("=")[2]) <= SHARED[target] * 1024 for line in (half, *others))


# -- what it costs ---------------------------------------------------------------------------------------


def test_short_sequences_do_not_pay_and_long_ones_do() -> None:
    def speedup(*grid: int) -> float:
        length = grid[0] * grid[1] * grid[2]
        bf16 = AttentionProblem(1, 12, length, length, 128, "bfloat16")
        estimate = cost.speedup(rainfusion.plan(bf16, TokenLayout(grid, sink=None), TopK(0.8)), "sm_90")
        assert estimate is not None
        return estimate

    assert speedup(4, 16, 16) < 1
    assert 4 < speedup(21, 45, 80) < 5.5
    assert speedup(4, 16, 16) < speedup(8, 32, 32) < speedup(21, 45, 80)


@pytest.mark.parametrize(("block", "known"), [(128, True), (64, False)])
def test_attention_in_8_bits_is_estimated_where_the_kernel_takes_it(block: int, known: bool) -> None:
    problem = AttentionProblem(1, 40, 75600, 75600, 128, "bfloat16")
    layout = TokenLayout((21, 45, 80), block=block, sink=None)
    exact, rounded = (
        cost.speedup(rainfusion.plan(problem, layout, TopK(0.8), precision=precision), "sm_90")
        for precision in (None, "int8")
    )
    assert (rounded is not None) is known
    assert rounded is None or exact is None or exact < rounded < 1.5 * exact


@pytest.mark.parametrize("settings", [{"dtype": "float32"}, {"head_dim": 80}], ids=str)
def test_no_estimate_without_a_measurement(settings: dict[str, Any]) -> None:
    plan = rainfusion.plan(problem(**{"dtype": "bfloat16", "head_dim": 128, **settings}), TokenLayout(GRID), TopK(0.3))
    assert cost.speedup(plan, "sm_90") is None
    assert cost.speedup(plan, "gfx942") is None


def test_attention_warns_where_skipping_does_not_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = host().backend("torch")
    monkeypatch.setattr(backend, "speedup", lambda plan, device: 0.4, raising=False)
    rainfusion.cache.clear()
    q, k, v = (x.cpu() for x in tensors())
    for _ in range(2):  # every call says so; Python's filters decide how often that is shown
        with pytest.warns(SpeedWarning, match=r"does not pay .* 2\.5 times as long as dense attention over 96"):
            rainfusion.attention(q, k, v, grid=GRID, block=16, sparsity=0.35, backend="torch")
    rainfusion.cache.clear()


def test_choosing_says_the_estimate() -> None:
    plan, backend = rainfusion.plan(problem(), LAYOUT, TopK(0.3)), host().backend("torch")
    for speedup, said in ((None, "the only one that can"), (0.4, "; estimated 0.4 times as fast as dense attention")):
        able = [Candidate(backend, Device("cpu"), 10, speedup)]
        assert choose(plan, able, [], None, lambda plan, able: None).why.endswith(said)


def test_printing_says_which_kernel_attends() -> None:
    plan = rainfusion.plan(problem(), LAYOUT, TopK(0.3))
    assert "plain kernel" in str(rainfusion.lower(plan, device=DEVICE, backend="triton"))


# -- tuning ----------------------------------------------------------------------------------------------


def test_tuning_only_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not tuning.is_requested()
    monkeypatch.setenv("RAINFUSION_TRITON_AUTOTUNE", "1")
    assert tuning.is_requested()


def attend_with(configs: list[Any], **settings: Any) -> AttentionKernel:
    return AttentionKernel(torch.device(DEVICE), None, configs, "ieee", **settings)


def test_settings_that_do_not_fit_are_dropped() -> None:
    tried = []

    def launch(config: Any) -> None:
        tried.append(config)
        if config.rows == 128:
            raise OutOfResources(300, 227, "shared memory")

    attend = attend_with([*CANDIDATES[:2], CANDIDATES[-1]])
    attend._attend_plainly(launch)
    assert tried == [*CANDIDATES[:2], CANDIDATES[-1]]
    attend._attend_plainly(launch)
    assert tried[3:] == [CANDIDATES[-1]]
    with pytest.raises(OutOfResources):
        attend_with([CANDIDATES[0]])._attend_plainly(launch)


def test_tuning_happens_once_and_keeps_what_there_was_if_nothing_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(tuning, "fastest_first", lambda candidates, launch: asked.append([*candidates]) or [])
    attend = attend_with([CANDIDATES[-1]], is_tuned=False)
    for _ in range(2):
        attend._attend_plainly(lambda config: None)
    assert len(asked) == 1
    assert attend.configs == [CANDIDATES[-1]]


def test_a_triton_that_does_not_compile_the_hopper_kernel_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attend_module, "_refused", set())
    monkeypatch.setattr(AttentionKernel, "_attend_plainly", lambda self, launch: None)
    broken = SimpleNamespace(attend_hopper=lambda *_: broken.renamed_since)
    first, second = (replace(attend_with([CANDIDATES[0]]), hopper=broken) for _ in range(2))
    assert str(first) == "Hopper kernel"
    with pytest.warns(RainfusionWarning, match=r"does not compile the Hopper kernel .* slower.* 3\.6"):
        first(SimpleNamespace(quantised=None), None, None)  # type: ignore[arg-type]
    second(SimpleNamespace(quantised=None), None, None)  # type: ignore[arg-type]  # warnings are errors here
    assert str(second) == "plain kernel"
    assert str(replace(second, configs=[])) == "definitions"


@pytest.mark.parametrize("settings", [{}, {"omitted": "summary", "return_lse": True}, {"rotate": True}], ids=str)
def test_a_triton_that_does_not_compile_it_attends_in_8_bits_by_definition(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of it runs but for the kernel itself: the passes that round, what is made on the way, the way out."""
    broken = SimpleNamespace(attend_hopper=lambda *_: broken.renamed_since)
    monkeypatch.setattr(attend_module, "_refused", set())
    monkeypatch.setattr(attend_module, "_hopper", lambda: broken)
    monkeypatch.setattr(TritonBackend, "_is_hopper", staticmethod(lambda device: True))
    q, k, v = (torch.randn(1, 2, 300, 64, generator=torch.Generator().manual_seed(seed)) for seed in range(3))
    arguments: dict[str, Any] = {"sparsity": 0.4, "sink": None, "precision": "int8", **settings}
    rainfusion.cache.clear()
    with pytest.warns(RainfusionWarning, match="their definitions take over"):
        found = rainfusion.attention(q, k, v, backend="triton", **arguments)
    again = rainfusion.attention(q, k, v, backend="triton", **arguments)
    rainfusion.cache.clear()
    with pytest.warns(rainfusion.SpeedWarning, match="no kernels of 8 bits"):  # lowered anew, it is known beforehand
        rainfusion.attention(q, k, v, backend="triton", **arguments)
    with pytest.warns(rainfusion.SpeedWarning):
        defined = rainfusion.attention(q, k, v, backend="torch", **arguments)
    rainfusion.cache.clear()
    torch.testing.assert_close(found, defined, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(again, found)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"block": 64}, "scales of other blocks"),
        ({"centred": False}, "not rounded around their mean"),
        ({"rotated": True}, "queries and keys are rounded differently"),
        ({"format": "e4m3"}, "queries and keys are rounded differently"),
        ({"lengths": "%kv_lengths"}, "rounded in other blocks"),
    ],
    ids=str,
)
def test_what_is_rounded_otherwise_is_not_taken(changes: dict[str, Any], reason: str) -> None:
    problem = AttentionProblem(1, 2, 300, 300, 64, "bfloat16")
    plan = rainfusion.plan(problem, policy=rainfusion.Fixed(), precision="int8")
    keys = next(op for op in plan.ops if isinstance(op, Quantise) and op.x == "%k")
    other = replace(plan, ops=tuple(replace(op, **changes) if op is keys else op for op in plan.ops))
    segment = Segment(other.ops, ("%q", "%k", "%v", "%mask"), ("%out",))
    with pytest.raises(LoweringError, match=reason):
        EightBits.of(Stages.of(segment), segment, wants_lse=False)
    whole = Segment(plan.ops, segment.inputs, segment.outputs)
    assert EightBits.of(Stages.of(whole), whole, wants_lse=False) is not None


def test_large_contiguous_tensors_are_read_where_they_lie() -> None:
    attend = attend_with([CANDIDATES[0]])
    x = torch.empty(1, 40, 75600, 128, device="meta", dtype=torch.bfloat16)
    assert not attend.wants_copy(x, None)
    assert attend.wants_copy(torch.empty(600, 2**24, device="meta").expand(2, 2, 600, 2**24)[..., :128], None)
    assert attend.wants_copy(x, torch.empty(75600, device="meta"))
    lengths = torch.ones(1, dtype=torch.int32)
    assert not attend.wants_copy(x, None, lengths)
    hopper = replace(attend, hopper=SimpleNamespace(can_fetch=lambda x: True))
    assert not hopper.wants_copy(x, None)
    assert hopper.wants_copy(x, None, lengths), "the copy engine reads whole blocks, so padding must be zeros"


def test_views_with_another_sign_are_read_as_they_are() -> None:
    q, k, v = tensors()
    flipped = torch.complex(torch.zeros_like(q), -q).conj().imag
    assert flipped.is_neg()
    arguments: dict[str, Any] = {"grid": GRID, "block": 16, "sparsity": 0.3, "backend": "triton"}
    assert torch.equal(rainfusion.attention(flipped, k, v, **arguments), rainfusion.attention(q, k, v, **arguments))


def test_tuning_takes_the_fastest_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    def launch(config: Any) -> None:
        if config.rows == 128:
            raise OutOfResources(300, 227, "shared memory")

    def seconds(run: Callable[[], None], **_: Any) -> float:
        run()
        return next(times)

    times = iter([3.0, 1.0, 2.0, 4.0])
    monkeypatch.setattr(tuning, "do_bench", seconds)
    fitting = [config for config in CANDIDATES if config.rows == 64]
    assert tuning.fastest_first(CANDIDATES, launch) == [fitting[i] for i in (1, 2, 0, 3)]
