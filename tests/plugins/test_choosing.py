"""Law 6: an explicit choice never falls back, an automatic one explains itself."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import rainfusion
from rainfusion import Backend, BackendSpec, Capabilities, Device
from rainfusion.core.choice import Candidate
from rainfusion.core.errors import (
    BackendError,
    BackendUnavailableError,
    DuplicateBackendError,
    NoBackendError,
    RainfusionWarning,
    UnknownBackendError,
)
from rainfusion.plugins.manager import host

X = np.random.default_rng(0).standard_normal((1, 2, 300, 16)).astype(np.float32)
PLAN = rainfusion.plan(rainfusion.AttentionProblem.from_tensors(X, X, X), policy=rainfusion.TopK(0.5))


class Picky(Backend):
    """Owns NumPy arrays, claims little, is preferred above all, and says when it ran."""

    name = "picky"
    claims = Capabilities(dtypes=frozenset({"float32"}), head_dims=frozenset({16}), gqa=False, lse=False)
    present = (Device("cpu"),)

    def devices(self) -> Sequence[Device]:
        return self.present

    def device_of(self, array: Any) -> Device | None:
        return Device("cpu") if isinstance(array, np.ndarray) else None

    def capabilities(self, device: Device) -> Capabilities:
        return self.claims

    def preference(self, plan: rainfusion.Plan, device: Device) -> int:
        return 1000


class Absent(Picky):
    name = "absent"
    present = ()

    def device_of(self, array: Any) -> Device | None:
        return None


class Crashing(Picky):
    name = "crashing"

    def device_of(self, array: Any) -> Device | None:
        raise OSError("the driver went away")


@pytest.fixture(autouse=True)
def announced(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The backends above, announced for one test."""
    module = ModuleType("backends_of_a_test")
    module.__dict__.update(Picky=Picky, Absent=Absent, Crashing=Crashing)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.delenv("RAINFUSION_BACKEND", raising=False)
    classes = (Picky, Absent, Crashing)
    for each in classes:
        rainfusion.register(BackendSpec(each.name, f"backends_of_a_test:{each.__name__}"))
    yield
    for each in classes:
        rainfusion.unregister(each.name)


def chosen(plan: rainfusion.Plan = PLAN, like: Any = X, **asked: Any) -> str:
    return rainfusion.choose(plan, like=like, **asked).candidate.backend.name


def plan_of(x: np.ndarray, **settings: Any) -> rainfusion.Plan:
    return rainfusion.plan(rainfusion.AttentionProblem.from_tensors(x, x, x), policy=rainfusion.TopK(0.5), **settings)


def test_the_most_preferred_that_can_is_taken_and_says_why() -> None:
    choice = rainfusion.choose(PLAN, like=X)
    assert choice.candidate.backend.name == "picky"
    assert choice.why.startswith("picky on cpu: highest preference (1000), before torch on cpu (10)")


def test_one_that_cannot_is_passed_over_with_every_reason() -> None:
    choice = rainfusion.choose(plan_of(X.astype(np.float64), returns=("%out", "%lse")), like=X.astype(np.float64))
    assert choice.candidate.backend.name != "picky"
    (refusal,) = (r for r in choice.refusals if r.backend == "picky")
    assert refusal.stage == "reject"
    assert refusal.reason == "no dtype float64 (it has float32); no returning the log-sum-exp"


def test_a_backend_may_object_for_reasons_that_no_capability_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Picky, "objections", lambda self, plan, device: ["its memory is full"])
    choice = rainfusion.choose(PLAN, like=X)
    assert choice.candidate.backend.name != "picky"
    assert [r.reason for r in choice.refusals if r.backend == "picky"] == ["its memory is full"]


def test_one_that_crashes_is_passed_over_with_its_words() -> None:
    (refusal,) = (r for r in rainfusion.choose(PLAN, like=X).refusals if r.backend == "crashing")
    assert (refusal.stage, refusal.reason) == ("probe", "OSError: the driver went away")


