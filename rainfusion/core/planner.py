"""plan(): from what is asked to the program that computes it, by composing passes. Static, cheap, cached."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

from rainfusion.core import passes
from rainfusion.core import precision as precisions
from rainfusion.core.checks import as_flag, one_of, shown
from rainfusion.core.errors import LayoutError, PolicyError, ProblemError, SparsityWarning, warn_caller
from rainfusion.core.layout import TokenLayout
from rainfusion.core.ops import Select
from rainfusion.core.plan import Plan
from rainfusion.core.policies import Policy, TopK
from rainfusion.core.problem import AttentionProblem

OMITTED = ("drop", "summary")
ORDERS = ("window", "given")
RETURNS = ("%out", "%lse", "%mask", "%qb", "%kb", "%score")


def plan(
    problem: AttentionProblem,
    layout: TokenLayout | None = None,
    policy: Policy | None = None,
    *,
    omitted: str = "drop",
    order: str = "window",
    returns: Iterable[str] = ("%out",),
    quotas: bool = False,
    kv_lengths: bool = False,
    precision: str | None = None,
    rotate: bool = False,
) -> Plan:
    """Plan one attention call.

    Args:
        problem: shapes, dtype and scale.
        layout: grids, text, windows and blocks (default: no grid, blocks of 128). A side whose length is
            not the layout's keeps its order and has no protected tokens.
        policy: `TopK` (default, 80 %), `TopP`, `Hybrid`, `Fixed`, or one of your own.
        omitted: ``"drop"`` skips what is not selected; ``"summary"`` lets every skipped block still
            contribute one row (mean key, mean value, log of its token count added to the logit).
        order: ``"window"``, or ``"given"`` where the tensors' tokens already stand in block order.
        returns: values a call returns, in this order: ``%out``, ``%lse`` (float32 ``[batch, heads, q_len]``, natural
            log), ``%mask`` (a `BlockMask`), ``%qb`` and ``%kb`` (block means, float32 ``[batch, heads, blocks,
            head_dim]``), ``%score`` (float32 ``[batch, heads, q blocks, key blocks]``).
        quotas: row quotas are given at call time, in place of those of `policy`.
        kv_lengths: valid tokens of padded samples are given at call time.
        precision: ``"int8"`` or ``"fp8"`` attends in 8 bits (`passes.quantised`); None in the tensors' own dtype.
        rotate: with a precision, Hadamard transform of queries and keys before they are rounded.

    Raises:
        LayoutError: the layout makes neither q_len nor kv_len tokens.
        PolicyError, ProblemError: an argument of another kind, or a name that is not known.

    Warns:
        SparsityWarning: the sparsity cannot be reached, or protection takes more than half of what is kept; the
            message says by how much, and what helps.
    """
    planned, notes = plan_with_notes(
        problem,
        layout,
        policy,
        omitted=omitted,
        order=order,
        returns=returns,
        quotas=quotas,
        kv_lengths=kv_lengths,
        precision=precision,
        rotate=rotate,
    )
    for note in notes:
        warn_caller(note, SparsityWarning)
    return planned


def plan_with_notes(
    problem: AttentionProblem,
    layout: TokenLayout | None,
    policy: Policy | None,
    *,
    omitted: str,
    order: str,
    returns: Iterable[str],
    quotas: bool,
    kv_lengths: bool,
    precision: str | None = None,
    rotate: bool = False,
) -> tuple[Plan, tuple[str, ...]]:
    """What `plan` makes of its arguments, and what it warns of."""
    one_of(omitted, OMITTED, "omitted", ProblemError)
    one_of(order, ORDERS, "order", ProblemError)
    layout = TokenLayout() if layout is None else layout
    policy = TopK() if policy is None else policy
    for name, given, kind in (("problem", problem, AttentionProblem), ("layout", layout, TokenLayout)):
        if not isinstance(given, kind):
            raise ProblemError(f"{name} is a {type(given).__name__}; give a {kind.__name__}")
    if not isinstance(policy, Policy):
        raise PolicyError(f"policy={shown(policy)} is not a policy; give TopK(...), TopP(...), Hybrid(...) or Fixed()")
    operands = as_flag(quotas, "quotas", ProblemError), as_flag(kv_lengths, "kv_lengths", ProblemError)
    return _plan(
        problem, layout, policy, omitted, order, _returns(returns), *operands, *precisions.checked(precision, rotate)
    )


def sparsity_notes(plan: Plan, policy: Policy) -> tuple[str, ...]:
    """What a caller should know of how the budget is spent; empty where all is well."""
    if plan.density is None or plan.protected_share is None:
        return ()
    q, kv = plan.q_axis, plan.kv_axis
    protected = [r.name.replace("_", " ") for r in plan.layout.protected]
    full_sinks = [r for r in plan.layout.protected if "frame" in r.name and r.rows]
    notes = []
    unreached = policy.unreached(q, kv, 1 - plan.density)
    if unreached:
        kept = " and ".join([*protected, *(["one block a row"] if kv.free_blocks == kv.blocks else [])])
        cures = ["ask for less", "use smaller blocks", *(["set sink='first_frame_keys' or None"] if full_sinks else [])]
        notes.append(
            f"{unreached} on {plan.layout}: keeping {kept} takes more than that leaves. This plan skips "
            f"{plan.sparsity:.4f}, the most that keeps them; {', or '.join(cures)}."
        )
    elif plan.find(Select) and plan.protected_share > 0.5 and kv.free_blocks < kv.blocks:
        cure = (
            "sink='first_frame_keys' keeps those tokens for everyone and leaves their own rows sparse; or "
            if full_sinks
            else ""
        )
        notes.append(
            f"protection ({', '.join(protected)}) takes {plan.protected_share:.0%} of what is kept on {plan.layout} at "
            f"sparsity {plan.sparsity:.4f}, which leaves each other query block {plan.free_blocks_a_row:.3g} of "
            f"{kv.free_blocks} unprotected key blocks; {cure}ask for less sparsity or use smaller blocks."
        )
    return tuple(notes)


def _returns(returns: Iterable[str]) -> tuple[str, ...]:
    try:
        wanted = {returns} if isinstance(returns, str) else {*returns}
    except Exception:  # not iterable, or no texts
        raise ProblemError(f"returns={shown(returns)} names no values; give some of {', '.join(RETURNS)}") from None
    for name in wanted:
        one_of(name, RETURNS, "returns", ProblemError)
    if not wanted:
        raise ProblemError(f"returns is empty; name one or more of {', '.join(RETURNS)}")
    return tuple(value for value in RETURNS if value in wanted)


@lru_cache(maxsize=256)
def _plan(
    problem: AttentionProblem,
    layout: TokenLayout,
    policy: Policy,
    omitted: str,
    order: str,
    returns: tuple[str, ...],
    quotas: bool,
    kv_lengths: bool,
    precision: str | None,
    rotate: bool,
) -> tuple[Plan, tuple[str, ...]]:
    if layout.length not in (None, problem.q_len, problem.kv_len):
        raise LayoutError(
            f"{layout} makes {layout.length} tokens, but q has {problem.q_len} and k has {problem.kv_len}; "
            "frames * height * width of the grids and text must equal the length of q or of k (axis 2 in bhsd, axis 1 "
            "in bshd)"
        )
    planned = passes.select_blocks(passes.dense(problem, layout), policy, given_quotas=quotas)
    if omitted == "summary":
        planned = passes.summarise_omitted(planned)
    if precision is not None:
        planned = passes.quantised(planned, precision, rotated=rotate)
    planned = passes.returning(planned, returns)
    if kv_lengths:
        planned = passes.limit_lengths(planned)
    if order == "window":
        planned = passes.in_window_order(planned)
    planned = passes.prune(planned)
    return planned, sparsity_notes(planned, policy)
