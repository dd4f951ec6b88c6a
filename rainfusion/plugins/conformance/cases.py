"""Case: one attention call that every backend must get right, and the cases every backend gets."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import numpy as np

from rainfusion.core.backend import Capabilities
from rainfusion.core.checks import one_of
from rainfusion.core.errors import ProblemError
from rainfusion.core.ir import Plan
from rainfusion.core.layout import TokenLayout
from rainfusion.core.mask import BlockMask
from rainfusion.core.planner import plan
from rainfusion.core.policy import Fixed, Policy, TopK, TopP
from rainfusion.core.problem import DTYPES, AttentionProblem
from rainfusion.plugins.conformance.inputs import CLIP_GRID, POISONED_BLOCK, RECIPES, Inputs
from rainfusion.plugins.conformance.rounding import rounded
from rainfusion.plugins.manager import host

KEPT = ("mixed", "one", "all")


@dataclass(frozen=True)
class Case:
    """One attention call: what is planned, and the numbers it is fed.

    Args:
        name: unique; part of the test's id.
        problem, layout, policy, omitted, order, returns: as for `rainfusion.plan`.
        values: the recipe of the inputs, a name in `inputs.RECIPES`.
        seed: of the generator that the recipe and the random mask draw from.
        kept: blocks a row keeps in the mask that is given, a name in `KEPT`.
        strided: hand the tensors over as non-contiguous views.

    Raises:
        ProblemError: an unknown recipe, or another `kept`.
    """

    name: str
    problem: AttentionProblem
    layout: TokenLayout = field(default_factory=TokenLayout)
    policy: Policy = field(default_factory=lambda: TopK(0.5))
    omitted: str = "drop"
    order: str = "window"
    returns: tuple[str, ...] = ("%out",)
    values: str = "normal"
    seed: int = 0
    kept: str = "mixed"
    strided: bool = False

    def __post_init__(self) -> None:
        one_of(self.values, RECIPES, "values", ProblemError)
        one_of(self.kept, KEPT, "kept", ProblemError)

    def plan(self, **changes: Any) -> Plan:
        """The plan of this case; `changes` replace arguments of `rainfusion.plan`."""
        arguments = {name: getattr(self, name) for name in ("omitted", "order", "returns", "policy")}
        return plan(self.problem, self.layout, **{**arguments, **changes})

    @property
    def selects(self) -> bool:
        """Whether the plan selects its mask, rather than being given one or keeping everything."""
        return any(op.name == "select" for op in self.plan().ops)

    def inputs(self) -> Inputs:
        """q, k, v as float64 ``[B, H, tokens, D]``, holding values of the case's dtype. Read-only; cached."""
        return _inputs(self)

    def mask(self) -> BlockMask:
        """A random mask for this case, on NumPy.

        Rows of any length, the first of a single block, the last as full as can be; or all of them like the
        one or the other.
        """
        rng = np.random.default_rng((self.seed, 1))
        made = self.plan()
        rank = rng.random((self.problem.batch, self.problem.heads, made.q_axis.blocks, made.kv_axis.blocks))
        most = rank.shape[-1]
        if self.values == "poisoned_block":
            rank[..., POISONED_BLOCK], most = np.inf, most - 1
        width = rng.integers(1, most, rank.shape[:3], endpoint=True)
        width[..., -1], width[..., 0] = most, 1
        if self.kept != "mixed":
            width[...] = {"one": 1, "all": most}[self.kept]
        blocks = np.argsort(np.argsort(rank, axis=-1), axis=-1) < width[..., None]
        return BlockMask(blocks, self.problem.q_len, self.problem.kv_len, self.layout.block)

    def block_order(self, side: int) -> np.ndarray:
        """Tokens of the query (0) or key (1) side, int64, in the order in which blocks are cut."""
        length = (self.problem.q_len, self.problem.kv_len)[side]
        ordered = self.order == "window" and self.layout.axis(length, side).ordered
        return self.layout.order if ordered else np.arange(length)  # type: ignore[return-value]

    def fingerprint(self) -> str:
        """SHA-256 of the inputs: equal where two machines computed on the same numbers."""
        digest = hashlib.sha256()
        for x in self.inputs():
            digest.update(np.ascontiguousarray(x, dtype="<f8").tobytes())
        return digest.hexdigest()

    def __str__(self) -> str:
        return self.name


@lru_cache(maxsize=8)
def _inputs(case: Case) -> Inputs:
    made = RECIPES[case.values](case, np.random.default_rng(case.seed))
    q, k, v = (rounded(x, case.problem.dtype) for x in made)
    for x in (q, k, v):
        x.flags.writeable = False
    return q, k, v


