"""The oracle: what the documentation says, written a second time, in NumPy, with the whole logit matrix at once.

Nothing here calls rainfusion. The token order sorts tokens by where their window stands instead of folding boxes; the
attention is masked softmax over every token and every block mean; the selection is judged by score thresholds.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

import ml_dtypes
import numpy as np

from tests.fuzz import eight_bits
from tests.fuzz.eight_bits import Rounding, Tokens
from tests.fuzz.problems import Choice, Part, Problem

# The rule of the conformance kit: twice the error of the computation in the dtype, and a few roundings of the largest
# value; see docs/parity.md.
_ROUNDINGS = {"float64": 2.0**-47, "float32": 2.0**-18, "float16": 2.0**-11, "bfloat16": 2.0**-8}
_LSE_ROUNDINGS = {"float64": 2.0**-47, "float32": 2.0**-20}
_UNIT = {"float64": 2.0**-53, "float32": 2.0**-24}
# Weights are rounded to a dtype of 16 bits before they are multiplied with the values, which is more than a rounding of
# outputs that cancel. On accelerators float32 is multiplied as three TensorFloat-32 products.
_WEIGHT_UNIT = {"float16": 2.0**-11, "bfloat16": 2.0**-8}
_FAST_UNIT = 2.0**-20
_MASS_EPSILON = 1e-5
# Float32 arithmetic moves what 8 bits are rounded from by less than this, relative to the largest of its group.
_NUDGE = 2.0**-16
_E4M3_UNIT, _E4M3_LEAST = 2.0**-4, 2.0**-10 / 256  # half steps of a softmax weight: relative, and at the least

# What the block order holds, one after the other; see docs/layouts.md.
_WINDOW, _REMAINDER, _TOKENS, _SINK_OF_KEYS, _SINK, _TEXT = range(6)


# -- the block order -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Side:
    """Queries or keys in blocks: `order[p]` is the token at block position p."""

    order: np.ndarray
    block: int
    free: int  # leading blocks without a protected token

    @property
    def blocks(self) -> int:
        return -(-len(self.order) // self.block)

    def block_of_position(self) -> np.ndarray:
        return np.arange(len(self.order)) // self.block

    def counts(self, lengths: np.ndarray | None) -> np.ndarray:
        """Valid tokens of every block, ``[batch or 1, blocks]``."""
        valid = self.valid(lengths)
        return np.stack([np.bincount(self.block_of_position(), row, self.blocks) for row in valid])

    def valid(self, lengths: np.ndarray | None) -> np.ndarray:
        """Whether a position holds a token that counts, bool ``[batch or 1, positions]``."""
        position = np.arange(len(self.order))
        ends = np.array([len(self.order)]) if lengths is None else lengths
        return position < ends[:, None]


def sides(problem: Problem) -> tuple[Side, Side]:
    """The query side and the key side."""
    order, protected_rows, protected_columns = token_order(problem.parts, problem.window, problem.block)
    made = []
    for length, block, protected in (
        (problem.q_len, problem.block[0], protected_rows),
        (problem.kv_len, problem.block[1], protected_columns),
    ):
        has_parts = bool(problem.parts) and length == len(order)
        free = (length - protected) // block if has_parts and protected else -(-length // block)
        walked = order if has_parts and problem.order == "window" else np.arange(length)
        made.append(Side(walked, block, free))
    return made[0], made[1]


def token_order(
    parts: tuple[Part, ...], window: tuple[int, int, int] | None, block: tuple[int, int]
) -> tuple[np.ndarray, int, int]:
    """The token at every block position, and how many of the last ones are protected as queries and as keys."""
    keys: list[tuple[Any, ...]] = []  # by which tokens are sorted
    rows = columns = 0
    for index, part in enumerate(parts):
        if part.kind != "grid":
            rank = _TEXT if part.kind == "text" else _TOKENS
            keys += [(rank, index, i) for i in range(part.count)]
            rows, columns = (n + part.count * (rank == _TEXT) for n in (rows, columns))
            continue
        sinks = part.sinks if part.sizes[0] > 1 else ()
        dense, frame = sum(not name.endswith("_keys") for name in sinks), part.sizes[1] * part.sizes[2]
        rows, columns = rows + dense * frame, columns + len(sinks) * frame
        keys += _grid_keys(part, index, window, block, sinks)
    order = np.array(sorted(range(len(keys)), key=keys.__getitem__), dtype=np.int64)
    return order, rows, columns


def _grid_keys(
    part: Part, index: int, window: tuple[int, int, int] | None, block: tuple[int, int], sinks: tuple[str, ...]
) -> list[tuple[Any, ...]]:
    frames, height, width = part.sizes
    sink_of = {(0 if name.startswith("first") else frames - 1): name for name in sinks}
    first, last = int(0 in sink_of), frames - int(frames - 1 in sink_of)
    sizes = (last - first, height, width)
    chosen = part.window or window or compact_window(math.lcm(*block), (sizes[0] or frames, height, width))
    whole = [size // step * step for size, step in zip(sizes, chosen, strict=True)]
    keys: list[tuple[Any, ...]] = []
    for t, h, w in product(range(frames), range(height), range(width)):
        if t in sink_of:
            name = sink_of[t]
            keys.append((_SINK_OF_KEYS if name.endswith("_keys") else _SINK, index, name, h, w))
            continue
        place = (t - first, h, w)
        ragged = [at >= end for at, end in zip(place, whole, strict=True)]
        cell = [0 if r else at // step for r, at, step in zip(ragged, place, chosen, strict=True)]
        box = (ragged[0], ragged[2], ragged[1])  # remainders stand as H, W, HW, T, TH, TW, THW
        keys.append((_REMAINDER if any(ragged) else _WINDOW, index, *box, *cell, *place))
    return keys


def compact_window(volume: int, sizes: tuple[int, int, int]) -> tuple[int, int, int]:
    """The box of that volume with the least ``8 t² + h² + w²`` that fits, the wider of two equals; or any box."""
    boxes = [
        (t, h, volume // (t * h))
        for t in range(1, volume + 1)
        if volume % t == 0
        for h in range(1, volume // t + 1)
        if volume // t % h == 0
    ]
    fitting = [box for box in boxes if all(n <= size for n, size in zip(box, sizes, strict=True))]
    return min(fitting or boxes, key=lambda box: (8 * box[0] ** 2 + box[1] ** 2 + box[2] ** 2, -box[2]))


# -- attention -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Expected:
    """Output ``[batch, heads, tokens, channels]`` and log-sum-exp, and how far from them a backend may be.

    Attributes:
        weights_limit: how far outputs may be apart that round softmax weights against other maxima, in 8 bits.
    """

    out: np.ndarray
    lse: np.ndarray
    out_limit: float
    lse_limit: float
    weights_limit: float = 0.0


@dataclass
class Oracle:
    """What is right for a problem; `tensors` are q, k and v in float64, `lengths` within the sequence."""

    problem: Problem
    tensors: dict[str, np.ndarray]
    lengths: np.ndarray | None = None
    q: Side = field(init=False)
    kv: Side = field(init=False)

    def __post_init__(self) -> None:
        self.q, self.kv = sides(self.problem)
        if self.problem.lengths is not None:
            self.lengths = np.clip(self.problem.lengths, 0, self.problem.kv_len)

    @property
    def q_lengths(self) -> np.ndarray | None:
        return self.lengths if self.problem.on_queries else None

    @property
    def wide(self) -> str:
        """The dtype that is computed in."""
        return "float64" if self.problem.dtype == "float64" else "float32"

    def attend(self, mask: np.ndarray, omitted: str, *, given: bool = False, fast_products: bool = False) -> Expected:
        """Attention over the blocks of a mask.

        Args:
            given: the mask is, whatever chose it.
            fast_products: allow what kernels of accelerators do: the means of omitted blocks rounded to the tensors'
                dtype, and float32 as three TensorFloat-32 products.
        """
        if self.problem.precision is not None:
            walked = self._as_given() if self._needs_no_order() and not given else self
            return walked._in_8_bits(mask, omitted, fast_products)
        with np.errstate(all="ignore"):
            out, lse = self._attend(mask, omitted, "float64")
            coarse, coarse_lse = self._attend(mask, omitted, "float32")
            share = _UNIT[self.wide] / _UNIT["float32"]
            noise = (16 if fast_products else 4) * _UNIT[self.wide] * self._magnitude()
            out_error = _worst(_rounded(coarse, self.problem.dtype), out) * share
            if fast_products and omitted == "summary":
                rounded, _ = self._attend(mask, omitted, "float32", mean_dtype=self.problem.dtype)
                out_error = max(out_error, _worst(_rounded(rounded, self.problem.dtype), out))
            weights = _WEIGHT_UNIT.get(self.problem.dtype, _FAST_UNIT if fast_products else 0.0)
            if weights:
                spread, _ = self._attend(mask, omitted, "float32", of_values=np.abs)
                weights *= _largest(spread)
            lse_error = _worst(coarse_lse, lse) * share
        largest, largest_lse = _largest(out), max(_largest(lse), 1.0)
        values = _largest(self.tensors["v"])
        return Expected(
            out,
            lse,
            2 * out_error + _ROUNDINGS[self.problem.dtype] * largest + noise * values + weights,
            2 * lse_error + _LSE_ROUNDINGS[self.wide] * largest_lse + noise,
        )

    def _attend(
        self,
        mask: np.ndarray,
        omitted: str,
        dtype: str,
        *,
        mean_dtype: str | None = None,
        of_values: Callable[[np.ndarray], np.ndarray] | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Output and log-sum-exp in a dtype, of rounded means and of a function of the values where these are given."""
        q, k, v = (x.astype(dtype) for x in self._in_blocks())
        v = v if of_values is None else of_values(v)
        scale = np.dtype(dtype).type(self.problem.logit_scale)
        rows = np.take(mask, self.q.block_of_position(), axis=2)
        keep = np.take(rows, self.kv.block_of_position(), axis=3) & self.kv.valid(self.lengths)[:, None, None, :]
        logits = q @ k.swapaxes(2, 3) * scale
        values = v
        if omitted == "summary":
            counts = self.kv.counts(self.lengths)[:, None, None, :]
            kb, vb = self.means(k, self.kv, self.lengths), self.means(v, self.kv, self.lengths)
            if mean_dtype is not None:
                kb, vb = (_rounded(x, mean_dtype).astype(dtype) for x in (kb, vb))
            rest = q @ kb.swapaxes(2, 3) * scale + np.log(np.maximum(counts, 1)).astype(dtype)
            logits = np.concatenate([logits, rest], axis=3)
            keep = np.concatenate([keep, ~rows & (counts > 0)], axis=3)
            values = np.concatenate([v, vb], axis=2)
        return self._given_back(*eight_bits.softmax(logits, keep, values))

    def _given_back(self, out: np.ndarray, lse: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """In the caller's token order, padded queries without a result."""
        valid = self.q.valid(self.q_lengths)[:, None, :]
        out, lse = np.where(valid[..., None], out, 0), np.where(valid, lse, -np.inf)
        back = np.argsort(self.q.order)
        return out[:, :, back], lse[:, :, back]

    def _in_8_bits(self, mask: np.ndarray, omitted: str, fast_products: bool) -> Expected:
        """`attend` in 8 bits: what ties cost, every rounding nudged up or down, is allowed four times."""
        problem = self.problem
        assert problem.precision is not None
        plain = Rounding(problem.precision, problem.rotate)
        with np.errstate(all="ignore"):
            noise = (16 if fast_products else 4) * _UNIT[self.wide] * self._magnitude()
            nudges = [(sign * _NUDGE, sign * (_NUDGE + min(noise, 0.125))) for sign in (1, -1)]
            out, lse = self._attend_rounded(mask, omitted, "float64", plain)
            others = [self._attend_rounded(mask, omitted, "float32", plain)]
            others += [
                self._attend_rounded(mask, omitted, "float64", replace(plain, nudge=a, nudge_weights=b))
                for a, b in nudges
            ]
            out_error = max(_worst(_rounded(other, problem.dtype), out) for other, _ in others)
            lse_error = max(_worst(other, lse) for _, other in others)
            spread, _ = self._attend_rounded(mask, omitted, "float64", None)
            values = _largest(self.tensors["v"])
            weights = 2 * (_E4M3_UNIT * _largest(spread) + _E4M3_LEAST * 2 * values * problem.kv_len)
        rounding = _ROUNDINGS[problem.dtype] * _largest(out) + noise * values
        return Expected(
            out,
            lse,
            4 * out_error + rounding + (weights if fast_products else 0.0),
            4 * lse_error + _LSE_ROUNDINGS[self.wide] * max(_largest(lse), 1.0) + noise,
            weights,
        )

    def _as_given(self) -> Oracle:
        """The same with tokens in their own order: blocks of other tokens share a scale."""
        return Oracle(replace(self.problem, order="given"), self.tensors)

    def _needs_no_order(self) -> bool:
        """Whether everything is attended, whatever the scores, so that tokens are not put into window order."""
        problem = self.problem
        if problem.order == "given" or problem.choice.kind == "mask" or problem.with_quotas:
            return False
        last = [part.kind for part in problem.parts if part.count][-1:]
        if problem.lengths is not None and last != ["text"]:
            return False  # the order says which tokens are padding
        if problem.choice.kind == "paper":
            return not self.q.free or bool((self._quotas_of_paper() >= self.kv.blocks).all())
        least, _ = self._least(problem.choice, None) if self.q.free else (np.zeros(2), None)
        return not self.q.free or bool((least[0] >= self.kv.free).all())

    def _attend_rounded(
        self, mask: np.ndarray, omitted: str, dtype: str, rounding: Rounding | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Output and log-sum-exp in 8 bits, computed in a dtype; without a rounding the mean distance to the centre."""
        exact = rounding is None
        rounding = rounding or Rounding(str(self.problem.precision), self.problem.rotate)
        q, k, v = (x.astype(dtype) for x in self._in_blocks())
        scale = np.dtype(dtype).type(self.problem.logit_scale)
        valid = self.kv.valid(self.lengths)
        keys, values = Tokens(k, valid), Tokens(v, valid)
        centre, centre_v = keys.centre(), values.centre()
        of_channels = eight_bits.scale_of_channels(values, centre_v)
        q8 = eight_bits.by_blocks(rounding, Tokens(q, self.q.valid(self.q_lengths)), self.q.block, 0.0)
        rows = np.take(mask, self.q.block_of_position(), axis=2)
        keep = np.take(rows, self.kv.block_of_position(), axis=3) & valid[:, None, None, :]

        def over(keys: Tokens, values: Tokens, keep: np.ndarray, added: Any) -> tuple[np.ndarray, np.ndarray]:
            k8 = eight_bits.by_blocks(rounding, keys, self.kv.block, centre)
            v8 = eight_bits.by_channels(rounding, values, centre_v, of_channels)
            logits = q8 @ k8.swapaxes(2, 3) * scale + added
            if exact:
                return eight_bits.softmax(logits, keep, np.abs(v8))
            return eight_bits.softmax(logits, keep, v8, rounding)

        parts = [over(keys, values, keep, np.dtype(dtype).type(0))]
        if omitted == "summary":
            counts = self.kv.counts(self.lengths)
            means = (Tokens(self.means(x, self.kv, self.lengths), counts > 0) for x in (k, v))
            logs = np.log(np.maximum(counts, 1)).astype(dtype)[:, None, None, :]
            parts.append(over(*means, ~rows & (counts > 0)[:, None, None, :], logs))
        out, lse = eight_bits.merged(parts)
        if not exact:
            out = np.where(np.isneginf(lse)[..., None], out, out + centre_v)
        return self._given_back(out, lse)

    def _in_blocks(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """q, k and v in block order, each head of q with its own k and v, padding as zeros."""
        found = []
        for name, side, lengths in (
            ("q", self.q, self.q_lengths),
            ("k", self.kv, self.lengths),
            ("v", self.kv, self.lengths),
        ):
            x = self.tensors[name][:, :, side.order]
            x = np.where(side.valid(lengths)[:, None, :, None], x, 0.0)
            found.append(np.repeat(x, self.problem.heads // x.shape[1], axis=1))
        return found[0], found[1], found[2]

    @staticmethod
    def means(x: np.ndarray, side: Side, lengths: np.ndarray | None) -> np.ndarray:
        """Means of the valid tokens of every block, 0 where there are none; padding is zero in `x`."""
        starts = np.arange(side.blocks) * side.block
        counts = np.maximum(side.counts(lengths), 1).astype(x.dtype)
        sums: np.ndarray = np.add.reduceat(x, starts, axis=2)
        return sums / counts[:, None, :, None]

    def _magnitude(self) -> float:
        """The largest sum of absolute products behind a logit."""
        q, k, _ = (np.abs(x) for x in self._in_blocks())
        return _largest(q @ k.swapaxes(2, 3)) * abs(self.problem.logit_scale)

    # -- selection -------------------------------------------------------------------------------------

    def scores(self) -> tuple[np.ndarray, float]:
        """Scores of block pairs in float64, NaN and padding as minus infinity, and what the dtype cannot tell apart."""
        with np.errstate(all="ignore"):
            right, coarse = (self._scores(dtype) for dtype in ("float64", "float32"))
            share = _UNIT[self.wide] / _UNIT["float32"]
            q, k, _ = (np.abs(x) for x in self._in_blocks())
            means = self.means(q, self.q, self.q_lengths), self.means(k, self.kv, self.lengths)
            magnitude = _largest(means[0] @ means[1].swapaxes(2, 3)) * abs(self.problem.logit_scale)
            epsilon = share * (16 * _worst(coarse, right) + 2.0**-19 * magnitude)
        score = np.where(np.isnan(right), -np.inf, right)
        score = np.where(self.kv.counts(self.lengths)[:, None, None, :] > 0, score, -np.inf)
        return score, 0.0 if self.is_exact else epsilon

    @property
    def is_exact(self) -> bool:
        """Whether every score is exact in float32, so that ties are ties: whole numbers over powers of two."""
        p = self.problem
        sides_are = [
            n & (n - 1) == 0 and length % n == 0 for n, length in zip(p.block, (p.q_len, p.kv_len), strict=True)
        ]
        scale = math.frexp(p.logit_scale)[0] in (0.0, 0.5, -0.5)
        small = math.log2(p.block[0] * p.block[1] * p.head_dim) < 23
        return p.values == "whole" and p.lengths is None and scale and small and all(sides_are)

    def _scores(self, dtype: str) -> np.ndarray:
        q, k, _ = (x.astype(dtype) for x in self._in_blocks())
        qb, kb = self.means(q, self.q, self.q_lengths), self.means(k, self.kv, self.lengths)
        return qb @ kb.swapaxes(2, 3) * np.dtype(dtype).type(self.problem.logit_scale)

    def objections(self, mask: np.ndarray, quotas: np.ndarray | None) -> list[str]:
        """What is wrong with a mask that was selected."""
        rows, columns = self.q.free, self.kv.free
        found = [] if mask[:, :, rows:].all() else ["a protected row is not dense"]
        found += [] if mask[..., columns:].all() else ["a protected column is not dense"]
        score, epsilon = self.scores()
        kept, score = mask[:, :, :rows], score[:, :, :rows]
        if not rows or not columns:
            return found
        choice = self.problem.choice
        if choice.kind == "paper":
            return found + self._of_paper(kept[..., :columns], score, epsilon, quotas)
        found += not_the_best(kept[..., :columns], score[..., :columns], epsilon)
        least, total = self._least(choice, quotas)
        counts = kept[..., :columns].sum(axis=-1)
        if choice.mass is None or (choice.mass == 1.0 and quotas is None):
            return found + _of_counts(counts, least, total)
        return found + self._of_mass(kept, score, epsilon, least, choice.mass)

    def _least(self, choice: Choice, quotas: np.ndarray | None) -> tuple[np.ndarray, np.ndarray | None]:
        """The least and the most that quotas ask of every row ``[2, heads or 1, rows]``, and of every head together."""
        rows, columns = self.q.free, self.kv.free
        if quotas is not None:
            exact = np.clip(quotas, 0, columns)
            return np.stack([exact, exact]), None
        protected = self.kv.blocks - columns
        one = 0 if protected else 1
        if choice.kind == "topp":
            most = columns if choice.mass == 1.0 else math.ceil(choice.floor * self.kv.blocks) - protected
            return np.full((2, 1, rows), min(max(most, one), columns)), None
        if choice.kind == "hybrid" and choice.mass == 1.0:
            return np.full((2, 1, rows), columns), None
        pairs = self.q.blocks * self.kv.blocks
        shares = choice.sparsity if isinstance(choice.sparsity, tuple) else (choice.sparsity,)
        wanted = np.array([(1 - share) * pairs - (pairs - rows * columns) for share in shares])
        near = np.stack([np.ceil(wanted - 0.5 - 1e-9), np.floor(wanted + 0.5 + 1e-9)])
        total = np.clip(near, rows * one, rows * columns)
        least = np.stack([total[0] // rows, -(-total[1] // rows)])[..., None]
        return np.broadcast_to(least, (2, len(shares), rows)), total

    def _of_paper(self, kept: np.ndarray, score: np.ndarray, epsilon: float, quotas: np.ndarray | None) -> list[str]:
        """The quotas' best blocks out of all columns, less the protected ones, which are kept anyway."""
        blocks = self.kv.blocks
        quotas = self._quotas_of_paper() if quotas is None else quotas
        place = np.broadcast_to(np.clip(quotas, 0, blocks), score.shape[:-1])
        inner = np.full((*score.shape[:-1], 1), np.inf)
        ranked = np.concatenate([inner, -np.sort(-score, axis=-1), -inner], axis=-1)
        lowest, highest = (np.take_along_axis(ranked, place[..., None] + i, axis=-1) for i in (0, 1))
        free = score[..., : self.kv.free]
        with np.errstate(invalid="ignore"):
            surely_in = (free > highest + epsilon) & (place > 0)[..., None]
            surely_out = (free < lowest - epsilon) | (place == 0)[..., None]
        found = [] if (kept | ~surely_in).all() else ["a block is skipped that is among the best of all columns"]
        return found + ([] if (~kept | ~surely_out).all() else ["a block is kept that is not among the best"])

    def _quotas_of_paper(self) -> np.ndarray:
        choice = self.problem.choice
        shares = choice.sparsity if isinstance(choice.sparsity, tuple) else (choice.sparsity,)
        return np.array([[math.ceil((1 - share) * self.kv.blocks)] * self.q.free for share in shares])

    def _of_mass(
        self, kept: np.ndarray, score: np.ndarray, epsilon: float, least: np.ndarray, mass: float
    ) -> list[str]:
        """The fewest best blocks that reach the mass, and no fewer than the quotas."""
        columns = self.kv.free
        share = _shares(score, self.kv.counts(self.lengths)[:, None, None, :])
        reached = np.where(kept, share, 0.0).sum(axis=-1)
        counts = kept[..., :columns].sum(axis=-1)
        free = score[..., :columns]
        lowest = np.min(np.where(kept[..., :columns], free, np.inf), axis=-1, keepdims=True)
        with np.errstate(invalid="ignore"):
            last = kept[..., :columns] & (free <= lowest + epsilon)
        before = reached - np.where(last, share[..., :columns], 0.0).max(axis=-1)
        tolerance = _MASS_EPSILON + 4 * epsilon
        empty = share.sum(axis=-1) == 0
        short = (reached < mass - tolerance) & (counts < columns) & ~empty
        spare = (counts > least[1]) & ((before > mass + tolerance) | empty)
        found = ["fewer blocks than reach the mass"] if short.any() else []
        found += ["more blocks than reach the mass"] if spare.any() else []
        return found + (["fewer blocks than the quotas"] if (counts < least[0]).any() else [])


def not_the_best(kept: np.ndarray, score: np.ndarray, epsilon: float) -> list[str]:
    """Whether what is kept of every row is the best of it, ties to the lower index."""
    if epsilon == 0:
        best_first = np.argsort(-score, axis=-1, kind="stable")
        in_order = np.take_along_axis(kept, best_first, axis=-1)
        return [] if (in_order[..., 1:] <= in_order[..., :-1]).all() else ["not the best, or a tie to a higher index"]
    lowest = np.min(np.where(kept, score, np.inf), axis=-1)
    highest = np.max(np.where(kept, -np.inf, score), axis=-1)
    worst = np.isneginf(score)
    among_worst = np.where(worst, kept, False)
    skipped_before = np.cumsum(worst & ~kept, axis=-1) > 0
    found = [] if (lowest >= highest - epsilon).all() else ["a skipped block has a higher score than a kept one"]
    return found + (["of blocks without a score, a later one is kept"] if (among_worst & skipped_before).any() else [])


def _of_counts(counts: np.ndarray, least: np.ndarray, total: np.ndarray | None) -> list[str]:
    if (counts < least[0]).any() or (counts > least[1]).any():
        return ["a row keeps another number of blocks than its quota"]
    if total is None:
        return []
    of_heads = counts.sum(axis=-1)
    return [] if ((of_heads >= total[0]) & (of_heads <= total[1])).all() else ["a head keeps another number of pairs"]


def _shares(score: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The softmax over blocks, each weighted by its tokens; 0 in a row without any."""
    with np.errstate(divide="ignore", invalid="ignore"):
        logits = score + np.log(counts)
        peak = logits.max(axis=-1, keepdims=True)
        weights = np.exp(logits - np.where(np.isfinite(peak), peak, 0.0))
    total = weights.sum(axis=-1, keepdims=True)
    shares: np.ndarray = weights / np.where(total == 0, 1.0, total)
    return shares


def _rounded(x: np.ndarray, dtype: str) -> np.ndarray:
    return x.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype).astype(np.float64)


def _largest(x: np.ndarray) -> float:
    return float(np.max(np.abs(x), initial=0.0, where=np.isfinite(x)))


def _worst(x: np.ndarray, right: np.ndarray) -> float:
    with np.errstate(invalid="ignore"):
        difference = np.abs(x.astype(np.float64) - right)
    return float(np.max(difference, initial=0.0, where=np.isfinite(right) & np.isfinite(x)))
