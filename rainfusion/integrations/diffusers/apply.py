"""Apply rainfusion to a pipeline or a model, and take it away again."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Iterable, Mapping
from functools import lru_cache
from types import TracebackType
from typing import Any, cast

import torch
from diffusers.hooks.hooks import BaseState, HookRegistry, ModelHook, StateManager
from torch import nn

from rainfusion.core.errors import ProblemError, RainfusionWarning
from rainfusion.core.layout import TokenLayout
from rainfusion.integrations.clock import Clock, Reading
from rainfusion.integrations.config import ConfigError, RainFusionConfig
from rainfusion.integrations.diffusers.adapter import Adapter, UnknownModelError, adapter_of, order_of, refusal
from rainfusion.integrations.diffusers.attention import Layer, check_degrees, forget_place, refuse_pickling
from rainfusion.integrations.diffusers.identity import digest_of
from rainfusion.integrations.diffusers.streams import Streams, streams_of
from rainfusion.integrations.engine import REST, Engine, LayerParts, Parts, Rest, layout_of, settled
from rainfusion.integrations.measure import grids_of
from rainfusion.integrations.report import Log, Report

_HOOK = "rainfusion"


def apply_rainfusion(target: Any, config: RainFusionConfig | None = None, **settings: Any) -> Handle:
    """Make the self-attention of a pipeline's transformers sparse.

    Args:
        target: a pipeline, whose transformers share one clock; or a model, or several. A loop of your own that does
            not step the pipeline's scheduler needs the model instead, whose timesteps are then the clock.
        config: how; or its arguments by name.

    Returns:
        A handle with `report()` and `remove()`; as a context manager it removes rainfusion at the end.

    Raises:
        UnknownModelError: no adapter describes a model, or its attention is left alone; it says why.
        ConfigError: a configuration that does not fit, or rainfusion is applied already.
    """
    if config is not None and settings:
        raise ConfigError("give a configuration, or its arguments by name, not both")
    config = RainFusionConfig.of(settings) if config is None else config
    if not isinstance(config, RainFusionConfig):
        raise ConfigError(f"config is a {type(config).__name__}; give a RainFusionConfig, or its arguments by name")
    models, pipeline = models_of(target)
    if any(_applied(model) for model in models.values()):
        raise ConfigError("rainfusion is applied already; call remove() of its handle, or remove_rainfusion, first")
    _refuse_shared_budgets(config, models)
    clock, log = Clock(), Log(config.report_rows)
    applied = [
        Applied(model, adapter, config, clock, log, name, pipeline)
        for name, model, adapter in [(name, model, _known(model)) for name, model in models.items()]
    ]
    for one in applied:
        one.check_clock()
    for one in applied:
        one.bind()
    return Handle(config, applied, log)


def remove_rainfusion(target: Any) -> None:
    """Take rainfusion away from a pipeline or a model, or from a deep copy of one.

    Models without it stay as they are.
    """
    for model in models_of(target)[0].values():
        for one in _applied(model):
            one.release()


def models_of(target: Any) -> tuple[dict[str, nn.Module], Any]:
    """The models that are meant, by name, and their pipeline, if there is one.

    Raises:
        UnknownModelError: there is none, or none that is known.
    """
    if isinstance(target, nn.Module):
        model = _unwrapped(target)
        return {type(model).__name__: model}, None
    components = getattr(target, "components", None)
    if isinstance(components, Mapping):
        return _models_of_pipeline(target, components), target
    if isinstance(target, list | tuple) and target and all(isinstance(model, nn.Module) for model in target):
        models = [_unwrapped(model) for model in target]
        return _once({f"{type(model).__name__} {i}": model for i, model in enumerate(models)}), None
    raise UnknownModelError(f"{_kind_of(target)} is neither a pipeline, a model nor a list of models; give one of them")


def _models_of_pipeline(pipeline: Any, components: Mapping[str, Any]) -> dict[str, nn.Module]:
    """The known models among a pipeline's components; a denoiser that is not known is named in a warning."""
    found = {name: _unwrapped(part) for name, part in components.items() if isinstance(part, nn.Module)}
    known = _once({name: model for name, model in found.items() if adapter_of(model)})
    denoisers = {name: model for name, model in found.items() if name.startswith(("transformer", "unet"))}
    others = {name: model for name, model in denoisers.items() if not adapter_of(model)}
    if not known and others:
        raise refusal(next(iter(others.values())))
    if not known:
        raise UnknownModelError(f"{type(pipeline).__name__} has no transformer; give the model itself")
    for name, model in others.items():
        warnings.warn(f"{name} of the pipeline stays dense: {refusal(model)}", RainfusionWarning, stacklevel=4)
    return known


