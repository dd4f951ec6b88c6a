"""The engine: sparse attention for the layers of one model, whatever hosts it.

A host tells it when a forward begins (`Engine.begin`) and ends (`Engine.end`), and hands it the attention of every
layer (`Engine.attend`) with a function that is the host's own dense attention.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any, Final, NamedTuple

import rainfusion
from rainfusion.core.arrays import array_facts, moved
from rainfusion.core.errors import LayoutError
from rainfusion.core.layout import TokenLayout
from rainfusion.core.parts import Grid, Part, Text
from rainfusion.core.policies import TopK
from rainfusion.core.problem import AttentionProblem
from rainfusion.core.windows import Sizes
from rainfusion.dispatch import LruDict
from rainfusion.integrations.call import Assessment, Call, Probe
from rainfusion.integrations.clock import Clock, Moment, Reading
from rainfusion.integrations.config import RainFusionConfig, Share, Sinks
from rainfusion.integrations.device_reads import stopwatch
from rainfusion.integrations.report import DENSE, REUSED, SKIPPED, SPARSE, Log, Row
from rainfusion.integrations.reuse import Masks
from rainfusion.integrations.schedule import Schedule
from rainfusion.plugins import manager as plugins

Array = Any


class Rest:
    """The text that takes what the other parts leave of a sequence."""

    def __repr__(self) -> str:
        return "REST"


REST: Final = Rest()
Parts = tuple[Part | Rest, ...]
LayerParts = Callable[[int], Parts]

FEWEST_BLOCKS = 32
_MOST_UNNAMED = 4


class HeadRange(NamedTuple):
    """The heads of a call, where a host has split those of a layer over devices: ``start`` to ``stop`` of ``total``."""

    start: int
    stop: int
    total: int


class Forward(NamedTuple):
    """A forward that is under way.

    Attributes:
        moment: when it takes place.
        parts: of the sequence that attention sees, in its order, or a function that gives those of a layer; None
            where sparse attention does not fit this forward, and `why` says why.
        order: ``"given"`` where the host has brought the tokens into block order, else ``"window"``.
        called: how often each layer was called.
    """

    moment: Moment
    parts: Parts | LayerParts | None
    order: str
    why: str
    called: dict[int, int]


class Engine:
    """Sparse attention for the layers of one model.

    Args:
        layers: how many self-attention layers the model has.
        clock: of the pipeline; models of one pipeline share it.
        log: where rows for the report go; models of one pipeline share it.
        name: of the model, for the report.

    Attributes:
        probe: takes the calls that the schedule makes sparse, as calibration does; they are in no report. None: the
            engine itself.

    Raises:
        ConfigError: a configuration that does not fit the model.
        BackendError: the backend that the configuration names is unknown or not available.
    """

    def __init__(self, config: RainFusionConfig, layers: int, clock: Clock, log: Log, name: str) -> None:
        self.config, self.layers, self.name = config, layers, name
        self.clock, self.log = clock, log
        self.schedule = Schedule(config, layers)
        self.sinks = config.sinks
        if config.backend is not None:
            plugins.host().backend(config.backend)  # refuses one that is not there
        self.probe: Probe | None = None
        self._forward: Forward | None = None
        self._masks = Masks(config)
        self._run = -1
        self._unnamed = (-1, 0)
        self._assessed: LruDict[Assessment] = LruDict(256)

    def __deepcopy__(self, memo: dict[int, Any]) -> Engine:
        """An engine that has seen nothing; engines that are copied together share a clock and a log again."""
        clock = memo.setdefault(id(self.clock), Clock())
        log = memo.setdefault(id(self.log), Log(self.config.report_rows))
        copy = memo[id(self)] = Engine(self.config, self.layers, clock, log, self.name)
        return copy

    @property
    def moment(self) -> Moment | None:
        """When the forward takes place that is under way."""
        return None if self._forward is None else self._forward.moment

    # -- what a host calls ---------------------------------------------------------------------------

    def begin(
        self, reading: Reading, parts: Parts | LayerParts | None, *, order: str = "window", why: str = ""
    ) -> None:
        """A forward begins. Arguments as in `Forward`.

        Forwards of one step that the host does not name are told apart by their order: "", "#2", "#3", "#4".
        """
        moment = self.clock.tick(reading, needs_step=self.schedule.needs_step or self.probe is not None)
        if moment.steps is None:
            moment = moment._replace(steps=self.config.num_steps)
        if moment.run != self._run:
            self._masks.clear()
            self._run, self._unnamed = moment.run, (-1, 0)
        if reading.context is None:
            moment = moment._replace(context=self._unnamed_context(moment.step))
        self._forward = Forward(moment, parts, order, why, {})

    def _unnamed_context(self, step: int) -> str:
        last, count = self._unnamed
        count = min(count + 1, _MOST_UNNAMED) if step == last else 1
        self._unnamed = (step, count)
        return "" if count == 1 else f"#{count}"

    def end(self, *, complete: bool = True, replaced: Collection[int] = ()) -> None:
        """The forward is over, and layers that were not called are noted.

        Args:
            complete: False where it failed: its run is over then, and the next forward starts another one.
            replaced: layers whose attention the host took elsewhere.
        """
        forward, self._forward = self._forward, None
        if not complete:
            self.reset()
        elif forward is not None:
            for layer in range(self.layers):
                if layer in forward.called:
                    continue
                if layer in replaced:
                    self._note(forward.moment, layer, DENSE, "another attention was set", 1.0)
                else:
                    self._note(forward.moment, layer, SKIPPED, "not called")

    def reset(self) -> None:
        """The run is over: masks are let go of."""
        self._masks.clear()
        self.clock.reset()

    def attend(
        self,
        layer: int,
        q: Array,
        k: Array,
        v: Array,
        dense: Callable[[], Array],
        *,
        scale: float | None = None,
        kv_lengths: Array = None,
        why_dense: str = "",
        heads: HeadRange | None = None,
    ) -> Array:
        """The attention of a layer, sparse or dense as the schedule says.

        Args:
            q, k, v: ``[batch, tokens, heads, head_dim]``.
            dense: the host's own attention for this call.
            kv_lengths: as in `rainfusion.attention`.
            why_dense: what speaks against sparse attention in this call, as the host knows it. Such a call may come
                outside of a forward, as gradient checkpointing does, and is not noted then.
            heads: which of the layer's heads q, k and v have, where they are not all of them; shares a head are those
                of all.

        Raises:
            LayoutError: no forward is under way, or the sequence is shorter than its parts.
        """
        forward = self._forward
        if forward is None and why_dense:
            return dense()
        if forward is None:
            raise LayoutError(
                f"layer {layer} of {self.name} was called outside of a forward of its model; call the model itself"
            )
        self.schedule.check_heads(q.shape[2] if heads is None else heads.total)
        forward.called[layer] = forward.called.get(layer, 0) + 1
        stop = self._stopwatch(q)
        share: Share | None = None
        why = why_dense or forward.why
        if not why:
            decision = self.schedule.decide(forward.moment.step, forward.moment.steps, layer)
            share, why = decision.share, decision.why
            if heads is not None and isinstance(share, tuple) and len(share) == heads.total:
                share = share[heads.start : heads.stop]
        if share is not None and forward.parts is not None:
            described = forward.parts(layer) if callable(forward.parts) else forward.parts
            parts = settled(described, q.shape[1], self.sinks)
            assessed = self._assess(q, k, v, parts, share, scale, forward.order)
            if not (why := assessed.why_dense):
                settings = self._settings(forward, parts, scale=scale, kv_lengths=kv_lengths)
                assess = partial(self._assess, q, k, v, parts, scale=scale, order=forward.order)
                call = Call(self._place(forward, layer), forward.moment, q, k, v, share, settings, dense, assess)
                if self.probe is not None:
                    return self.probe(call)
                out, reused = self._sparse(call, assessed)
                kind = REUSED if reused else SPARSE
                self._note(forward.moment, layer, kind, "", assessed.density, stop(), reused)
                return out
        out = dense()
        self._note(forward.moment, layer, DENSE, why, 1.0, stop())
        return out

    # -- a sparse call -------------------------------------------------------------------------------

    def _sparse(self, call: Call, assessed: Assessment) -> tuple[Array, float]:
        """The output, and the share of heads that used an earlier call's mask."""
        if self.config.refresh_every == 1 and not self.config.share_masks:
            return rainfusion.attention(call.q, call.k, call.v, **assessed.budget, **call.settings), 0.0
        kept = self._masks.at(call.fit, call.heads)
        means = self._masks.means(call.q, call.k, assessed.layout, call.order)
        stale = kept.stale(call.moment, means)
        if len(stale) == call.heads:
            budget = {**assessed.budget, "return_mask": True}
            out, mask = rainfusion.attention(call.q, call.k, call.v, **budget, **call.settings)
            kept.put(stale, mask, call.moment, means)
            return out, 0.0
        if stale:
            kept.put(stale, call.select(stale), call.moment, means)
        return call.masked(kept.mask), 1 - len(stale) / call.heads

    def _settings(self, forward: Forward, parts: tuple[Part, ...], **operands: Any) -> dict[str, Any]:
        """What a call of `rainfusion.attention` says beside its tensors and its budget."""
        config = self.config
        return {
            "parts": parts,
            "block": config.block,
            "window": window_of(parts, config),
            "omitted": config.omitted,
            "precision": config.precision,
            "rotate": config.rotate,
            "order": forward.order,
            "tensor_layout": "bshd",
            "backend": config.backend,
            **operands,
        }

    def _place(self, forward: Forward, layer: int) -> tuple[str, int, int]:
        """Where a mask is kept: a layer may be called several times a forward, once a sample for example."""
        return ("" if self.config.share_masks else forward.moment.context, layer, forward.called[layer])

    # -- what planning says --------------------------------------------------------------------------

    def _assess(
        self, q: Array, k: Array, v: Array, parts: tuple[Part, ...], share: Share, scale: float | None, order: str
    ) -> Assessment:
        """Whether a call is worth making sparse, and its density; settled once for calls that are alike."""
        key = (array_facts(q), array_facts(k), array_facts(v), parts, share, scale, order)
        found = self._assessed.find(key)
        return found or self._assessed.keep(key, self._assessment(q, k, v, parts, share, scale, order))

    def _assessment(
        self, q: Array, k: Array, v: Array, parts: tuple[Part, ...], share: Share, scale: float | None, order: str
    ) -> Assessment:
        config = self.config
        layout = layout_of(parts, config)
        problem = AttentionProblem.from_tensors(q, k, v, scale=scale, tensor_layout="bshd")
        policy = TopK(share)
        in_8_bits: dict[str, Any] = {"precision": config.precision, "rotate": config.rotate}
        plan = rainfusion.plan(problem, layout, policy, omitted=config.omitted, order=order, **in_8_bits)
        by_head = isinstance(share, tuple) and not plan.is_dense
        budget = {"quotas": moved(plan.quotas(policy), q)} if by_head else {"sparsity": share}
        fewest = FEWEST_BLOCKS if config.min_blocks is None else config.min_blocks
        if plan.q_axis.free_blocks < fewest:
            return Assessment(f"small: {plan.q_axis.free_blocks} free blocks, under {fewest}", None, layout, budget)
        if config.min_blocks is None:
            candidate = rainfusion.choose(plan, like=q, backend=config.backend).candidate
            if candidate.speedup is not None and candidate.speedup < 1:
                return Assessment(
                    f"small: {candidate} estimates {candidate.speedup:.2f} times dense", None, layout, budget
                )
        skipped = 0.0 if plan.density is None else 1 - plan.density
        return Assessment("", plan.density, layout, budget, not policy.unreached(plan.q_axis, plan.kv_axis, skipped))

    # -- the report ----------------------------------------------------------------------------------

    def _note(
        self,
        moment: Moment,
        layer: int,
        kind: str,
        why: str,
        density: float | None = None,
        read_ms: Callable[[], float] | None = None,
        reused: float = 0.0,
    ) -> None:
        when = (moment.run, moment.step, moment.context)
        self.log.add(Row(self.name, *when, layer, kind, why, density, reused=reused), read_ms)

    def _stopwatch(self, like: Array) -> Callable[[], Callable[[], float] | None]:
        return stopwatch(like) if self.config.timed else _no_time


