"""Case: one attention call that every backend must get right, and the cases every backend gets."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import numpy as np

from rainfusion.core.backend import Capabilities
from rainfusion.core.checks import one_of
from rainfusion.core.errors import ProblemError
from rainfusion.core.layout import Grid, Text, TokenLayout, Tokens
from rainfusion.core.mask import BlockMask
from rainfusion.core.ops import Select
from rainfusion.core.plan import Plan
from rainfusion.core.planner import plan_with_notes
from rainfusion.core.policies import Fixed, Hybrid, Policy, TopK, TopP
from rainfusion.core.precision import FORMATS
from rainfusion.core.problem import DTYPES, AttentionProblem
from rainfusion.plugins.manager import host
from rainfusion.testing.extensions import NearBlocks, scale_scores
from rainfusion.testing.inputs import CLIP_GRID, NOT_FINITE, POISONED_BLOCK, RECIPES, Inputs
from rainfusion.testing.numbers import rounded

PRECISIONS = (*FORMATS,)
KEPT = ("mixed", "one", "all", "some_none")


@dataclass(frozen=True)
class Case:
    """One attention call: what is planned, and the numbers it is fed.

    Args:
        name: unique; part of the test's id.
        problem, layout, policy, omitted, order, returns, precision, rotate: as for `rainfusion.plan`.
        values: the recipe of the inputs, a name in `inputs.RECIPES`.
        seed: of the generator that the recipe and the random mask draw from.
        kept: blocks a row keeps in the mask that is given, a name in `KEPT`.
        strided: hand the tensors over as non-contiguous views.
        quotas: give row quotas at call time.
        kv_lengths: valid tokens of every sample, given at call time; empty for none.
        change: a pass over the plan.

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
    quotas: bool = False
    kv_lengths: tuple[int, ...] = ()
    precision: str | None = None
    rotate: bool = False
    change: Callable[[Plan], Plan] | None = None

    def __post_init__(self) -> None:
        one_of(self.values, RECIPES, "values", ProblemError)
        one_of(self.kept, KEPT, "kept", ProblemError)

    def plan(self, *, policy: Policy | None = None, returns: tuple[str, ...] | None = None) -> Plan:
        """The plan of this case, under another policy or with other returned values if these are given."""
        policy, returns = policy or self.policy, returns or self.returns
        given = {"quotas": self.quotas and policy != Fixed(), "kv_lengths": bool(self.kv_lengths)}
        named = ("omitted", "order", "precision", "rotate")
        settings: dict[str, Any] = {**{name: getattr(self, name) for name in named}, "returns": returns, **given}
        planned, _ = plan_with_notes(self.problem, self.layout, policy, **settings)
        return planned if self.change is None else self.change(planned)

    @property
    def selects(self) -> bool:
        """Whether the plan selects its mask, rather than being given one or keeping everything."""
        return self.plan().find(Select) is not None

    def operands(self, plan: Plan) -> dict[str, np.ndarray]:
        """What a call of `plan` is given beside tensors and a mask, int32."""
        found = {}
        if plan.takes("%quotas"):  # beyond what there is at either end: they are clamped
            shape, most = plan.types["%quotas"].shape, plan.kv_axis.free_blocks + 1
            found["quotas"] = np.random.default_rng((self.seed, 2)).integers(-1, most, shape, np.int32, endpoint=True)
        if plan.takes("%kv_lengths"):
            found["kv_lengths"] = np.asarray(self.kv_lengths, np.int32)
        return found

    def inputs(self) -> Inputs:
        """q, k, v as float64 ``[B, H, tokens, D]``, holding values of the case's dtype. Read-only; cached."""
        return _inputs(self)

    def mask(self) -> BlockMask:
        """A random mask, on NumPy: the first row of a single block, the last as full as can be; or as `kept` says."""
        rng = np.random.default_rng((self.seed, 1))
        sides = [self.layout.axis(length, side).blocks for side, length in enumerate(self.lengths)]
        rank = rng.random((self.problem.batch, self.problem.heads, *sides))
        most = rank.shape[-1]
        if self.values == "poisoned_block":
            rank[..., POISONED_BLOCK], most = np.inf, most - 1
        width = rng.integers(1, most, rank.shape[:3], endpoint=True)
        width[..., -1], width[..., 0] = most, 1
        rows, kept = {"mixed": (slice(0), 0), "one": (slice(None), 1), "all": (slice(None), most)}.get(
            self.kept, (slice(None, None, 3), 0)
        )
        width[..., rows] = kept
        return self.block_mask(np.argsort(np.argsort(rank, axis=-1), axis=-1) < width[..., None])

    def block_mask(self, blocks: np.ndarray) -> BlockMask:
        """A mask of this case's sizes."""
        return BlockMask(blocks, *self.lengths, self.layout.block)

    @property
    def lengths(self) -> tuple[int, int]:
        """Tokens on the query and on the key side."""
        return self.problem.q_len, self.problem.kv_len

    def block_order(self, side: int) -> np.ndarray:
        """Tokens of the query (0) or key (1) side, int64, in the order in which blocks are cut."""
        axis = self.layout.axis(self.lengths[side], side)
        order = self.layout.order if self.order == "window" and axis.ordered else None
        return np.arange(axis.length) if order is None else order

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
    values = RECIPES[case.values](case, np.random.default_rng(case.seed))
    q, k, v = (rounded(x, case.problem.dtype) for x in values)
    for x in (q, k, v):
        x.flags.writeable = False
    return q, k, v