def _kind_of(target: Any) -> str:
    kinds = ", ".join(sorted({type(item).__name__ for item in target})) if isinstance(target, list | tuple) else ""
    return f"{type(target).__name__} of {kinds}" if kinds else type(target).__name__


class Handle:
    """rainfusion on a pipeline, as `apply_rainfusion` returns it."""

    def __init__(self, config: RainFusionConfig, applied: list[Applied], log: Log) -> None:
        self.config, self._applied, self._log = config, applied, log

    def report(self) -> Report:
        """What happened so far; printed, it is a table. Waits for the device only if times were asked for."""
        for one in self._applied:
            one.look_at_pipeline()
        layers = {one.engine.name: one.engine.layers for one in self._applied}
        return Report(self.config, layers, self._log.rows(), self._log.lost)

    def reset(self) -> None:
        """A run is over: call it where a loop of your own, with a model instead of a pipeline, is interrupted."""
        for one in self._applied:
            one.engine.reset()

    def remove(self) -> None:
        """Give every module its own processor back. A second call does nothing."""
        for one in self._applied:
            one.release()

    def __enter__(self) -> Handle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


class Applied:
    """rainfusion on one model: its layers, and the hooks that tell the engine when a forward begins and ends."""

    def __init__(
        self,
        model: nn.Module,
        adapter: Adapter,
        config: RainFusionConfig,
        clock: Clock,
        log: Log,
        name: str,
        pipeline: Any,
    ) -> None:
        modules = adapter.attention_modules(model)
        self.model, self.adapter, self.pipeline = model, adapter, pipeline
        config, self._grids = _bound(config, name, model, len(modules))
        self.engine = Engine(config, len(modules), clock, log, name)
        self.layers = [Layer(module, i, adapter, self.engine) for i, module in enumerate(modules.values())]
        self._contexts = _Contexts(self.engine)
        self._holder = _holder_of(model, modules)
        self._hooks: list[Any] = []
        self._order: TokenLayout | None = None
        self._lost: list[int] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> Applied:
        twin = memo[id(self)] = object.__new__(Applied)
        # The pipeline's copy, where the pipeline is being copied; a copy of the model alone has none.
        shared = {"adapter": self.adapter, "pipeline": memo.get(id(self.pipeline))}
        twin.__dict__.update(shared)
        twin.__dict__.update({n: copy.deepcopy(v, memo) for n, v in vars(self).items() if n not in shared})
        return twin

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise refuse_pickling()

    def check_clock(self) -> None:
        """Refuse a schedule of steps where nothing tells the step, or how many steps there are."""
        config, schedule = self.engine.config, self.engine.schedule
        if schedule.needs_steps and config.num_steps is None and getattr(self.pipeline, "scheduler", None) is None:
            cure = "give the pipeline" if self.pipeline is None else "load the scheduler of the pipeline first"
            raise ConfigError(
                f"dense_steps={config.dense_steps} needs the number of denoising steps; {cure}, or num_steps"
            )
        parameters = signature_of(cast(Any, type(self.model))).parameters
        if self.pipeline is None and schedule.needs_step and self.adapter.timestep not in parameters:
            raise ConfigError(
                f"the schedule depends on the denoising step, which a forward of {type(self.model).__name__} does not "
                "tell; give the pipeline, or name the argument in Adapter(timestep=...)"
            )

    def bind(self) -> None:
        """Lead the layers' attention to rainfusion."""
        for layer in self.layers:
            layer.bind()
        # torch's own hooks: diffusers' are lost where accelerate takes its hooks off and puts them on again.
        self._hooks = [
            self.model.register_forward_pre_hook(self._before, with_kwargs=True),
            self.model.register_forward_hook(self._after, always_call=True),
        ]
        hoist = self.adapter.hoist
        for name in (hoist.outputs or {}) if hoist and self.engine.config.order == "auto" else {}:
            self._hooks.append(self.model.get_submodule(name).register_forward_hook(_Moved(self, name)))
        # A list of blocks is never called itself: its registry hears of contexts and resets, and wraps no forward.
        HookRegistry.check_if_exists_or_initialize(self._holder).register_hook(self._contexts, _HOOK)
        self._forget_registries()

    def release(self) -> None:
        """Undo `bind`."""
        if not self._hooks:
            return
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        for layer in self.layers:
            layer.release()
        self.engine.reset()  # a handle may be kept for its report: masks are not
        HookRegistry.check_if_exists_or_initialize(self._holder).remove_hook(_HOOK, recurse=False)
        self._forget_registries()

    def _forget_registries(self) -> None:
        registry = HookRegistry.check_if_exists_or_initialize(self.model)
        if hasattr(registry, "invalidate_child_registries_cache"):
            registry.invalidate_child_registries_cache()

    # -- a forward -----------------------------------------------------------------------------------

    @torch.compiler.disable
    def _before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        forget_place()
        self._look()
        kind: Any = type(model)
        bound = signature_of(kind).bind(model, *args, **kwargs)
        bound.apply_defaults()
        arguments = bound.arguments
        if self.adapter.prepare is not None:
            arguments.update(self.adapter.prepare(arguments))
        parts = self.adapter.parts(model, arguments)
        if self._grids and isinstance(parts, tuple):
            self._look_at_grids(grids_of(parts))
        streams = self._streams(parts)
        for layer in self.layers:
            layer.streams = streams
        self._order = None if streams or isinstance(parts, str) else self._whole_order(parts, arguments)
        order = "window" if self._order is None else "given"
        reading = self._reading(arguments)
        if isinstance(parts, str):
            self.engine.begin(reading, None, why=parts)
        else:
            self.engine.begin(reading, parts, order=order)
        hoist = self.adapter.hoist
        if self._order is not None and hoist is not None and hoist.arguments is not None:
            arguments.update(hoist.arguments(arguments, order_of(self._order, _device_of(arguments))))
        elif self.adapter.prepare is None:
            return None
        return bound.args[1:], bound.kwargs

    def _streams(self, parts: Parts | LayerParts | str) -> Streams:
        """What diffusers splits over devices in this forward; nothing where it splits nothing.

        Raises:
            ProblemError: it splits a sequence that cannot be put together again, or other than by heads.
        """
        config = getattr(self.model, "_parallel_config", None)
        if getattr(config, "context_parallel_config", None) is None:
            return ()
        check_degrees(config)
        name = type(self.model).__name__
        if self.adapter.call == "sdpa":
            raise ProblemError(
                f"the attention of {name} does not take part in context parallelism: its processors call torch "
                "directly; do not call enable_parallelism for it"
            )
        if self.engine.probe is not None:
            raise ProblemError("calibration reads all heads of a layer; run it on one device, without context parallel")
        if isinstance(parts, str):
            return (None,)
        streams = None if callable(parts) else streams_of(parts, self.adapter.split)
        if streams is None:
            raise ProblemError(
                f"it is not known how context parallelism splits the sequence of {name}, which has several parts; say "
                "so in its Adapter (split=), or call remove() of the handle for dense attention"
            )
        return streams

    def _whole_order(self, parts: Parts | LayerParts, arguments: Mapping[str, Any]) -> TokenLayout | None:
        """The layout by which tokens are reordered once a forward; None where every layer does it."""
        config, hoist = self.engine.config, self.adapter.hoist
        if hoist is None or config.order != "auto" or callable(parts) or REST in parts:
            return None
        if hoist.fits is not None and not hoist.fits(self.model, arguments):
            return None
        whole = settled(parts, sum(part.count for part in parts if not isinstance(part, Rest)), self.engine.sinks)
        return layout_of(whole, config)

    @torch.compiler.disable
    def _after(self, model: nn.Module, args: Any, output: Any) -> Any:
        forget_place()
        self.engine.end(complete=output is not None, replaced=self._lost)
        hoist, order = self.adapter.hoist, self._order
        self._order = None
        if order is None or hoist is None or hoist.result is None or output is None:
            return None
        return hoist.result(output, order_of(order, _first_tensor(output).device))

    def moved(self, name: str, output: Any) -> Any:
        """The output of a module where tokens are reordered."""
        if self._order is None or self.adapter.hoist is None or self.adapter.hoist.outputs is None:
            return None
        return self.adapter.hoist.outputs[name](output, order_of(self._order, _first_tensor(output).device))

    def _look(self) -> None:
        """Say once where something has replaced processors since: those layers are dense."""
        lost = [layer.index for layer in self.layers if not layer.is_bound]
        if lost and not self._lost:
            warnings.warn(
                f"{len(lost)} of {len(self.layers)} layers of {self.engine.name} no longer call rainfusion and are "
                "dense: something has replaced their processors or attention backend (set_attn_processor, "
                "set_attention_backend, fuse_qkv_projections). Do that first, then apply rainfusion",
                RainfusionWarning,
                stacklevel=2,
            )
        self._lost = lost

    def _look_at_grids(self, grids: Iterable[str]) -> None:
        """Say once where head budgets are used for grids that they were not measured on."""
        if others := [grid for grid in grids if grid not in self._grids]:
            warnings.warn(
                f"the head budgets of {self.engine.name} were measured on {', '.join(sorted(self._grids)[:4])}, and "
                f"this is {others[0]}; they are used as they are. Calibrate with this size where quality matters",
                RainfusionWarning,
                stacklevel=2,
            )
            self._grids = frozenset()

    @property
    def context(self) -> str | None:
        """Which of the forwards of a step is under way, such as ``"cond"``; None where the pipeline does not say."""
        context = self._contexts.manager._context
        return None if context is None else str(context.name)

    def _reading(self, arguments: Mapping[str, Any]) -> Reading:
        """What the host says of this forward: the context, or else the scheduler, knows the step."""
        context, scheduler = self._contexts.manager._context, getattr(self.pipeline, "scheduler", None)
        name = None if context is None else context.name
        step, steps = getattr(context, "step_index", None), getattr(context, "num_inference_steps", None)
        if step is None:
            step, counted = _by_scheduler(self.pipeline)
            steps = counted if steps is None else steps
        timestep = arguments.get(self.adapter.timestep)
        level = (lambda: float(timestep.max())) if isinstance(timestep, torch.Tensor) else None
        return Reading(name, step, steps, level, mark=getattr(scheduler, "timesteps", None))

    def look_at_pipeline(self) -> None:
        """Say where the pipeline has another model by now."""
        components = getattr(self.pipeline, "components", {})
        if components and _unwrapped(components.get(self.engine.name)) is not self.model:
            warnings.warn(
                f"{self.engine.name} of the pipeline is another model than the one that rainfusion was applied to; "
                "apply it again",
                RainfusionWarning,
                stacklevel=3,
            )


