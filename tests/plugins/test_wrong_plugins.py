"""One that is wrong costs nobody else a call: tables of wrong plugins, each held against an ordinary call."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import count, repeat
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import rainfusion
from rainfusion import Backend, BackendSpec, Capabilities, Device, Kernel, ops
from rainfusion.core.choice import Candidate
from rainfusion.core.errors import BackendError, RainfusionWarning
from rainfusion.plugins import answers
from rainfusion.plugins.manager import host

X = np.random.default_rng(3).standard_normal((1, 2, 200, 16)).astype(np.float32)
SLEEP = 20  # seconds; far beyond what a call waits


class Stop(BaseException):
    """An exception that is no Exception."""


class Mute(Exception):
    """An exception that cannot be written."""

    def __str__(self) -> str:
        raise KeyboardInterrupt


class Odd:
    """A value whose every use fails."""

    def __getattribute__(self, name: str) -> Any:
        raise Stop(name)

    def __repr__(self) -> str:
        raise Stop

    def __eq__(self, other: object) -> bool:
        raise Stop

    __hash__ = None  # type: ignore[assignment]


def raises(error: BaseException | type[BaseException]) -> Callable[..., Any]:
    def fails(*args: Any) -> Any:
        raise error

    return fails


def gives(value: Any) -> Callable[..., Any]:
    return lambda *args: value


def sleeps(*args: Any) -> None:
    time.sleep(SLEEP)


class Base(Backend):
    """Owns NumPy arrays and is preferred above all."""

    name = "wrong"

    def devices(self) -> Sequence[Device]:
        return [Device("cpu")]

    def device_of(self, array: Any) -> Device | None:
        return Device("cpu") if type(array) is np.ndarray else None

    def capabilities(self, device: Device) -> Capabilities:
        return Capabilities()

    def preference(self, plan: rainfusion.Plan, device: Device) -> int:
        return 1000


FAILS = {
    "OSError": raises(OSError("the driver\nwent away")),
    "SystemExit": raises(SystemExit(3)),
    "KeyboardInterrupt": raises(KeyboardInterrupt),
    "GeneratorExit": raises(GeneratorExit),
    "BaseException": raises(Stop("here")),
    "mute": raises(Mute),
    "odd": gives(Odd()),
    "sleeps": sleeps,
}
# Method, what it does instead: found out before the backend is chosen.
ASKED: dict[str, tuple[str, Callable[..., Any]]] = {
    **{f"{method} {name}": (method, does) for name, does in FAILS.items() for method in ("device_of", "preference")},
    **{
        f"{method} {name}": (method, FAILS[name]) for method in ("speedup", "objections") for name in ("OSError", "odd")
    },
    "capabilities junk": ("capabilities", gives(None)),
    "device_of text": ("device_of", gives("cpu")),
    "device_of number": ("device_of", gives(7)),
    "device of odd type": ("device_of", gives(Device(5))),  # type: ignore[arg-type]
    "device of control characters": ("device_of", gives(Device("\x1b[31mcpu"))),
    "preference text": ("preference", gives("high")),
    "preference None": ("preference", gives(None)),
    "preference nan": ("preference", gives(float("nan"))),
    "preference inf": ("preference", gives(float("inf"))),
    "preference True": ("preference", gives(True)),
    "preference array": ("preference", gives(np.ones(3))),
    "preference complex": ("preference", gives(1j)),
    "speedup text": ("speedup", gives("fast")),
    "speedup zero": ("speedup", gives(0)),
    "speedup negative": ("speedup", gives(-2.0)),
    "speedup nan": ("speedup", gives(float("nan"))),
    "speedup array": ("speedup", gives(np.ones(2))),
    "objections text": ("objections", gives("no")),
    "objections None": ("objections", gives(None)),
    "objections numbers": ("objections", gives([1, 2])),
    "objections without end": ("objections", lambda *args: repeat("no")),
}


@pytest.fixture
def wrong(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Announce `Base` with other methods in this process, for one test."""
    made = []

    def announce(**methods: Any) -> None:
        module = ModuleType("a_wrong_backend")
        module.Wrong = type("Wrong", (Base,), methods)  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, module.__name__, module)
        rainfusion.register(BackendSpec("wrong", "a_wrong_backend:Wrong"))
        made.append("wrong")

    yield announce
    for name in made:
        rainfusion.unregister(name)


@pytest.fixture(scope="module")
def expected() -> np.ndarray:
    return rainfusion.attention(X, X, X, sparsity=0.5, backend="reference")


def call(**asked: Any) -> np.ndarray:
    return rainfusion.attention(X, X, X, sparsity=0.5, **asked)


