"""The kernel for the mask chain, whole or in parts: block means a few blocks a request, then scores and selection as
one small graph; all in float32."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Mapping

import numpy as np

from rainfusion.backends.openvino.block_means import BlockMeans
from rainfusion.backends.openvino.constants import constant_order, require
from rainfusion.backends.openvino.lengths import counted
from rainfusion.backends.openvino.select_blocks import SelectionModel, selection_requests
from rainfusion.core.backend import Device, Kernel, Run, Segment
from rainfusion.core.layout import BlockedAxis
from rainfusion.core.ops import BlockMean, BlockScore, Select
from rainfusion.core.plan import Plan
from rainfusion.core.stages import Stages


def build_mask_chain(segment: Segment, plan: Plan, device: Device) -> Run:
    """The kernel: from tokens, block means or scores to the block means, scores and masks that are read elsewhere.

    Raises:
        LoweringError: not a part of one mask chain, other dtypes, or an order that is known only at call time.
    """
    stages = Stages.of(segment)
    means = [(op, _block_means(op, plan, device)) for op in stages.means]
    selection = _Selection(stages, segment, plan, device) if stages.score or stages.select else None

    def run(values: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        made: dict[str, np.ndarray] = {}
        known = ChainMap(made, values)  # type: ignore[arg-type]  # of which only the first is written
        for op, mean in means:
            made[op.mean] = mean(known[op.x], None if op.lengths is None else known[op.lengths])
        if selection:
            made.update(selection(known))
        return made

    return run


MASK_CHAIN = Kernel(frozenset({BlockMean, BlockScore, Select}), build_mask_chain)


def _block_means(op: BlockMean, plan: Plan, device: Device) -> BlockMeans:
    x = plan.types[op.x]
    require(x.dtype in ("float32", "float16", "bfloat16"), f"no means of {x.dtype}")
    return BlockMeans(BlockedAxis(x.shape[2], op.block, False, x.shape[2]), constant_order(plan, op.order), device)


class _Selection:
    """The score, the selection, or both."""

    def __init__(self, stages: Stages, segment: Segment, plan: Plan, device: Device) -> None:
        self._score, self._select, self._device = stages.score, stages.select, device
        name = stages.score.score if stages.score else (stages.select.score if stages.select else "")
        self._shape = plan.types[name].shape
        require(plan.types[name].dtype == "float32", f"no scores of {plan.types[name].dtype}")
        self._results = [name for name in segment.outputs if name == (stages.score and stages.score.score)]
        self._model = SelectionModel(
            scores=stages.score is not None,
            prior=stages.score is not None and stages.score.prior is not None,
            returns_score=bool(self._results),
            selects=stages.select is not None,
        )
        if stages.select:
            self._results.append(stages.select.mask)
            self._model = self._model._replace(**_way(stages.select))
        selection_requests(self._model, device)  # compiled before the first call

    def __call__(self, values: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        inputs = {"shape": np.array(self._shape)}
        if self._score:
            inputs |= self._means(self._score, values)
        elif self._select:
            inputs["score"] = np.ascontiguousarray(values[self._select.score])
        if self._select:
            inputs |= self._numbers(self._select, values)
        masks = [False] * self._model.returns_score + [True] * self._model.selects
        outputs = [np.empty(self._shape, bool if mask else np.float32) for mask in masks]
        requests, names = selection_requests(self._model, self._device)
        requests.run((), [([inputs[name] for name in names], outputs)])
        return dict(zip(self._results, outputs, strict=True))

    def _means(self, op: BlockScore, values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        queries, keys = (np.ascontiguousarray(values[name]) for name in (op.qb, op.kb))
        batch, kv_heads, _, dim = keys.shape
        inputs = {
            "scale": np.array([op.scale], np.float32),
            "query_means": queries.reshape(batch, kv_heads, -1, dim),
            "key_means": keys,
        }
        if op.prior is not None:
            prior = np.ascontiguousarray(values[op.prior], np.float32)
            inputs["prior"] = prior.reshape(1, -1, *prior.shape[-2:])
        return inputs

    def _numbers(self, op: Select, values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """What the selection goes by, besides the score."""
        candidates = op.kv.blocks if op.over == "all" else op.kv.free_blocks
        quotas = np.clip(values[op.quotas], 0, candidates).astype(np.int32)
        counts = counted(op.kv, None if op.lengths is None else values[op.lengths])[:, None, None]
        with np.errstate(divide="ignore"):  # of blocks without tokens
            log_counts = np.log(counts).astype(np.float32)
        return {
            "quotas": quotas[None, ..., None],
            "most": np.array(max(1, quotas.max(initial=0)), np.int64),
            "free": np.array([op.q.free_blocks, op.kv.free_blocks]),
            "mass": np.array([op.mass or 0], np.float32),
            "log_counts": log_counts,
            "absent": counts == 0,
        }


def _way(op: Select) -> dict[str, bool]:
    return {
        "mass": op.mass is not None,
        "over_all": op.over == "all",
        "padded": op.lengths is not None,
        "free_rows": op.q.free_blocks > 0,
        "free_columns": op.kv.free_blocks > 0,
    }