class _State(BaseState):
    def reset(self, *args: Any, **kwargs: Any) -> None:
        pass


class _Contexts(ModelHook):
    """Hears from a pipeline which context a forward belongs to, and when a run is over."""

    _is_stateful = True

    def __init__(self, engine: Engine) -> None:
        super().__init__()
        self.engine = engine
        self.manager = StateManager(_State)

    def reset_state(self, module: nn.Module) -> nn.Module:
        self.manager.reset()
        self.engine.reset()
        return module


class _Moved:
    """A forward hook on a module where tokens are reordered."""

    def __init__(self, applied: Applied, name: str) -> None:
        self._applied, self._name = applied, name

    @torch.compiler.disable
    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        return self._applied.moved(self._name, output)


def _by_scheduler(pipeline: Any) -> tuple[int | None, int | None]:
    """The denoising step and the number of steps, as the scheduler of a pipeline counts them on the host."""
    scheduler: Any = getattr(pipeline, "scheduler", None)
    timesteps = getattr(scheduler, "timesteps", None)
    if timesteps is None:
        return None, None
    if not hasattr(scheduler, "_step_index"):  # such as DDIM: the pipeline may have left out the first timesteps
        return None, getattr(pipeline, "_num_timesteps", None) or len(timesteps)
    begin = scheduler.begin_index or 0
    step = begin if scheduler.step_index is None else scheduler.step_index
    step, steps = step - begin, len(timesteps) - begin
    return (step if step < steps else None), steps  # all done: another pipeline runs, with a scheduler of its own


