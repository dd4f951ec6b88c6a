"""Calibrate: measure what skipping blocks costs in every head of a pipeline's models, and solve budgets from it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from rainfusion.core.checks import as_flag, as_instance, as_int, as_share, shown
from rainfusion.core.errors import RainfusionWarning, SparsityWarning
from rainfusion.integrations.calibration import SHARES, Calibration, Checked, ErrorTable, ascending
from rainfusion.integrations.config import AUTO, ConfigError, RainFusionConfig
from rainfusion.integrations.diffusers.apply import Applied, Handle, apply_rainfusion
from rainfusion.integrations.diffusers.identity import digest_of
from rainfusion.integrations.diffusers.replay import Forward, Spread
from rainfusion.integrations.head_budgets import Binding, CalibrationError, HeadBudgets, pair_of, sinks_of
from rainfusion.integrations.measure import Budgeted, HeadErrors, OneLayer
from rainfusion.integrations.progress import Bar
from rainfusion.integrations.schedule import Schedule

Run = Callable[[Any], Any]
_MOST_GRIDS = 64


def calibrate(
    target: Any,
    prompts: Iterable[Any],
    *,
    sparsity: float = 0.8,
    config: RainFusionConfig | None = None,
    shares: Sequence[float] = SHARES,
    run: Run | None = None,
    every: int = 3,
    probes: int = 4,
    sensitivity: bool = True,
    ranks: int = 1,
    progress: bool = True,
    **call: Any,
) -> Calibration:
    """Measure the error of every head at several shares of skipped blocks; budgets for any mean share follow from it.

    The models run dense, so that every layer sees what it sees in a dense run. At a measured step, each attention call
    is made once more for each share. Then the weights of the layers take ``probes * (layers + 1)`` forwards of a model,
    and the check of the budgets ``3 * probes``.

    Args:
        target: a pipeline, a model or several models, as for `apply_rainfusion`.
        prompts: texts, or mappings of the pipeline's arguments; anything where `run` is given. A few that differ
            are enough.
        sparsity: mean share of block pairs to skip, of the budgets that are solved and checked.
        config: block, window, sink, omitted and the like that budgets will be used with; ``sink="auto"`` is None here.
            Calls that it says are dense take no part. Its sparsity is not read, nor head budgets of later steps.
        shares: that are measured, ascending; `sparsity` is added to them. One that cannot be reached beside what
            every row keeps is left out with a warning.
        run: called with each prompt in place of the pipeline: for loops of your own, and for bare models.
        every: denoising steps from one that is measured to the next.
        probes: forwards of every model, spread over the run, that weights and the check are measured with; 0 for
            neither.
        sensitivity: whether layers are weighted by how much of their error reaches the model's output.
        ranks: devices that carry equal work, as for `Calibration.budget`.
        progress: show a bar on stderr.
        call: further arguments of the pipeline, for every prompt.

    Returns:
        A calibration: ``RainFusionConfig(sparsity=calibration)`` takes it, `Calibration.save` keeps it.

    Raises:
        ConfigError: arguments that do not fit each other, or as `apply_rainfusion`.
        CalibrationError: a share or ranks that the model cannot have, or nothing to measure; it says why.

    Warns:
        RainfusionWarning: shares were left out, or the budgets did no better than one share for all heads.
    """
    share = as_share(sparsity, "sparsity", ConfigError, top=False)
    if share == 0:
        raise ConfigError("sparsity=0 skips nothing; give the mean share to skip, such as 0.8")
    tried = ascending(sorted({*ascending(shares), share}))
    counts = {"every": (every, 1), "probes": (probes, 0), "ranks": (ranks, 1)}
    every, probes, ranks = (as_int(value, name, ConfigError, minimum=m) for name, (value, m) in counts.items())
    sensitivity, progress = (
        as_flag(v, n, ConfigError) for n, v in (("sensitivity", sensitivity), ("progress", progress))
    )
    config = RainFusionConfig() if config is None else as_instance(config, RainFusionConfig, "config", ConfigError)
    # Head budgets of a later step are what is to be found anew, and may be of other blocks.
    later = {step: s for step, s in config.sparsity_from_step.items() if not isinstance(s, HeadBudgets)}
    sink = None if config.sink == AUTO else config.sink
    config = replace(config, sparsity=share, sparsity_from_step=later, sink=sink)
    listed, run = _prompts(prompts), _run_of(target, run, call)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SparsityWarning)  # of shares that are only tried
        handle, studies = apply_rainfusion(target, config), []
        try:
            for one in handle._applied:
                studies.append(_Study(one, HeadErrors(tried, share, ranks, every), probes))
            with torch.no_grad(), _quiet(target, progress), Bar(progress) as bar:
                _measure(studies, listed, run, bar)
                tables = [study.table(tried, handle) for study in studies]
                for study in studies:
                    study.begin_replays()
                if sensitivity and probes:
                    tables = [study.weighted(table, share, bar) for study, table in zip(studies, tables, strict=True)]
                if probes:
                    tables = [study.checked(t, share, ranks, bar) for study, t in zip(studies, tables, strict=True)]
        finally:
            for study in studies:
                study.end()
            handle.remove()
    for table in tables:
        _warn_of(table, tried)
    return Calibration(tuple(tables), share, ranks, len(listed))


class _Study:
    """The calibration of one model while it runs: its probe, and the forwards that are kept to run again."""

    def __init__(self, applied: Applied, errors: HeadErrors, probes: int) -> None:
        self.applied, self.model, self.engine = applied, applied.model, applied.engine
        self.errors, self.forwards = errors, Spread(probes)
        self.on_forward: Callable[[], None] = _nothing
        self._pending: Forward | None = None
        self._calls = 0
        self.engine.probe = errors
        # Before rainfusion's own hooks, which change the arguments, and end the forward.
        self._hooks = [
            self.model.register_forward_pre_hook(self._before, prepend=True, with_kwargs=True),
            self.model.register_forward_hook(self._after, prepend=True),
        ]

    @torch.compiler.disable
    def _before(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        wanted = self.forwards.wants_next
        self._calls = self.errors.calls
        self._pending = Forward.of(model, args, kwargs, self.applied.context) if wanted else None

    @torch.compiler.disable
    def _after(self, model: nn.Module, args: Any, output: Any) -> None:
        if self.errors.calls > self._calls:
            self.forwards.add(self._pending)
        self._pending = None
        self.on_forward()

    def table(self, shares: Sequence[float], handle: Handle) -> ErrorTable:
        """What was measured.

        Raises:
            CalibrationError: nothing was.
        """
        engine, errors, config = self.engine, self.errors, self.engine.config
        if not errors.calls:
            whys = {row.why for row in handle.report().rows if row.model == engine.name and row.why}
            said = f"its calls were dense: {', '.join(sorted(whys))[:200]}" if whys else "it was not called"
            raise CalibrationError(
                f"nothing was measured of {engine.name}: {said}. Configure fewer dense steps, every=1 to measure every "
                "step, or min_blocks=0 for short sequences; or give the other models alone, and run=function"
            )
        kept = tuple(share for share in shares if share not in errors.unreached)
        binding = Binding(
            type(self.model).__name__,
            digest_of(self.model),
            engine.layers,
            errors.heads,
            tuple(errors.grids)[:_MOST_GRIDS],
            pair_of(config.block),
            config.window,
            sinks_of(config.sink),
            config.omitted,
        )
        found = tuple(None if e is None else tuple(map(tuple, e)) for e in errors.read(engine.layers, kept))
        return ErrorTable(engine.name, binding, kept, found, (1.0,) * engine.layers, errors.calls)

    # -- forwards run again --------------------------------------------------------------------------

    def begin_replays(self) -> None:
        """From now on every call is the probe's, whatever the step."""
        config = replace(self.engine.config, dense_steps=(0, 0), sparsity_from_step={})
        self._unhook()
        self.engine.reset()
        self.engine.schedule = Schedule(config, self.engine.layers)

    def weighted(self, table: ErrorTable, share: float, bar: Bar) -> ErrorTable:
        """The table with the weights of its layers."""
        probes = {layer: OneLayer(layer, share) for layer, errors in enumerate(table.errors) if errors is not None}
        outputs = {layer: _OutputError() for layer in probes}
        forwards = self.forwards.chosen()
        bar.begin(f"{table.name}: weights of layers", len(forwards) * len(probes))
        for forward in forwards:
            dense = self._replay(forward, table.uniform(0.0))
            for layer, probe in probes.items():
                self.engine.probe = probe
                outputs[layer].add(forward.run(self.model), dense)
                bar.advance()
        ratios = {
            layer: outputs[layer].read() / error for layer, probe in probes.items() if (error := probe.read()) > 0
        }
        usual = sum(ratios.values()) / len(ratios) if ratios else 1.0  # of layers in which nothing went wrong
        return replace(table, weights=tuple(ratios.get(layer, usual) for layer in range(self.engine.layers)))

    def checked(self, table: ErrorTable, share: float, ranks: int, bar: Bar) -> ErrorTable:
        """The table with the error of the model's output, with one share and with the budgets."""
        plans = (table.uniform(share), table.budget(share, ranks).shares)
        outputs = (_OutputError(), _OutputError())
        forwards = self.forwards.chosen()
        bar.begin(f"{table.name}: budgets against one share", len(forwards))
        for forward in forwards:
            dense = self._replay(forward, table.uniform(0.0))
            for plan, output in zip(plans, outputs, strict=True):
                output.add(self._replay(forward, plan), dense)
            bar.advance()
        uniform, budgets = (output.read() for output in outputs)
        return replace(table, checked=Checked(uniform, budgets, share, ranks, len(forwards)))

    def _replay(self, forward: Forward, shares: Sequence[Sequence[float]]) -> Tensor:
        self.engine.probe = Budgeted(shares)
        return forward.run(self.model)

    def end(self) -> None:
        """The model is as it was; rainfusion is still applied."""
        self._unhook()
        self.engine.probe = None

    def _unhook(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []


class _OutputError:
    """The squared error of a model's output over its squared norm, summed on its device."""

    def __init__(self) -> None:
        self._error: Any = 0.0
        self._norm: Any = 0.0

    def add(self, output: Tensor, dense: Tensor) -> None:
        self._error = self._error + (output.float() - dense.float()).square().sum()
        self._norm = self._norm + dense.float().square().sum()

    def read(self) -> float:
        """0 where the output is."""
        norm = float(self._norm)
        return float(self._error) / norm if norm else 0.0


def _nothing() -> None:
    pass


def _measure(studies: list[_Study], prompts: list[Any], run: Run, bar: Bar) -> None:
    """Run every prompt, and show how far it is."""
    bar.begin("errors of heads", len(prompts))
    for number, prompt in enumerate(prompts):
        for study in studies:
            study.on_forward = _shown(study, number, bar)
        run(prompt)
        bar.at(number + 1)


def _shown(study: _Study, number: int, bar: Bar) -> Callable[[], None]:
    """Moves the bar by the step of the forward that ends, where the number of steps is known."""

    def show() -> None:
        moment = study.engine.moment
        if moment is not None and moment.steps:
            bar.at(number + min((moment.step + 1) / moment.steps, 1.0))

    return show


def _prompts(prompts: Any) -> list[Any]:
    if isinstance(prompts, str | bytes | Mapping) or not isinstance(prompts, Iterable):
        raise ConfigError(f"prompts={shown(prompts)} is not a list of prompts; give [{shown(prompts)}], for example")
    listed = list(prompts)
    if not listed:
        raise ConfigError("prompts is empty; give one or more")
    return listed


def _run_of(target: Any, run: Run | None, call: Mapping[str, Any]) -> Run:
    """What runs the models for a prompt."""
    if run is not None:
        if not callable(run):
            raise ConfigError(f"run={shown(run)} is not a function of a prompt")
        if call:
            raise ConfigError(
                f"{', '.join(call)}: arguments of a pipeline, which run takes the place of; let it give them"
            )
        return run
    if isinstance(target, nn.Module | list | tuple) or not callable(target):
        raise ConfigError(f"{type(target).__name__} is no pipeline that can be called with a prompt; give run=function")

    def of_pipeline(prompt: Any) -> Any:
        if not isinstance(prompt, str | Mapping):
            raise ConfigError(
                f"the prompt {shown(prompt)} is neither a text nor a mapping of arguments; give run=function"
            )
        return target(**{**call, **({"prompt": prompt} if isinstance(prompt, str) else prompt)})

    return of_pipeline


@contextmanager
def _quiet(target: Any, progress: bool) -> Iterator[None]:
    """The pipeline's own progress bar is off while ours is shown."""
    if not progress or not hasattr(target, "set_progress_bar_config"):
        yield
        return
    before = getattr(target, "_progress_bar_config", None)
    target.set_progress_bar_config(**{**(before or {}), "disable": True})
    try:
        yield
    finally:
        if before is None:
            del target._progress_bar_config
        else:
            target._progress_bar_config = before


def _warn_of(table: ErrorTable, tried: Sequence[float]) -> None:
    if left_out := [share for share in tried if share not in table.shares]:
        warnings.warn(
            f"{table.name}: shares of {', '.join(f'{s:g}' for s in left_out)} cannot be reached beside what every row "
            "keeps, and were left out; sink='first_frame_keys' or None, or smaller blocks, allow more",
            RainfusionWarning,
            stacklevel=3,
        )
    checked = table.checked
    if checked is not None and checked.budgets > checked.uniform:
        warnings.warn(
            f"{table.name}: the budgets gave the model's output an error of {checked.budgets:.3g}, one share for all "
            f"heads {checked.uniform:.3g}; keep one share, or calibrate with more prompts",
            RainfusionWarning,
            stacklevel=3,
        )


__all__ = ["calibrate"]
