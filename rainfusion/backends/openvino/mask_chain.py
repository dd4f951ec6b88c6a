"""The kernel for the mask chain, whole or in parts: block means a few blocks a request, then scores and selection."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Mapping

import numpy as np

from rainfusion.backends.openvino.block_means import BlockMeans
from rainfusion.backends.openvino.block_scores import BlockScores
from rainfusion.backends.openvino.constants import constant_order, require
from rainfusion.backends.openvino.selection import Selection
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
    score = None if stages.score is None else _block_scores(stages.score, plan, device)
    selection = None
    if stages.select is not None:
        # A score that nothing else reads is made only where the selection reads it.
        inner = None if score is None or segment.wants(score.op.score) else score
        selection = Selection(stages.select, _shape(stages.select.score, plan), device, inner)
        score = None if inner is not None else score

    def run(values: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        results: dict[str, np.ndarray] = {}
        known = ChainMap(results, values)  # type: ignore[arg-type]  # of which only the first is written
        for op, mean in means:
            results[op.mean] = mean(known[op.x], None if op.lengths is None else known[op.lengths])
        if score is not None:
            results[score.op.score] = score(known)
        if selection is not None:
            results[selection.op.mask] = selection(known)
        return results

    return run


MASK_CHAIN = Kernel(frozenset({BlockMean, BlockScore, Select}), build_mask_chain)


def _shape(score: str, plan: Plan) -> tuple[int, ...]:
    require(plan.types[score].dtype == "float32", f"no scores of {plan.types[score].dtype}")
    return plan.types[score].shape


def _block_scores(op: BlockScore, plan: Plan, device: Device) -> BlockScores:
    _shape(op.score, plan)
    return BlockScores(op, device)


def _block_means(op: BlockMean, plan: Plan, device: Device) -> BlockMeans:
    x = plan.types[op.x]
    require(x.dtype in ("float32", "float16", "bfloat16"), f"no means of {x.dtype}")
    tokens = x.shape[2]
    axis = BlockedAxis(tokens, min(op.block, tokens), False, tokens)
    return BlockMeans(axis, constant_order(plan, op.order), device)