# -- the cases every backend gets ------------------------------------------------------------------

_VIDEO = (5, 8, 16)


def builtin_cases() -> tuple[Case, ...]:
    """The shared cases, each in all four dtypes; what a backend does not claim is skipped by name."""
    cases = (*_shapes(), *_methods(), *_numbers(), *_clips())
    return tuple(_in_dtype(case, dtype) for case in cases for dtype in DTYPES)


def every_case() -> tuple[Case, ...]:
    """The shared cases and those that plugins add by `rainfusion_conformance_cases`.

    Raises:
        ProblemError: a plugin's case is no `Case`, or two cases have one name.
    """
    added = [case for cases in host().manager.hook.rainfusion_conformance_cases() for case in cases]
    strange = [case for case in added if not isinstance(case, Case)]
    if strange:
        raise ProblemError(f"rainfusion_conformance_cases yields {strange[0]!r}; give rainfusion's conformance Case")
    cases = (*builtin_cases(), *added)
    names = Counter(case.name for case in cases)
    if len(names) < len(cases):
        raise ProblemError(f"conformance cases share a name: {', '.join(n for n in names if names[n] > 1)}")
    return cases


def claimed_case(
    claims: Capabilities,
    *,
    dtype: str | None = None,
    head_dim: int | None = None,
    block: tuple[int, int] | None = None,
    tensor_layout: str | None = None,
    **settings: Any,
) -> Case:
    """A small case of four ragged blocks within what is claimed; what is left open takes a claimed value."""
    block = block or min(claims.blocks or [(128, 128)])
    longest = max(block)
    length = min(3 * longest + longest // 2, claims.max_length or 4 * longest)
    problem = AttentionProblem(
        batch=1,
        heads=2,
        q_len=length,
        kv_len=length,
        head_dim=head_dim or min(claims.head_dims or [64]),
        dtype=dtype or next(name for name in ("bfloat16", *DTYPES) if name in claims.dtypes),
        tensor_layout=tensor_layout or min(claims.tensor_layouts),
    )
    return Case("claimed", problem, TokenLayout(block=block), **settings)


def _in_dtype(case: Case, dtype: str) -> Case:
    return replace(case, name=f"{case.name}-{DTYPES[dtype]}", problem=replace(case.problem, dtype=dtype))


def _shapes() -> Iterator[Case]:
    """Every kind of grid, side, head and block."""
    yield _video("video")
    yield _video("odd_grid", grid=(5, 11, 13))
    yield _video("below_the_window", grid=(6, 5, 30))
    yield _video("grid_within_a_block", grid=(2, 3, 5), policy=TopP(0.9))
    yield _video("image", grid=(1, 24, 28))
    yield _video("image_after_text", grid=(1, 21, 27), text=50, text_position="start")
    yield _video("no_sink", sink=None)
    yield _video("text_at_the_end", text=77)
    yield _video("text_at_the_start", text=77, text_position="start")
    yield _row("ragged_row", 700)
    yield _row("whole_blocks", 768)
    yield _row("less_than_a_block", 40, policy=TopP(0.9))
    yield _row("one_block_of_queries", 100, kv_len=900)
    yield _row("batch", 500, batch=2)
    yield _video("batch_of_videos", batch=3, heads=1, text=20)
    yield _row("grouped_heads", 600, heads=4, kv_heads=2)
    yield _row("one_key_head", 600, heads=3, kv_heads=1)
    yield _row("more_keys", 300, kv_len=900)
    yield _row("more_queries", 900, kv_len=300)
    yield _video("order_on_the_queries", kv_len=330)
    yield _video("order_on_the_keys", q_len=330)
    for dim in (24, 64, 80):
        yield _row(f"head_dim_{dim}", 600, head_dim=dim)
    yield _video("blocks_of_32", grid=(3, 9, 10), block=32)
    yield _video("blocks_of_64", grid=(3, 10, 14), block=64)
    yield _video("long_query_blocks", block=(128, 64), text=20)
    yield _video("long_key_blocks", block=(64, 128), text=20)
    yield _video("tokens_before_heads", tensor_layout="bshd")
    yield _row("strided", 600, strided=True)
    yield _row("strided_tokens_before_heads", 600, tensor_layout="bshd", strided=True)
    yield _row("own_scale", 600, scale=0.3)
    yield _video(
        "all_together",
        grid=(4, 11, 13),
        text=77,
        policy=TopK(0.2),
        returns=("%out", "%lse", "%mask"),
        strided=True,
        batch=2,
        heads=4,
        kv_heads=2,
        tensor_layout="bshd",
    )


def _methods() -> Iterator[Case]:
    """Every way to choose blocks, and to treat those that are not chosen."""
    yield _row("dense", 600, policy=TopK(0.0))
    yield _video("few_skipped", policy=TopK(0.2))
    yield _video("most_skipped", policy=TopK(0.8), sink=None)
    yield _row("one_block_a_row", 640, policy=TopK(0.8))
    yield _video("paper_counting", policy=TopK(0.6, "paper"), text=77)
    yield _video("mass", policy=TopP(0.7))
    yield _video("mass_with_floor", policy=TopP(0.2, floor=0.5), text=77)
    yield _video("given_mask", policy=Fixed())
    yield _row("single_blocks_kept", 700, policy=Fixed(), kept="one")
    yield _row("every_block_kept", 700, policy=Fixed(), kept="all", returns=("%out", "%lse"))
    yield _video("log_sum_exp", returns=("%out", "%lse"))
    yield _video("given_order", order="given", text=77)
    yield _video("summary", omitted="summary", text=77)
    yield _row("summary_of_ragged_blocks", 700, omitted="summary", policy=TopK(0.8), heads=4, kv_heads=2)
    yield _video("summary_under_a_given_mask", omitted="summary", policy=Fixed(), returns=("%out", "%lse"))


def _numbers() -> Iterator[Case]:
    """Numbers that break an implementation which is right on ordinary ones."""
    yield _row("large_logits", 700, values="large_logits")
    yield _video("peaked", values="peaked")
    yield _row("close_scores", 896, values="close_scores", policy=TopK(0.7))
    yield _row("exact_ties", 1024, values="ties", policy=TopK(0.7))
    yield _video("exact_ties_in_a_video", values="ties", sink=None, policy=TopK(0.6))
    yield _row("poisoned_block_not_chosen", 768, values="poisoned_block")
    yield _row("poisoned_block_masked_out", 700, values="poisoned_block", policy=Fixed())
    yield _video("poisoned_block_in_a_video", values="poisoned_block")
    yield _row("nan_query", 600, values="nan_query", policy=Fixed())
    yield _row("minus_infinity", 700, values="minus_infinity")
    yield _row("minus_infinity_in_dense", 300, values="minus_infinity", policy=TopK(0.0))
    yield _row("infinite_values", 700, values="infinite_values", policy=Fixed())


def _clips() -> Iterator[Case]:
    """Queries, keys and values of a real clip: blocks much alike, near ties, attention from diffuse to peaked."""
    yield _video("clip", grid=CLIP_GRID, values="clip", policy=TopK(0.6), head_dim=64)
    yield _video("clip_of_wide_heads", grid=CLIP_GRID, values="clip", policy=TopK(0.6))
    yield _video("clip_by_mass", grid=CLIP_GRID, values="clip", policy=TopP(0.5), head_dim=64)
    yield _video("clip_and_text", grid=CLIP_GRID, text=77, values="clip", policy=TopK(0.6), omitted="summary")


def _row(name: str, length: int, *, kv_len: int | None = None, block: Any = 128, **settings: Any) -> Case:
    """A case without a grid."""
    return _case(name, TokenLayout(block=block), length, kv_len or length, settings)


def _video(
    name: str,
    *,
    grid: tuple[int, int, int] = _VIDEO,
    text: int = 0,
    text_position: str = "end",
    block: Any = 128,
    sink: str | None = "first_frame",
    q_len: int | None = None,
    kv_len: int | None = None,
    **settings: Any,
) -> Case:
    """A case with a grid; a side whose length is given has none."""
    layout = TokenLayout(grid, text, text_position, None, block, sink)
    settings = {"policy": TopK(0.3), **settings}
    assert layout.length is not None
    return _case(name, layout, q_len or layout.length, kv_len or layout.length, settings)


def _case(name: str, layout: TokenLayout, q_len: int, kv_len: int, settings: dict[str, Any]) -> Case:
    """Sort the settings into those of the problem and those of the case."""
    of_problem = ("batch", "heads", "kv_heads", "head_dim", "scale", "tensor_layout")
    shape = {"batch": 1, "heads": 2, "head_dim": 128, **{key: settings[key] for key in of_problem if key in settings}}
    rest = {key: value for key, value in settings.items() if key not in of_problem}
    return Case(name, AttentionProblem(q_len=q_len, kv_len=kv_len, **shape), layout, **rest)
