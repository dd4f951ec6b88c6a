"""`block_score` and `select` at call time: a small graph ranks the columns of every row, and NumPy writes the mask."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from rainfusion.backends.openvino.lengths import counted
from rainfusion.backends.openvino.select_blocks import SelectionModel, selection_requests
from rainfusion.core.backend import Device
from rainfusion.core.ops import BlockScore, Select

Values = Mapping[str, np.ndarray]


class Score:
    """`block_score`.

    Args:
        op: the operation; shape: of the score.
    """

    def __init__(self, op: BlockScore, shape: tuple[int, ...], device: Device) -> None:
        self.op, self._shape, self._device = op, shape, device
        self._model = SelectionModel(prior=op.prior is not None, ranks=False)

    def __call__(self, values: Values) -> np.ndarray:
        """float32 ``[B, H, q blocks, key blocks]``."""
        score = np.empty(self._shape, np.float32)
        _run(self._model, self.inputs(values, *self._shape[2:]), [score], self._device)
        return score

    def inputs(self, values: Values, rows: int, columns: int) -> dict[str, np.ndarray]:
        """What a graph reads to make the first `rows` and `columns` of the score."""
        queries, keys = values[self.op.qb][:, :, :rows], values[self.op.kb][:, :, :columns]
        batch, heads, _, dim = queries.shape
        inputs = {
            "scale": np.array([self.op.scale], np.float32),
            "query_means": np.ascontiguousarray(queries).reshape(batch, keys.shape[1], -1, dim),
            "key_means": np.ascontiguousarray(keys),
            "shape": np.array([batch, heads, rows, columns]),
        }
        if self.op.prior is not None:
            prior = np.ascontiguousarray(values[self.op.prior][..., :rows, :columns], np.float32)
            inputs["prior"] = prior.reshape(1, -1, rows, columns)
        return inputs


class Selection:
    """`select`.

    Args:
        op: the operation; shape: of the mask.
        score: makes the score; None where it is given.
    """

    def __init__(self, op: Select, shape: tuple[int, ...], device: Device, score: Score | None) -> None:
        self.op, self._shape, self._device, self._score = op, shape, device, score
        prior = score is not None and score.op.prior is not None
        self._model = SelectionModel(score is not None, prior, padded=op.lengths is not None)

    def __call__(self, values: Values) -> np.ndarray:
        """The mask, bool ``[B, H, q blocks, key blocks]``."""
        op, mask = self.op, np.ones(self._shape, bool)
        kept = mask[:, :, : op.q.free_blocks, : op.kv.free_blocks]
        if not kept.size:
            return mask
        counts = counted(op.kv, None if op.lengths is None else values[op.lengths])
        quotas = values[op.quotas]
        if op.over == "all":
            kept[...] = self._best(values, quotas, op.kv.blocks, counts)[..., : op.kv.free_blocks]
            if op.mass is not None:
                kept |= self._reaching(values, np.zeros_like(quotas), counts, op.mass)
        elif op.mass is not None:
            kept[...] = self._reaching(values, quotas, counts, op.mass)
        else:
            kept[...] = self._best(values, quotas, op.kv.free_blocks, counts)
        return mask

    def _best(self, values: Values, quotas: np.ndarray, columns: int, counts: np.ndarray) -> np.ndarray:
        """As many of the first columns as the quotas say, the best of every unprotected row."""
        most = int(np.clip(quotas.max(initial=0), 1, columns))
        inputs = self._inputs(values, columns, counts) | {"most": np.array(most)}
        ranked = np.empty((*inputs["shape"][:3], most), np.int32)
        _run(self._model, inputs, [ranked], self._device)
        within = None if quotas.min(initial=most) >= most else np.arange(most) < quotas[..., None]
        return _written(ranked, within, columns)

    def _reaching(self, values: Values, quotas: np.ndarray, counts: np.ndarray, mass: float) -> np.ndarray:
        """The fewest best unprotected columns that, with protected ones, reach the mass, and at least the quotas."""
        free = self.op.kv.free_blocks
        with np.errstate(divide="ignore"):  # of blocks without tokens
            log_counts = np.log(counts).astype(np.float32)
        inputs = self._inputs(values, self.op.kv.blocks, counts)
        inputs |= {"most": np.array(free), "free": np.array([free]), "mass": np.array([mass], np.float32)}
        inputs["log_counts"] = log_counts[:, None, None]
        shape = (*inputs["shape"][:3], free)
        ranked, wanted = np.empty(shape, np.int32), np.empty(shape, bool)
        _run(self._model._replace(mass=True), inputs, [ranked, wanted], self._device)
        wanted |= np.arange(free) < quotas[..., None]
        return _written(ranked, wanted, free)

    def _inputs(self, values: Values, columns: int, counts: np.ndarray) -> dict[str, np.ndarray]:
        """What the graph reads of unprotected rows and the first columns."""
        rows = self.op.q.free_blocks
        if self._score is None:
            score = values[self.op.score][:, :, :rows, :columns]
            inputs = {"score": np.ascontiguousarray(score), "shape": np.array(score.shape)}
        else:
            inputs = self._score.inputs(values, rows, columns)
        return inputs | {"absent": np.ascontiguousarray(counts[:, None, None, :columns] == 0)}


def _run(model: SelectionModel, inputs: dict[str, np.ndarray], outputs: list[np.ndarray], device: Device) -> None:
    requests, names = selection_requests(model, device)
    requests.run((), [([inputs[name] for name in names], outputs)])


def _written(ranked: np.ndarray, wanted: np.ndarray | None, columns: int) -> np.ndarray:
    """True at the ranked columns that are wanted (None: all of them), bool ``[B, H, rows, columns]``."""
    grid = ranked.shape[:3]
    kept = np.zeros((*grid, columns), bool)
    first = np.arange(kept.size // columns).reshape(grid)[..., None] * columns
    kept.reshape(-1)[ranked + first] = True if wanted is None else np.broadcast_to(wanted, ranked.shape)
    return kept