def _refuse_shared_budgets(config: RainFusionConfig, models: Mapping[str, nn.Module]) -> None:
    """Refuse budgets of one model for several: by the name of its class they would serve all, and one was measured."""
    for given, budgets in config.head_budgets().items():
        if len(budgets.models) == 1 < len(models):
            raise ConfigError(
                f"the head budgets in {given} are of one model, and these are {len(models)}: {', '.join(models)}; "
                "calibrate them together, or apply the budgets to that model alone"
            )


def _bound(
    config: RainFusionConfig, name: str, model: nn.Module, layers: int
) -> tuple[RainFusionConfig, frozenset[str]]:
    """A model's own configuration, and the grids that its head budgets, if it has some, were measured on."""
    budgets = config.head_budgets()
    if not budgets:
        return config, frozenset()
    own = config.for_model(name, type(model).__name__, digest_of(model), layers)
    bindings = [given.of(name).binding for given in budgets.values()]
    for omitted in {binding.omitted for binding in bindings} - {config.omitted}:
        warnings.warn(
            f"the head budgets of {name} were measured with omitted={omitted!r} and are used with "
            f"omitted={config.omitted!r}; calibrate with that where quality matters",
            RainfusionWarning,
            stacklevel=5,
        )
    return own, frozenset(grid for binding in bindings for grid in binding.grids)