# -- the cases every backend gets ------------------------------------------------------------------

_VIDEO = (5, 8, 16)


def builtin_cases() -> tuple[Case, ...]:
    """The shared cases, each in all four dtypes; what a backend does not claim is skipped by name."""
    cases = (*_shapes(), *_parts(), *_methods(), *_operands(), *_numbers(), *_clips(), *_in_8_bits())
    return tuple(_in_dtype(case, dtype) for case in cases for dtype in DTYPES)


def every_case() -> tuple[Case, ...]:
    """The shared cases and those that plugins add by `rainfusion_conformance_cases`.

    Raises:
        ProblemError: a plugin's case is no `Case`, or two cases have one name.
    """
    added = [case for cases in host().manager.hook.rainfusion_conformance_cases() for case in cases]
    strange = [case for case in added if not isinstance(case, Case)]
    if strange:
        raise ProblemError(f"rainfusion_conformance_cases yields {strange[0]!r}; give rainfusion.testing.Case")
    cases = (*builtin_cases(), *added)
    names = Counter(case.name for case in cases)
    if len(names) < len(cases):
        raise ProblemError(f"conformance cases share a name: {', '.join(n for n in names if names[n] > 1)}")
    return cases


def in_precision(cases: Iterable[Case], precision: str) -> tuple[Case, ...]:
    """Cases in another precision, with it in their names; not those of NaN and infinity, which rounding spreads.

    Raises:
        ProblemError: another precision than there is.
    """
    one_of(precision, PRECISIONS, "precision", ProblemError)
    finite = [case for case in cases if case.precision is None and case.values not in NOT_FINITE]
    return tuple(replace(case, name=f"{precision}_{case.name}", precision=precision) for case in finite)


