"""One attention problem run dense, sparse, and sparse with summaries, on one backend: how fast, how close."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from rainfusion import dispatch, functional
from rainfusion.core.backend import Device
from rainfusion.core.choice import Choice, Refusal
from rainfusion.core.errors import NoBackendError
from rainfusion.core.executable import Executable
from rainfusion.core.layout import TokenLayout
from rainfusion.core.plan import Plan
from rainfusion.core.planner import plan
from rainfusion.core.policies import Policy, TopK
from rainfusion.core.problem import AttentionProblem
from rainfusion.demo import metrics

VARIANTS = {"drop": "dropped", "summary": "summarised"}
_LEAST_ROUNDS, _MOST_ROUNDS = 2, 50


@dataclass(frozen=True)
class Variant:
    """One way to treat the blocks that are not kept, against dense attention on the same backend.

    Attributes:
        seconds: median of the timed runs.
        time_ratio: seconds over those of dense attention; below 1 is faster.
        relative_l1, cosine: of the output against the dense one, over all tokens and heads.
    """

    seconds: float
    time_ratio: float
    relative_l1: float
    cosine: float


@dataclass(frozen=True)
class Comparison:
    """What `compare` found. The arrays are for the picture, ``[heads, ...]`` or ``[tokens]``.

    Attributes:
        precision, rotate: of sparse attention, as in `rainfusion.plan`; is_emulated: it ran by its definition.
    """

    plan: Plan
    policy: Policy
    backend: str
    device: Device
    why: str
    refusals: tuple[Refusal, ...]
    density: float
    rounds: int
    dense_seconds: float
    variants: dict[str, Variant]
    recall: metrics.Recall
    mask: np.ndarray = field(repr=False)
    mass: np.ndarray = field(repr=False)
    errors: dict[str, np.ndarray] = field(repr=False)
    precision: str | None = None
    rotate: bool = False
    is_emulated: bool = False


@dataclass(frozen=True)
class Setting:
    """What will run where: a sparse plan, the policy and precision it was planned by, and the backend chosen for it."""

    plan: Plan
    policy: Policy
    choice: Choice
    precision: str | None = None
    rotate: bool = False


def settle(
    problem: AttentionProblem,
    layout: TokenLayout,
    policy: Policy,
    *,
    backend: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    precision: str | None = None,
    rotate: bool = False,
) -> Setting:
    """Choose backend, device and dtype for a problem, whatever dtype it has.

    Args:
        backend, device: as in `rainfusion.lower`.
        dtype: default float32 on a CPU, bfloat16 elsewhere.
        precision, rotate: as in `rainfusion.plan`, of sparse attention; dense attention stays in `dtype`.

    Raises:
        RainfusionError: as `rainfusion.plan` and `rainfusion.choose`.
    """
    settings, failures = [], []
    for name in (dtype,) if dtype else ("float32", "bfloat16"):
        planned = plan(replace(problem, dtype=name), layout, policy, precision=precision, rotate=rotate)
        try:
            chosen = dispatch.choose(planned, backend=backend, device=device)
            settings.append(Setting(planned, policy, chosen, precision, rotate))
        except NoBackendError as error:
            failures.append(error)
    if not settings:
        raise failures[0]
    return max(settings, key=_suits)


def _suits(setting: Setting) -> tuple[int, bool]:
    """Preferred backends first; then single precision on a CPU, half precision elsewhere."""
    candidate = setting.choice.candidate
    return candidate.preference, (candidate.device.type == "cpu") == (setting.plan.problem.dtype == "float32")


def compare(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    setting: Setting,
    *,
    rounds: int | None = None,
    seconds: float = 15.0,
    seed: int = 0,
    progress: Callable[[str], None] = lambda step: None,
) -> Comparison:
    """Run dense and sparse attention and measure both.

    Args:
        q, k, v: float32 ``[1, heads, tokens, head_dim]`` on the host.
        setting: from `settle`.
        rounds: timed runs of each variant, interleaved; default: as many as fit into `seconds`, 2 to 50.
        seed: of the random blocks that the recall is compared with.
        progress: told what is being done.

    Raises:
        RainfusionError: as `rainfusion.lower`.
    """
    sparse, policy, choice = setting.plan, setting.policy, setting.choice
    layout = sparse.layout
    backend, device = choice.candidate.backend, choice.candidate.device
    tensors = tuple(backend.from_host(x, device, sparse.problem.dtype) for x in (q, k, v))

    def executable(planned: Plan) -> Executable:
        return functional.lower(planned, device=str(device), backend=backend.name)

    def lowered(planned: Plan) -> Callable[[], Any]:
        run = executable(planned)
        return lambda: run(*tensors)

    in_8_bits: dict[str, Any] = {"precision": setting.precision, "rotate": setting.rotate}
    masked = plan(sparse.problem, layout, policy, returns=("%out", "%mask"))
    runs = {
        "dense": lowered(plan(sparse.problem, layout, TopK(0.0))),
        "drop": lowered(sparse),
        "summary": lowered(plan(sparse.problem, layout, policy, omitted="summary", **in_8_bits)),
    }
    progress("Warming up")
    _, kept = lowered(masked)()
    started = time.perf_counter()
    outs = {name: backend.to_host(run()).astype(np.float32) for name, run in runs.items()}
    warm_up = time.perf_counter() - started
    rounds = rounds or min(max(int(seconds / warm_up), _LEAST_ROUNDS), _MOST_ROUNDS)
    progress(f"Timing dense, dropped and summarised, {rounds} rounds")
    times = _interleaved(runs, rounds, lambda: backend.synchronize(device))
    progress("Measuring attention recall")
    mask = backend.to_host(kept.blocks)
    recall, mass = metrics.attention_recall(tensors[0], tensors[1], layout, mask, sparse.problem.scale, seed)
    return Comparison(
        plan=sparse,
        policy=policy,
        backend=backend.name,
        device=device,
        why=choice.why,
        refusals=choice.refusals,
        density=float(mask.mean()),
        rounds=rounds,
        dense_seconds=times["dense"],
        variants={name: _variant(name, times, outs) for name in VARIANTS},
        recall=recall,
        mask=mask[0],
        mass=mass[0],
        precision=setting.precision,
        rotate=setting.rotate,
        is_emulated=dispatch.is_emulated(executable(sparse)),
        errors={name: metrics.token_error(outs[name], outs["dense"]) for name in VARIANTS},
    )


def _interleaved(runs: dict[str, Callable[[], Any]], rounds: int, synchronize: Callable[[], None]) -> dict[str, float]:
    """Median seconds of each, run in turns so that a slow moment of the machine falls on all alike."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            synchronize()
            started = time.perf_counter()
            run()
            synchronize()
            times[name].append(time.perf_counter() - started)
    return {name: statistics.median(taken) for name, taken in times.items()}


def _variant(name: str, times: dict[str, float], outs: dict[str, np.ndarray]) -> Variant:
    return Variant(
        seconds=times[name],
        time_ratio=times[name] / times["dense"],
        relative_l1=metrics.relative_l1(outs[name], outs["dense"]),
        cosine=metrics.cosine(outs[name], outs["dense"]),
    )