def _known(model: nn.Module) -> Adapter:
    adapter = adapter_of(model)
    if adapter is None:
        raise refusal(model)
    return adapter


def _applied(model: nn.Module) -> list[Applied]:
    """What is applied to a model: found by its hook, so that a deep copy has its own."""
    hooks = [getattr(hook, "__self__", None) for hook in model._forward_pre_hooks.values()]
    return [owner for owner in hooks if isinstance(owner, Applied)]


def _unwrapped(model: Any) -> Any:
    return getattr(model, "_orig_mod", model)


def _once(models: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """The same models without those that are named twice."""
    names = {id(model): name for name, model in reversed(models.items())}
    return {name: model for name, model in models.items() if names[id(model)] == name}


def _holder_of(model: nn.Module, modules: Iterable[str]) -> nn.Module:
    """The list of blocks that the first attention module is in."""
    path = next(iter(modules)).split(".")
    for end in range(len(path), 0, -1):
        holder = model.get_submodule(".".join(path[:end]))
        if isinstance(holder, nn.ModuleList):
            return holder
    raise UnknownModelError(f"{type(model).__name__} keeps no attention module in a ModuleList, which rainfusion needs")


@lru_cache(maxsize=64)
def signature_of(model: Any) -> inspect.Signature:
    """The signature of a model class's forward."""
    return inspect.signature(model.forward)


def _first_tensor(value: Any) -> torch.Tensor:
    items = value.values() if isinstance(value, Mapping) else value
    tensor: torch.Tensor = value if isinstance(value, torch.Tensor) else next(item for item in items)
    return tensor


def _device_of(arguments: Mapping[str, Any]) -> torch.device:
    return next(value.device for value in arguments.values() if isinstance(value, torch.Tensor))


__all__ = ["Applied", "Handle", "apply_rainfusion", "models_of", "remove_rainfusion"]