def claimed_case(claims: Capabilities, *, block: tuple[int, int] | None = None, **settings: Any) -> Case:
    """A small case of four ragged blocks within what is claimed; what is left open takes a claimed value."""
    block = block or min(claims.blocks or [(128, 128)])
    length = min(3 * max(block) + max(block) // 2, claims.max_length or 4 * max(block))
    claimed = {
        "head_dim": min(claims.head_dims or [64]),
        "dtype": next(name for name in ("bfloat16", *DTYPES) if name in claims.dtypes),
        "tensor_layout": min(claims.tensor_layouts),
    }
    return _case("claimed", TokenLayout(block=block), length, length, {**claimed, **settings})


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


def _parts() -> Iterator[Case]:
    """Several grids, text anywhere, every sink."""
    yield _video("sink_of_keys", sink="first_frame_keys")
    yield _video("two_sinks", sink=("first_frame", "last_frame_keys"), grid=(6, 8, 16))
    yield _video("last_frame", sink="last_frame", text=20)
    yield _of_parts("several_images", Grid(1, 13, 15), Grid(1, 9, 11), Grid(1, 8, 8), Text(30))
    yield _of_parts("audio_between_clips", Text(20), Grid(3, 9, 10), Tokens(70), Grid(4, 8, 16, sink="last_frame_keys"))


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
    yield _row("shares_of_heads", 900, policy=TopK((0.3, 0.8)))
    yield _video("paper_counting_without_text", policy=TopK(0.7, "paper"))
    yield _video("count_and_mass", policy=Hybrid(0.7, 0.6), text=20)
    yield _video("prior", policy=NearBlocks(0.6), sink=None)
    yield _row("prior_in_one_block_a_row", 640, policy=NearBlocks(0.8), heads=4, kv_heads=2)
    yield _video("foreign_operation", change=scale_scores, text=20)
    yield _row("foreign_operation_and_summary", 700, change=scale_scores, omitted="summary", policy=TopP(0.6))


def _operands() -> Iterator[Case]:
    """What is given at call time: masks with empty rows, quotas of heads and rows, lengths of padded samples."""
    lse = ("%out", "%lse")
    yield _row("empty_rows", 900, policy=Fixed(), kept="some_none", returns=lse)
    yield _video("empty_rows_in_a_video", policy=Fixed(), kept="some_none", text=20)
    yield _video("empty_rows_and_summary", policy=Fixed(), kept="some_none", omitted="summary", returns=lse)
    yield _row("quotas", 1000, quotas=True, returns=lse)
    yield _video("quotas_and_summary", quotas=True, omitted="summary", text=20, batch=2)
    yield _video("quotas_and_mass", quotas=True, policy=TopP(0.5))
    yield _row("lengths", 900, kv_lengths=(512, 397, 1000), batch=3, returns=lse)
    yield _row("lengths_of_nothing", 500, kv_lengths=(0, 130), batch=2, returns=lse)
    yield _row("lengths_and_mass", 900, kv_lengths=(900, 600), batch=2, policy=TopP(0.6))
    yield _row("lengths_of_keys_alone", 300, kv_len=900, kv_lengths=(420, 900), batch=2)
    yield _row("lengths_in_dense", 500, kv_lengths=(300, 500), batch=2, policy=TopK(0.0), returns=lse)
    yield _video("lengths_of_text", kv_lengths=(645, 717), batch=2, text=77)
    yield _video("lengths_and_summary", kv_lengths=(645, 700), batch=2, text=77, omitted="summary", returns=lse)
    yield _video("lengths_under_a_given_mask", kv_lengths=(650, 660), batch=2, text=40, policy=Fixed())
    yield _video("lengths_and_quotas", kv_lengths=(650, 680), batch=2, text=40, quotas=True, heads=4, kv_heads=2)


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


def _in_8_bits() -> Iterator[Case]:
    """Every precision with every other feature, and numbers on which 8 bits fail elsewhere (docs/precision.md)."""
    lse = ("%out", "%lse")
    for name in PRECISIONS:
        of: dict[str, Any] = {"precision": name}
        yield _row(name, 460, heads=4, kv_heads=2, returns=lse, **of)
        yield _video(f"{name}_summary", omitted="summary", text=77, head_dim=64, returns=lse, **of)
        lengths: dict[str, Any] = {
            "kv_lengths": (290, 380),
            "batch": 2,
            "text": 60,
            "grid": (4, 8, 10),
            "block": 64,
            "returns": lse,
        }
        yield _video(f"{name}_lengths_and_summary", omitted="summary", **lengths, **of)
        yield _row(f"{name}_wide_logits", 460, values="wide_logits", returns=lse, **of)
        yield _row(f"{name}_common_part", 460, values="common_part", omitted="summary", returns=lse, **of)
        yield _row(f"{name}_sink_block", 460, values="sink_block", returns=lse, **of)
        yield _row(f"{name}_rotated", 460, values="channel_outliers", rotate=True, returns=lse, **of)
    yield _row("int8_dense", 300, policy=TopK(0.0), head_dim=64, precision="int8")
    yield _row("fp8_empty_rows", 460, policy=Fixed(), kept="some_none", head_dim=64, returns=lse, precision="fp8")


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
    sink: Any = "first_frame",
    q_len: int | None = None,
    kv_len: int | None = None,
    **settings: Any,
) -> Case:
    """A case with a grid; a side whose length is given has none."""
    layout = TokenLayout(grid, text, text_position, None, block, sink)
    return _case(name, layout, q_len or layout.length, kv_len or layout.length, {"policy": TopK(0.3), **settings})


def _of_parts(name: str, *parts: Any, **settings: Any) -> Case:
    """A case of several parts, with small blocks."""
    layout = TokenLayout(parts=parts, block=64)
    return _case(name, layout, layout.length, layout.length, {"policy": TopK(0.4), **settings})


def _case(name: str, layout: TokenLayout, q_len: Any, kv_len: Any, settings: dict[str, Any]) -> Case:
    """Sort the settings into those of the problem and those of the case."""
    of_problem = {"batch", "heads", "kv_heads", "head_dim", "scale", "tensor_layout", "dtype"}
    shape = {"batch": 1, "heads": 2, "head_dim": 128, **{key: settings[key] for key in of_problem & settings.keys()}}
    rest = {key: settings[key] for key in settings.keys() - of_problem}
    return Case(name, AttentionProblem(q_len=q_len, kv_len=kv_len, **shape), layout, **rest)