def window_of(parts: tuple[Part, ...], config: RainFusionConfig) -> Sizes | None:
    """The configured window, for a sequence with a grid; a layout without one takes none."""
    return config.window if any(isinstance(part, Grid) for part in parts) else None


def layout_of(parts: tuple[Part, ...], config: RainFusionConfig) -> TokenLayout:
    """The layout of a sequence of these parts."""
    return TokenLayout(parts=parts, block=config.block, window=window_of(parts, config))


@lru_cache(maxsize=256)
def settled(parts: Parts, length: int, sinks: Sinks) -> tuple[Part, ...]:
    """The parts of a sequence of that length: `REST` has its tokens, and grids of several frames have their sink.

    Raises:
        LayoutError: the sequence is shorter than the parts, or longer and none of them is `REST`.
    """
    given = sum(part.count for part in parts if not isinstance(part, Rest))
    left = length - given
    if left < 0 or (left and REST not in parts):
        raise LayoutError(
            f"a sequence of {length} tokens does not hold the parts {', '.join(map(str, parts))} of {given}; the "
            "adapter of this model describes another sequence"
        )
    return tuple(_settled(part, left, sinks) for part in parts)


def _settled(part: Part | Rest, left: int, sinks: Sinks) -> Part:
    if isinstance(part, Rest):
        return Text(left)
    if isinstance(part, Grid) and part.sink == "first_frame":
        return replace(part, sink=sinks.of(part.frames))
    return part


def _no_time() -> None:
    return None