@pytest.mark.parametrize("by", ["argument", "use", "environment"])
def test_an_explicit_choice_never_falls_back(by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    doubles, asked = X.astype(np.float64), {"backend": "picky"} if by == "argument" else {}
    with ExitStack() as stack:
        if by == "use":
            stack.enter_context(rainfusion.use("picky"))
        elif by == "environment":
            monkeypatch.setenv("RAINFUSION_BACKEND", "picky")
        assert chosen(**asked) == "picky"
        with pytest.raises(
            NoBackendError, match=r"picky.* cannot run this plan:\n.*\n  picky +reject +no dtype float64"
        ):
            rainfusion.attention(doubles, doubles, doubles, sparsity=0.5, **asked)


def test_argument_goes_before_context_before_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAINFUSION_BACKEND", "torch")
    assert chosen() == "torch"
    with rainfusion.use("picky"):
        assert chosen() == "picky"
        assert chosen(backend="reference") == "reference"
        with rainfusion.use("reference"):
            assert chosen() == "reference"
        assert chosen() == "picky"
    assert chosen() == "torch"


def test_use_ends_with_an_exception_and_stays_in_its_thread() -> None:
    with pytest.raises(KeyError), rainfusion.use("reference"):
        raise KeyError
    assert chosen() == "picky"
    with rainfusion.use("reference"), ThreadPoolExecutor(max_workers=1) as pool:
        assert pool.submit(chosen).result() == "picky"


def test_an_unknown_name_lists_the_known_ones() -> None:
    for ask in (lambda: chosen(backend="nothing"), lambda: rainfusion.use("nothing").__enter__()):
        with pytest.raises(UnknownBackendError, match="'nothing' is not known; choose one of reference, "):
            ask()


def test_one_without_a_device_is_refused_by_name() -> None:
    with pytest.raises(NoBackendError, match=r"absent +reject +has no device"):
        rainfusion.lower(PLAN, backend="absent")


def test_when_none_can_the_error_is_a_table_of_all() -> None:
    with pytest.raises(NoBackendError) as refusal:
        rainfusion.lower(PLAN, device="abacus:7")
    title, heading, *rows = str(refusal.value).splitlines()
    assert title == "no backend can run this plan:"
    assert heading.split() == ["backend", "stage", "reason", "install"]
    table = {row.split()[0]: row for row in rows}
    assert {"reference", "torch", "picky", "absent", "crashing"} <= {*table}
    assert "has no device abacus:7" in table["reference"]


def test_the_table_holds_how_to_install_what_is_missing() -> None:
    rainfusion.register(BackendSpec("needy", "needy:Needy", requires=("no_such_stack",), install="pip install needy"))
    try:
        with pytest.raises(
            NoBackendError, match=r"needy +load +.*needs no_such_stack, not installed.* pip install needy"
        ):
            rainfusion.lower(PLAN, device="abacus")
        with pytest.raises(BackendUnavailableError, match="needs no_such_stack"):
            chosen(backend="needy")
    finally:
        rainfusion.unregister("needy")


def test_registering_twice_and_taking_back_what_was_not_registered_are_errors() -> None:
    with pytest.raises(DuplicateBackendError, match=r"'picky'.*already announced by rainfusion\.register"):
        rainfusion.register(BackendSpec("picky", "elsewhere:Picky"))
    with pytest.raises(DuplicateBackendError, match="'reference'"):
        rainfusion.register(BackendSpec("reference", "elsewhere:Reference"))
    with pytest.raises(BackendError, match="incomplete"):
        rainfusion.register(BackendSpec("x", "no_colon"))
    for name in ("nothing", "reference"):
        with pytest.raises(UnknownBackendError, match=r"was not announced by rainfusion\.register"):
            rainfusion.unregister(name)


@pytest.mark.parametrize(
    ("field", "value", "wanted"),
    [
        ("target", 5, "text, 'package.module:Class'"),
        ("requires", "torch", "a tuple of module names"),
        ("install", None, "text"),
        ("isolate", "no", "True or False"),
        ("revision", 1.5, "a whole number"),
        ("arrays", "torch:cuda", r"a tuple such as \('torch:cuda',\)"),
        ("arrays", (object(),), "a tuple such as"),
        ("api", "1", "a whole number"),
        ("api", True, "a whole number"),
    ],
)
def test_a_spec_of_other_kinds_of_values_is_refused_by_field(field: str, value: Any, wanted: str) -> None:
    with pytest.raises(BackendError, match=f"backend 'x' has {field}=.*; give {wanted}"):
        rainfusion.register(BackendSpec(**{"name": "x", "target": "m:X", field: value}))


@pytest.mark.parametrize("api", [0, 2])
def test_a_backend_of_another_interface_is_not_imported(api: int) -> None:
    rainfusion.register(BackendSpec("other", "backends_of_a_test:Missing", api=api))
    try:
        reason = f"backend 'other' was written for interface {api}; this rainfusion has 1"
        with pytest.raises(BackendUnavailableError, match=reason):
            chosen(backend="other")
        assert reason in [r.reason for r in rainfusion.choose(PLAN, like=X).refusals]
    finally:
        rainfusion.unregister("other")


def test_what_was_taken_back_is_not_called_again() -> None:
    assert rainfusion.attention(X, X, X, sparsity=0.5).shape == X.shape
    rainfusion.unregister("picky")
    try:
        assert chosen() != "picky"
        with pytest.raises(UnknownBackendError):
            chosen(backend="picky")
    finally:
        rainfusion.register(BackendSpec("picky", "backends_of_a_test:Picky"))


class Override:
    """A plugin with a say in the choice."""

    def __init__(self, say: Any) -> None:
        self.say = say

    @rainfusion.hookimpl
    def rainfusion_choose_backend(self, plan: rainfusion.Plan, candidates: Sequence[Candidate]) -> Candidate | None:
        return self.say(candidates)  # type: ignore[no-any-return]


@pytest.fixture
def override() -> Iterator[Any]:
    plugins = []

    def register(say: Any) -> None:
        plugins.append(Override(say))
        host().manager.register(plugins[-1])

    yield register
    for plugin in plugins:
        host().manager.unregister(plugin)


def test_a_plugin_overrides_the_ranking_of_an_automatic_choice_only(override: Any) -> None:
    override(lambda able: next(c for c in able if c.backend.name == "reference"))
    choice = rainfusion.choose(PLAN, like=X)
    assert choice.why == "reference on cpu: chosen by a plugin's rainfusion_choose_backend"
    assert chosen(backend="picky") == "picky"


def test_a_plugin_may_abstain(override: Any) -> None:
    override(lambda able: None)
    assert chosen() == "picky"


@pytest.mark.parametrize(
    "say",
    [lambda able: 1 / 0, lambda able: "torch", lambda able: np.ones(3)],
    ids=["raises", "no candidate", "an array"],
)
def test_a_plugin_that_misbehaves_is_reported_and_passed_over(override: Any, say: Any) -> None:
    override(say)
    with pytest.warns(RainfusionWarning, match="rainfusion_choose_backend"):
        assert chosen() == "picky"


def test_a_plugin_that_fails_does_not_silence_another(override: Any) -> None:
    override(lambda able: next(c for c in able if c.backend.name == "reference"))
    override(lambda able: 1 / 0)
    with pytest.warns(RainfusionWarning, match="ZeroDivisionError"):
        assert chosen() == "reference"
