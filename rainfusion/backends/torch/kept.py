"""Attention of every query block over the key blocks it keeps, a chunk of equally long rows at a time."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

import numpy as np
import torch
from torch import Tensor

from rainfusion.backends.torch.blocks import Bucket, Rows, Scratch, bucket, counts_of, gather, kept_first
from rainfusion.backends.torch.softmax import Attended, by_products, compute_dtype, fused, is_half
from rainfusion.core.ops import Attend, Select, merge
from rainfusion.core.plan import Plan

# What a chunk takes (gathered keys and values, scores where they are written out): within the cache on a CPU,
# enough rows to fill an accelerator. One row always fits.
CPU_CHUNK_BYTES = 8 << 20
ACCELERATOR_CHUNK_BYTES = 512 << 20


@dataclass(frozen=True)
class Folded:
    """The tensors of one call in blocks.

    Attributes:
        queries: ``[rows, block, D]``; keys, values: ``[blocks, block, D]``, zeros beyond a sample's length.
        means: of the keys and values of every block, ``[blocks, 1, D]``; None drops what is omitted.
        mask: bool ``[B, H, q blocks, key blocks]``.
        lengths: int ``[B]``, or None.
    """

    queries: Tensor
    keys: Tensor
    values: Tensor
    means: tuple[Tensor, Tensor] | None
    mask: Tensor
    lengths: Tensor | None


class AttendKept:
    """Attention over kept blocks for one `Attend` on one device. Calls share constants only, so it is thread-safe.

    Args:
        is_fused: whether torch's fused attention gives what is needed.
        needs_lse: the log-sum-exp is written, or is the weight of a merge.
    """

    def __init__(self, attend: Attend, plan: Plan, device: torch.device, *, is_fused: bool, needs_lse: bool) -> None:
        on_cpu = device.type == "cpu"
        q, k = plan.types[attend.q], plan.types[attend.k]
        dtype = getattr(torch, q.dtype)
        self._device, self._scale, self._block = device, attend.scale, attend.block
        self._kv_heads, self._kv_len = k.shape[1:3]
        self._kv_blocks = -(-self._kv_len // attend.block[1])
        self._needs_lse, self._dtype = needs_lse, compute_dtype(dtype)
        # For short runs of queries plain products beat torch's fused kernel on CPUs, but in half precision, whose
        # products would round the logits.
        self._is_fused = is_fused and not (on_cpu and not is_half(dtype))
        self._limit = CPU_CHUNK_BYTES if on_cpu else ACCELERATOR_CHUNK_BYTES
        self._padding = -self._kv_len % attend.block[1]
        # Protected blocks come last, and what selects keeps them in every row; a given mask promises nothing.
        maker = plan.maker(attend.mask)
        self._all_keep_last = isinstance(maker, Select) and maker.kv.free_blocks < maker.kv.blocks
        counts = plan.counts_of(attend.mask)
        self._rows = None if counts is None else self._bucket(np.broadcast_to(counts, (*q.shape[:2], counts.shape[1])))
        starts = np.arange(self._kv_blocks) * attend.block[1]
        self._starts = torch.from_numpy(starts).to(device)
        self._counts = torch.from_numpy(np.minimum(attend.block[1], self._kv_len - starts)).to(device)
        self._log_counts = self._counts.to(self._dtype).log()[None]

    @property
    def how(self) -> str:
        """How a chunk is attended, for ``print(executable)``."""
        return "gathered blocks, " + ("torch's fused attention" if self._is_fused else "two products")

    def __call__(self, given: Folded, out: Tensor, lse: Tensor | None) -> int:
        """Write the attention of each row to `out`, ``[rows, block, D]``, and its log-sum-exp to `lse`.

        Returns:
            The query block from which on all rows keep every key; those are left out.
        """
        rows = self._rows or self._bucket(counts_of(given.mask))
        mask, scratch = given.mask.flatten(0, 2), Scratch(self._device)
        rows_a_sample = len(mask) // given.mask.shape[0]
        log_counts = self._log_counts if given.lengths is None else self._valid_log_counts(given.lengths)
        for same in rows.buckets:
            blocks = kept_first(mask[same.rows])
            for part in self._chunks(same, given.keys):
                row, kept, omitted = same.rows[part], blocks[part, : same.width], blocks[part, same.width :]
                q, first = given.queries[row], same.first_block[part, None]
                sample = None if given.lengths is None else row // rows_a_sample
                made, made_lse = self._over_kept(q, given, kept, first, sample, scratch)
                if given.means is not None and omitted.shape[1]:
                    rest = self._over_means(q, given.means, omitted, first, _of(log_counts, sample, omitted), scratch)
                    made, made_lse = merge(made, made_lse, *rest)
                out.index_copy_(0, row, made.to(out.dtype))
                if lse is not None and made_lse is not None:
                    lse.index_copy_(0, row, made_lse)
        return rows.dense_from

    def _bucket(self, counts: np.ndarray) -> Rows:
        return bucket(counts, self._kv_heads, self._kv_blocks, self._device)

    def _chunks(self, same: Bucket, keys: Tensor) -> list[slice]:
        """The rows of a bucket, cut so that what a chunk takes stays within the limit."""
        a_key = 2 * keys.shape[2] * keys.dtype.itemsize
        a_key += 0 if self._is_fused else self._block[0] * self._dtype.itemsize
        step = max(1, self._limit // (max(same.width, 1) * self._block[1] * a_key))
        return [slice(start, start + step) for start in range(0, len(same.rows), step)]

    def _over_kept(
        self, q: Tensor, given: Folded, kept: Tensor, first: Tensor, sample: Tensor | None, scratch: Scratch
    ) -> Attended:
        """Rows ``[n, block, D]`` over the blocks each keeps, int64 ``[n, width]``."""
        if kept.shape[1] == 0:
            return torch.zeros_like(q), torch.full(q.shape[:2], -inf, dtype=self._dtype, device=self._device)
        k, v = (gather(x, kept + first, use, scratch) for x, use in ((given.keys, "k"), (given.values, "v")))
        hidden = self._hidden(kept, given.lengths, sample)
        if self._padding and self._all_keep_last:
            k, v = k[:, : -self._padding], v[:, : -self._padding]
            hidden = None if hidden is None else hidden[..., : -self._padding]
        attended = None
        if self._is_fused:
            attended = fused(
                q[None],
                k[None],
                v[None],
                None if hidden is None else hidden[None],
                self._scale,
                needs_lse=self._needs_lse,
            )
        if attended is not None:
            return attended[0][0], None if attended[1] is None else attended[1][0]
        scores = scratch.take("scores", (*q.shape[:2], k.shape[1]), self._dtype)
        return by_products(q, k, v, None, hidden, self._scale, scores)

    def _over_means(
        self, q: Tensor, means: tuple[Tensor, Tensor], omitted: Tensor, first: Tensor, bias: Tensor, scratch: Scratch
    ) -> tuple[Tensor, Tensor]:
        """Rows over the means of the blocks each omits, every mean counting as often as its block has tokens."""
        k, v = (gather(x, omitted + first, use, scratch) for x, use in zip(means, ("kb", "vb"), strict=True))
        scores = scratch.take("mean scores", (*q.shape[:2], k.shape[1]), self._dtype)
        bias = bias[:, None]
        return by_products(q, k, v, bias, bias == -inf, self._scale, scores)

    def _hidden(self, kept: Tensor, lengths: Tensor | None, sample: Tensor | None) -> Tensor | None:
        """Gathered keys that are padding, of a ragged last block or beyond a sample's length: bool ``[n, 1, keys]``."""
        if lengths is None and (not self._padding or self._all_keep_last):
            return None
        end = self._kv_len if lengths is None else lengths.clamp(max=self._kv_len)[sample][:, None, None]
        token = kept[..., None] * self._block[1] + torch.arange(self._block[1], device=self._device)
        return (token >= end).view(len(kept), 1, -1)

    def _valid_log_counts(self, lengths: Tensor) -> Tensor:
        """The log of every block's tokens below each sample's length, ``[B, key blocks]``."""
        valid = torch.minimum((lengths[:, None] - self._starts).clamp(min=0), self._counts)
        return valid.to(self._dtype).log()


def _of(log_counts: Tensor, sample: Tensor | None, blocks: Tensor) -> Tensor:
    """The log counts of int64 ``[n, width]`` blocks of the samples of n rows."""
    return log_counts[0][blocks] if sample is None else log_counts[sample].gather(1, blocks)