def listed(name: str = "wrong") -> str:
    """What `rainfusion.devices` says is wrong with a backend."""
    rows = [row for row in rainfusion.devices(isolate=False) if row.backend == name and row.status != "ready"]
    return "\n".join(f"{row.stage}: {row.reason}" for row in rows)


@pytest.mark.filterwarnings("ignore::rainfusion.core.errors.RainfusionWarning")
@pytest.mark.parametrize("kind", ASKED)
def test_a_backend_that_answers_wrongly_is_passed_over(
    wrong: Any, kind: str, expected: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    method, does = ASKED[kind]
    if does is sleeps:
        monkeypatch.setattr(time, "sleep", lambda _, wait=time.sleep: wait(2))
        monkeypatch.setattr(answers, "PATIENCE", 0.1)
    wrong(**{method: does})
    assert call() == pytest.approx(expected, abs=1e-5)
    choice = rainfusion.choose(rainfusion.plan(rainfusion.AttentionProblem.from_tensors(X, X, X)), like=X)
    (refusal,) = (refusal for refusal in choice.refusals if refusal.backend == "wrong")
    assert refusal.reason.isprintable()
    assert refusal.stage in ("load", "probe", "reject")
    if does is not sleeps:
        assert "choose:" in listed()
    if does not in (sleeps, FAILS["KeyboardInterrupt"]):  # in the caller's thread that may be the user's
        with pytest.raises(BackendError, match="wrong"):
            call(backend="wrong")


def test_one_that_is_late_is_taken_up_when_it_answers(wrong: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "PATIENCE", 0.05)

    def slow(self: Any, array: Any) -> Device:
        if not ready:
            time.sleep(0.5)
        ready.append(True)
        return Device("cpu")

    ready: list[bool] = []
    wrong(device_of=slow)
    with pytest.warns(RainfusionWarning, match=r"does not wait for wrong \(no answer within 0.05 s\)"):
        call()
    time.sleep(0.7)
    monkeypatch.setattr(answers, "PATIENCE", 30)
    plan = rainfusion.plan(rainfusion.AttentionProblem.from_tensors(X, X, X), policy=rainfusion.TopK(0.5))
    assert rainfusion.choose(plan, like=X).candidate.backend.name == "wrong"


def kernel(run: Callable[..., Any]) -> Callable[..., Any]:
    """`Backend.kernels` with one kernel for attention, which does `run(values, out)`, where `out` is right."""

    def build(segment: Any, plan: Any, device: Any) -> Any:
        (op,) = segment.ops
        return lambda values: run(values, op.evaluate(values), op)

    return lambda *args: [Kernel(frozenset({ops.Attend}), build)]


def writes(values: Any, out: Any, op: Any) -> Any:
    values["%q"][...] = 0
    return out


KERNELS: dict[str, dict[str, Callable[..., Any]]] = {
    **{f"run {n}": {"kernels": kernel(raises(e))} for n, e in (("raises", ValueError("!")), ("exits", SystemExit(3)))},
    "run BaseException": {"kernels": kernel(raises(Stop("!")))},
    "run None": {"kernels": kernel(gives(None))},
    "run list": {"kernels": kernel(gives([1]))},
    "run nothing": {"kernels": kernel(gives({}))},
    "run text": {"kernels": kernel(lambda v, out, op: {op.out: "x"})},
    "run number": {"kernels": kernel(lambda v, out, op: {op.out: 1.0})},
    "run shape": {"kernels": kernel(lambda v, out, op: {op.out: out[op.out][:, :, 1:]})},
    "run one more axis": {"kernels": kernel(lambda v, out, op: {op.out: out[op.out][None]})},
    "run integers": {"kernels": kernel(lambda v, out, op: {op.out: out[op.out].astype(int)})},
    "run complex": {"kernels": kernel(lambda v, out, op: {op.out: out[op.out] * 1j})},
    "run objects": {"kernels": kernel(lambda v, out, op: {op.out: out[op.out].astype(object)})},
    "run writes": {"kernels": kernel(writes)},
    "from_native text": {"from_native": gives("out")},
    "from_native None": {"from_native": gives(None)},
    "from_native dtype": {"from_native": lambda self, x, like, dtype: x.astype(np.float64)},
    "from_native shape": {"from_native": lambda self, x, like, dtype: x[..., 1:].astype(dtype)},
    "from_native list": {"from_native": lambda self, x, like, dtype: x.tolist()},
    "from_native raises": {"from_native": raises(OSError("!"))},
    "to_native raises": {"to_native": raises(OSError("!"))},
    "to_native text": {"to_native": gives("q")},
    "running raises": {"running": raises(OSError("!"))},
    "running None": {"running": gives(None)},
    "check_inputs raises": {"check_inputs": raises(OSError("!"))},
    "from_host raises": {"from_host": raises(OSError("!"))},
    "kernels None": {"kernels": gives(None)},
    "kernels text": {"kernels": gives("attend")},
    "kernels of texts": {"kernels": gives(["attend"])},
    "kernels without end": {"kernels": lambda *args: count()},
    "kernels raises": {"kernels": raises(OSError("!"))},
    "kernels exits": {"kernels": raises(SystemExit(0))},
    "understands text": {"kernels": gives([Kernel("attend", print)])},  # type: ignore[arg-type]
    "understands None": {"kernels": gives([Kernel(None, print)])},  # type: ignore[arg-type]
    "build no function": {"kernels": gives([Kernel(frozenset({ops.Attend}), 3)])},  # type: ignore[arg-type]
    "build gives None": {"kernels": gives([Kernel(frozenset({ops.Attend}), gives(None))])},
    "build raises": {"kernels": gives([Kernel(frozenset({ops.Attend}), raises(OSError("!")))])},
    "build BaseException": {"kernels": gives([Kernel(frozenset({ops.Attend}), raises(Stop("!")))])},
}


@pytest.mark.parametrize("kind", KERNELS)
def test_a_kernel_that_breaks_its_contract_is_named(wrong: Any, kind: str, expected: np.ndarray) -> None:
    wrong(**KERNELS[kind])
    q, grid = X.copy(), {"grid": (2, 10, 10), "sparsity": 0.5, "sink": None, "block": 32}
    with pytest.raises(BackendError, match="backend 'wrong'"):
        rainfusion.attention(q, X, X, backend="wrong", **grid)
    assert call(backend="reference") == pytest.approx(expected)
    assert listed()


LOWERING = [kind for kind in KERNELS if kind.startswith(("kernels", "understands", "build"))]


@pytest.mark.parametrize("kind", LOWERING)
def test_an_automatic_choice_passes_over_what_cannot_be_lowered(wrong: Any, kind: str, expected: np.ndarray) -> None:
    wrong(**KERNELS[kind])
    with pytest.warns(RainfusionWarning, match="wrong on cpu is passed over: .*'wrong'"):
        assert call() == pytest.approx(expected, abs=1e-5)
    assert call() == pytest.approx(expected, abs=1e-5)
    plan = rainfusion.plan(rainfusion.AttentionProblem.from_tensors(X, X, X), policy=rainfusion.TopK(0.5))
    (refusal,) = (refusal for refusal in rainfusion.choose(plan, like=X).refusals if refusal.backend == "wrong")
    assert refusal.stage == "lower"


def test_a_kernel_for_nothing_is_never_asked(wrong: Any, expected: np.ndarray) -> None:
    wrong(kernels=gives([Kernel(frozenset(), raises(Stop))]))
    assert call() == pytest.approx(expected, abs=1e-5)


class Hook:
    """A plugin with a say in the choice."""

    def __init__(self, say: Callable[..., Any]) -> None:
        self.say = say

    @rainfusion.hookimpl
    def rainfusion_choose_backend(self, plan: rainfusion.Plan, candidates: Sequence[Candidate]) -> Any:
        return self.say(candidates)


def empties(candidates: Any) -> None:
    candidates.clear()


def forges(candidates: Sequence[Candidate]) -> Candidate:
    return Candidate(Base(), Device("cpu"), 7, 0.0)


HOOKS = {**FAILS, "empties": empties, "forges": forges, "text": gives("torch"), "array": gives(np.ones(3))}


@pytest.mark.parametrize("kind", HOOKS)
def test_a_hook_that_is_wrong_is_named_and_passed_over(
    kind: str, expected: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "sleeps":
        monkeypatch.setattr(time, "sleep", lambda _, wait=time.sleep: wait(2))
        monkeypatch.setattr(answers, "PATIENCE", 0.1)
    plugin = Hook(HOOKS[kind])
    host().manager.register(plugin, name=f"hook {kind}")
    rainfusion.cache.clear()
    try:
        with pytest.warns(RainfusionWarning, match=f"rainfusion_choose_backend of hook {kind}"):
            assert call() == pytest.approx(expected, abs=1e-5)
        assert listed(f"hook {kind}").startswith("choose: rainfusion_choose_backend")
    finally:
        host().manager.unregister(plugin)
        rainfusion.cache.clear()
