"""How far a backend may be from the oracle, and why.

**Outputs.** The oracle computes in float64 from inputs already rounded to the case's dtype. A backend may be off by at
most twice the error of the definition itself when it runs in that dtype (float32 arithmetic, output rounded to the
dtype), plus a small share of the largest output. The factor covers another order of summation; it grows and shrinks
with the case, so that large logits do not need a tolerance of their own. The share covers what the definition does not
do and good kernels do: 16-bit probabilities before the second product, fast exponentials. It is a few roundings of the
dtype, so no wrong scale, dropped block or TensorFloat-32 product passes as float32.

**float64.** There the definition is the oracle and shows no error; its float32 error scaled by the ratio of the
roundings stands in.

**8 bits.** The oracle stays exact: the definition's error is that of its rounding to 8 bits. Kernels that round at
other points, such as weights against a running maximum, stay within twice of it. Where logits are wide, one rounding
may move most of a row's weight, and the largest error says little; so the root mean square error is held to the same
rule.

**Log-sum-exp.** The same rule; it is float32 (float64 for float64) whatever the dtype of the tensors.

**Masks.** Scores are float32 (Law 2), so two right answers differ only where float32 cannot tell two blocks apart: a
pair may differ from the oracle's choice if its score lies within `score_epsilon` of the border of its row, the gap
between the lowest kept and the highest skipped score. Where scores are exact (the cases of ties), the lower index wins
and nothing may differ.
"""

from __future__ import annotations

import numpy as np

from rainfusion.testing.numbers import UNIT_ROUNDOFF

# As a share of the largest expected value.
ATOL = {"float64": 2.0**-47, "float32": 2.0**-18, "float16": 2.0**-11, "bfloat16": 2.0**-8}
LSE_ATOL = {"float64": 2.0**-47, "float32": 2.0**-20}

# Block scores: room for another order of summation, and for a float32 product made of three bfloat16 ones.
SCORE_FACTOR, SCORE_RTOL = 16, 2.0**-19
MASS_EPSILON = 1e-5

FLOAT64_FROM_FLOAT32 = UNIT_ROUNDOFF["float64"] / UNIT_ROUNDOFF["float32"]


def output_limit(dtype: str, definition_error: float, largest: float) -> float:
    """Largest allowed absolute error of an output."""
    return 2 * definition_error + ATOL[dtype] * largest


def lse_limit(dtype: str, definition_error: float, largest: float) -> float:
    """Largest allowed absolute error of a log-sum-exp; `dtype` is that of the tensors."""
    atol = LSE_ATOL["float64" if dtype == "float64" else "float32"]
    return 2 * definition_error + atol * max(largest, 1.0)


def score_epsilon(definition_error: float, magnitude: float) -> float:
    """How close two scores are that float32 need not tell apart.

    Args:
        definition_error: worst error of the scores by the definition in float32.
        magnitude: largest sum of the absolute products that make up a score.
    """
    return SCORE_FACTOR * definition_error + SCORE_RTOL * magnitude


def near_border(score: np.ndarray, kept: np.ndarray, epsilon: float) -> np.ndarray:
    """Pairs whose choice an error of `epsilon` in the scores may turn round: bool like `score`.

    Args:
        score: the oracle's scores of the competing blocks, float64 ``[B, H, rows, blocks]``, NaN as minus infinity.
        kept: how many of them every row keeps, the best ones.
    """
    border = np.full((*score.shape[:-1], 1), np.inf)
    best_first = np.concatenate([border, -np.sort(-score, axis=-1), -border], axis=-1)
    place = np.broadcast_to(np.clip(kept, 0, score.shape[-1])[..., None], border.shape)
    lowest_kept, highest_skipped = (np.take_along_axis(best_first, place + i, axis=-1) for i in (0, 1))
    near: np.ndarray = (score >= lowest_kept - epsilon) & (score <= highest_skipped + epsilon)
    return near


def mass_nearly_reached(score: np.ndarray, counts: np.ndarray, free: int, mass: float) -> np.ndarray:
    """Pairs before which the share of the mass is within `MASS_EPSILON` of the one asked for; best first.

    Args:
        score: as for `near_border`, those of protected blocks too.
        counts: tokens of every key block, broadcastable to `score`.
        free: leading blocks that are not protected.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        logits = np.minimum(score + np.log(counts), np.finfo(np.float64).max)
        weights = np.nan_to_num(np.exp(logits - np.max(logits, axis=-1, keepdims=True)))
        share = weights / np.maximum(weights.sum(axis=-1, keepdims=True), np.finfo(np.float64).tiny)
    best_first = np.argsort(-score[..., :free], axis=-1, kind="stable")
    ranked = np.take_along_axis(share, best_first, axis=-1)
    before = np.cumsum(ranked, axis=-1) - ranked + share[..., free:].sum(axis=-1, keepdims=True)
    near = np.zeros(score.shape, dtype=bool)
    np.put_along_axis(near, best_first, np.abs(before - mass) <= MASS_EPSILON, axis=-1)
    return near
