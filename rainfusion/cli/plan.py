"""``rainfusion plan``: the program one attention call becomes, and what it costs, without running it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rainfusion.cli.arguments import JSON, Selection, takes_selection

if TYPE_CHECKING:
    from rainfusion.core.layout import TokenLayout
    from rainfusion.core.plan import Plan
    from rainfusion.core.policies import Policy


@takes_selection
def plan(
    grid: Annotated[
        str | None, typer.Option(metavar="FxHxW", help="Video tokens: frames x height x width.  \\[or --parts]")
    ] = None,
    parts: Annotated[
        str | None,
        typer.Option(
            metavar="PART,PART...",
            help="The parts of the sequence instead of --grid and --text: text:COUNT, tokens:COUNT (not protected), "
            "grid:FxHxW or grid:FxHxW:SINK.",
        ),
    ] = None,
    *,
    selection: Selection,
    batch: Annotated[int, typer.Option(help="Sequences.")] = 1,
    heads: Annotated[int, typer.Option(help="Query heads.")] = 40,
    head_dim: Annotated[int, typer.Option(help="Channels a head.")] = 128,
    dtype: Annotated[str, typer.Option(help="float16, bfloat16, float32 or float64.")] = "bfloat16",
    omitted: Annotated[str, typer.Option(help="Skipped blocks: 'drop', or 'summary' to count their means.")] = "drop",
    kv_lengths: Annotated[
        bool, typer.Option("--kv-lengths", help="Read the valid tokens of padded samples at call time.")
    ] = False,
    png: Annotated[Path | None, typer.Option(help="Draw the token order and the mask's structure.")] = None,
    as_json: JSON = False,
) -> None:
    """Show what one attention call becomes: the operations, the exact density, the predicted work.

    Example: [cyan]rainfusion plan --grid 21x45x80 --sparsity 0.8[/]

    Example: [cyan]rainfusion plan --parts text:37,grid:1x13x15,grid:1x9x11,grid:1x8x8 --block 16[/]
    """
    from rainfusion.cli.console import print_json, stderr
    from rainfusion.core.planner import plan_with_notes
    from rainfusion.core.problem import AttentionProblem

    layout, policy = _layout(grid, parts, selection), selection.policy()
    length = layout.length or 0
    problem = AttentionProblem(batch, heads, length, length, head_dim, dtype)
    settings: Any = {
        "omitted": omitted,
        "order": "window",
        "returns": ("%out",),
        "quotas": False,
        "kv_lengths": kv_lengths,
        "precision": selection.precision,
        "rotate": selection.rotate,
    }
    planned, notes = plan_with_notes(problem, layout, policy, **settings)
    other = _with_other_counting(policy)
    counted = None if other is None else plan_with_notes(problem, layout, other, **settings)[0]
    facts = {**facts_of(planned), "notes": notes, "other_counting": _other_counting(other, counted)}
    if as_json:
        print_json({"plan": json.loads(planned.to_json()), "policy": str(policy), **facts})
    else:
        _print(planned, policy, facts)
    if png is not None:
        from rainfusion.demo.plan_picture import draw

        draw(png, planned)
        stderr().print(f"wrote {png}", highlight=False)


def _layout(grid: str | None, parts: str | None, selection: Selection) -> TokenLayout:
    if (grid is None) == (parts is None):
        raise typer.BadParameter("give one of them", param_hint="--grid / --parts")
    return selection.layout(grid) if grid is not None else selection.layout_of_parts(parts or "")


def facts_of(planned: Plan) -> dict[str, Any]:
    """What is known of a plan before it runs; None where only the data can tell."""
    from rainfusion.demo.budget import density_bounds

    q, kv = planned.q_axis, planned.kv_axis
    free_rows = None if planned.row_counts is None else planned.row_counts[:, : q.free_blocks]
    return {
        "tokens": planned.problem.q_len,
        "blocks": [q.blocks, kv.blocks],
        "protected_blocks": [q.blocks - q.free_blocks, kv.blocks - kv.free_blocks],
        "kept_per_free_row": None if free_rows is None or not free_rows.size else [*map(int, _range(free_rows))],
        "free_blocks_a_row": planned.free_blocks_a_row,
        "protected_share": planned.protected_share,
        "density": planned.density,
        "density_bounds": density_bounds(planned),
        "sparsity": planned.sparsity,
        "flops": planned.flops,
        "dense_flops": planned.problem.dense_flops,
    }


def _range(counts: Any) -> tuple[int, int]:
    return counts.min(), counts.max()


def _with_other_counting(policy: Policy) -> Policy | None:
    """The policy with the same sparsity counted the other way."""
    from rainfusion.core.policies import COUNTINGS, TopK

    if not isinstance(policy, TopK):
        return None
    return replace(policy, counting=next(name for name in COUNTINGS if name != policy.counting))


def _other_counting(policy: Policy | None, counted: Plan | None) -> dict[str, Any] | None:
    """The sparsity that the same number means when counted the other way: the least and the most that is skipped."""
    from rainfusion.demo.budget import density_bounds

    bounds = None if counted is None else density_bounds(counted)
    if bounds is None:
        return None
    return {"counting": getattr(policy, "counting", ""), "sparsity_bounds": [1 - bounds[1], 1 - bounds[0]]}


def _print(planned: Plan, policy: Policy, facts: dict[str, Any]) -> None:
    from rich.table import Table
    from rich.text import Text

    from rainfusion.cli.console import stdout

    out = stdout()
    out.print(str(planned), markup=False, highlight=False)
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column()
    for name, value in _lines(planned, policy, facts):
        table.add_row(name, Text(value))
    for note in facts["notes"]:
        table.add_row(Text("note", style="yellow"), Text(note, style="yellow"))
    out.print()
    out.print(table, soft_wrap=False)


def _lines(planned: Plan, policy: Policy, facts: dict[str, Any]) -> list[tuple[str, str]]:
    from rainfusion.demo.budget import kept_words

    (rows, columns), (kept_rows, kept_columns) = facts["blocks"], facts["protected_blocks"]
    lines = [
        ("policy", str(policy)),
        ("blocks", f"{rows:,} x {columns:,} of {planned.block[0]} x {planned.block[1]} tokens"),
        ("protected", f"{kept_rows} rows, {kept_columns} columns ({_protected(planned)})"),
        ("kept", f"{kept_words(planned)}, in each of the other {rows - kept_rows} rows"),
    ]
    if facts["protected_share"] is not None and kept_columns and not planned.is_dense:
        lines.append(("", f"protection takes {facts['protected_share']:.2%} of all that is kept"))
    if facts["density"] is None:
        return [*lines, ("density", f"decided by the data{_between(facts['density_bounds'])}")]
    lines.append(("density", f"{facts['density']:.4%} of block pairs, so {facts['sparsity']:.4%} are skipped"))
    if facts["other_counting"]:
        lines.append(("", _counted_otherwise(facts["other_counting"])))
    share = facts["flops"] / facts["dense_flops"]
    lines.append(("work", f"{_tera(facts['flops'])} against {_tera(facts['dense_flops'])} dense: {share:.2%}"))
    return lines


def _protected(planned: Plan) -> str:
    ranges = planned.layout.protected
    names = [r.name.replace("_", " ") + ("" if r.rows else " as keys") for r in ranges]
    more = len(names) - 6
    return ", ".join([*names[:6], f"{more} more"] if more > 0 else names) or "nothing"


def _between(bounds: tuple[float, float] | None) -> str:
    return "" if bounds is None else f", {bounds[0]:.2%} to {bounds[1]:.2%} of block pairs"


def _counted_otherwise(other: dict[str, Any]) -> str:
    low, high = other["sparsity_bounds"]
    words = "counted as the paper's code does" if other["counting"] == "paper" else "counted as realised"
    span = f"{low:.2%}" if low == high else f"{low:.2%} to {high:.2%}"
    return f"{words}, the same number would skip {span}"


def _tera(flops: int) -> str:
    return f"{flops / 1e12:.3g} TFLOP" if flops >= 1e11 else f"{flops / 1e9:.3g} GFLOP"
