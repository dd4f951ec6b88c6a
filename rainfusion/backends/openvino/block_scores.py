"""The `block_score` operation: one small graph multiplies block means, in float32. Sizes come with the call, so all
plans share it.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from rainfusion.backends.openvino.memory import POOL
from rainfusion.backends.openvino.processes import per_process
from rainfusion.backends.openvino.runtime import Requests
from rainfusion.backends.openvino.vendor import op, ov
from rainfusion.core.backend import Device
from rainfusion.core.ops import BlockScore

_F32, _I64 = ov.Type.f32, ov.Type.i64


class BlockScores:
    """Scores of block means.

    Args:
        op: the operation; device: where to compute.
    """

    def __init__(self, op: BlockScore, device: Device) -> None:
        self.op, self._device = op, device
        score_requests(op.prior is not None, device)  # compiled before the first call

    def __call__(
        self, values: Mapping[str, np.ndarray], rows: int | None = None, columns: int | None = None
    ) -> np.ndarray:
        """The first `rows` and `columns` of the score, or all: float32 ``[B, H, q blocks, key blocks]``."""
        queries, keys = values[self.op.qb][:, :, :rows], values[self.op.kb][:, :, :columns]
        shape = (*queries.shape[:3], keys.shape[2])
        inputs = [
            np.array([self.op.scale], np.float32),
            np.ascontiguousarray(queries).reshape(*keys.shape[:2], -1, keys.shape[3]),
            np.ascontiguousarray(keys),
            np.array(shape),
        ]
        if self.op.prior is not None:
            prior = np.ascontiguousarray(values[self.op.prior][..., :rows, :columns], np.float32)
            inputs.append(prior.reshape(1, -1, *shape[2:]))
        score = POOL.array(shape, np.dtype(np.float32))
        score_requests(self.op.prior is not None, self._device).run((), [(inputs, [score])])
        return score


@per_process
def score_requests(prior: bool, device: Device) -> Requests:
    """The compiled graph, with or without a prior.

    Inputs: scale ``[1]``; means of queries ``[B, KV heads, group * rows, D]`` and keys ``[B, KV heads, columns, D]``;
    shape: that of the score ``[B, H, rows, columns]``; the prior ``[1, H or 1, rows, columns]``. Output: the score.
    """
    scale = op.parameter([1], _F32, "scale")  # a constant would be folded into the means and round another way
    queries, keys = (op.parameter([-1] * 4, _F32, name) for name in ("query_means", "key_means"))
    shape = op.parameter([4], _I64, "shape")
    inputs = [scale, queries, keys, shape]
    score = op.reshape(op.multiply(op.matmul(queries, keys, False, True), scale), shape, False)
    if prior:
        inputs.append(op.parameter([-1] * 4, _F32, "prior"))
        score = op.add(score, inputs[-1])
    return Requests(ov.Model([score], inputs, "block scores"), device, _F32, 1)
