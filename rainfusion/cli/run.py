"""``rainfusion run``: dense against sparse attention on a real clip."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rainfusion.cli.arguments import JSON, Selection, takes_selection

if TYPE_CHECKING:
    from rich.status import Status

    from rainfusion.demo.compare import Comparison


@takes_selection
def run(
    clip: Annotated[str, typer.Argument(help="A video file, or bikes, bigbuckbunny or carphone.")] = "bikes",
    grid: Annotated[str, typer.Option(metavar="FxHxW", help="Tokens: frames x height x width.")] = "21x16x32",
    start: Annotated[int | None, typer.Option(min=0, help="First frame of the clip to take.")] = None,
    *,
    selection: Selection,
    heads: Annotated[int, typer.Option(help="Heads, from diffuse to peaked.")] = 4,
    head_dim: Annotated[int, typer.Option(help="Channels a head.")] = 64,
    dtype: Annotated[str | None, typer.Option(help="\\[default: float32 on a CPU, bfloat16 elsewhere]")] = None,
    omitted: Annotated[str, typer.Option(help="Whose error the picture shows: 'drop' or 'summary'.")] = "drop",
    backend: Annotated[str | None, typer.Option(help="Backend by name.  \\[default: the best that is here]")] = None,
    device: Annotated[str | None, typer.Option(help="Device such as 'cpu' or 'cuda:0'.  \\[default: the best]")] = None,
    rounds: Annotated[
        int | None, typer.Option(min=1, help="Timed runs of each.  \\[default: as many as fit into 15 s, at least 2]")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the random maps, noise and random blocks.")] = 0,
    png: Annotated[Path | None, typer.Option(help="Draw the clip, the error, the mask and the figures.")] = None,
    as_json: JSON = False,
) -> None:
    """Run dense and sparse attention on a real clip, on the best device: how fast, how close, what is kept.

    The clip becomes queries, keys and values through its patches: no weights, no network.

    Dense attention is the same backend's plan at sparsity 0.

    What is kept is counted as the share of dense attention's mass that the kept blocks hold.

    Example: [cyan]rainfusion run bikes --png demo.png[/]
    """
    from rainfusion.cli.console import print_json, stderr, stdout
    from rainfusion.core.checks import one_of
    from rainfusion.core.errors import ProblemError
    from rainfusion.core.problem import AttentionProblem
    from rainfusion.demo import decode, features
    from rainfusion.demo.compare import VARIANTS, compare, settle
    from rainfusion.demo.style import require_matplotlib

    one_of(omitted, VARIANTS, "omitted", ProblemError)
    if png is not None:
        require_matplotlib()
    layout, policy = selection.layout(grid), selection.policy()
    shape, length = layout.grids[0].sizes, layout.length or 0
    problem = AttentionProblem(1, heads, length, length, head_dim)
    features.check_size(length, heads, head_dim)
    in_8_bits: dict[str, Any] = {"precision": selection.precision, "rotate": selection.rotate}
    setting = settle(problem, layout, policy, backend=backend, device=device, dtype=dtype, **in_8_bits)
    with _progress() as step:
        step(f"Decoding {clip}")
        frames = decode.load(clip, shape, start=start)
        step("Making Q, K and V")
        tensors = features.qkv(
            frames,
            shape,
            heads=heads,
            head_dim=head_dim,
            text=selection.text,
            text_position=selection.text_position,
            seed=seed,
        )
        found = compare(*tensors, setting, rounds=rounds, seed=seed, progress=step)
        if png is not None:
            from rainfusion.demo.picture import draw

            step(f"Drawing {png}")
            draw(png, Path(clip).stem, frames, found, omitted)
            stderr().print(f"wrote {png}", highlight=False)
    record = record_of(found, clip, seed)
    if as_json:
        print_json(record)
    else:
        stdout().print(_report(record, found), soft_wrap=False)


def record_of(found: Comparison, clip: str, seed: int) -> dict[str, Any]:
    """A comparison as the record that ``--json`` prints."""
    recall = {name: values.tolist() for name, values in vars(found.recall).items()}
    return {
        "clip": clip,
        "seed": seed,
        "problem": asdict(found.plan.problem),
        "layout": found.plan.layout.to_dict(),
        "policy": str(found.policy),
        "precision": found.precision,
        "rotate": found.rotate,
        "backend": found.backend,
        "device": str(found.device),
        "device_name": found.device.name,
        "why": found.why,
        "out": [asdict(refusal) for refusal in found.refusals],
        "density": found.density,
        "sparsity": 1 - found.density,
        "rounds": found.rounds,
        "dense_seconds": found.dense_seconds,
        "omitted": {name: asdict(variant) for name, variant in found.variants.items()},
        "recall": {name: sum(values) / len(values) for name, values in recall.items()},
        "recall_of_heads": recall,
    }


def _report(record: dict[str, Any], found: Comparison) -> Any:
    from rich.console import Group
    from rich.markup import escape
    from rich.text import Text

    problem = found.plan.problem
    lines = [
        f"[bold]{escape(record['clip'])}[/]   {found.plan.layout}   {problem.q_len:,} tokens, "
        f"{problem.heads} heads of {problem.head_dim}, {problem.dtype}",
        f"[bold green]{escape(found.why)}[/]",
        *(f"[dim]out: {r.backend} ({r.stage}): {escape(r.reason)}[/]" for r in found.refusals),
        f"{record['sparsity']:.2%} of block pairs skipped ({escape(str(found.policy))}){_in_8_bits(found)}",
        "",
    ]
    timed = Text(f"median of {found.rounds} interleaved rounds after a warm-up, all on this backend", style="dim")
    shares = Text(f"shares of dense attention's mass; as many blocks for all{_always(found)}", style="dim")
    return Group(
        *(Text.from_markup(line) for line in lines), _outputs(found), timed, Text(), _recalls(record, found), shares
    )


def _in_8_bits(found: Comparison) -> str:
    if found.precision is None:
        return ""
    words = f", sparse attention in 8 bits ({found.precision}{', rotated' if found.rotate else ''})"
    return f"{words}, [bold yellow]by its definition: no kernels of 8 bits here[/]" if found.is_emulated else words


def _always(found: Comparison) -> str:
    protected = ", ".join(r.name.replace("_", " ") for r in found.plan.layout.protected)
    return f", the {protected} always among them" if protected else ""


def _outputs(found: Comparison) -> Any:
    from rich.table import Table

    from rainfusion.demo.compare import VARIANTS

    table = Table("skipped blocks", box=None, pad_edge=False)
    for name in ("time", "time / dense", "speed-up", "relative L1", "cosine"):
        table.add_column(name, justify="right")
    table.add_row("none (dense)", _time(found.dense_seconds), "1.000", "1.00x", "0", "1")
    for name, words in VARIANTS.items():
        v = found.variants[name]
        figures = (f"{v.time_ratio:.3f}", f"{1 / v.time_ratio:.2f}x", f"{v.relative_l1:.4f}", f"{v.cosine:.4f}")
        table.add_row(words, _time(v.seconds), *figures)
    return table


def _recalls(record: dict[str, Any], found: Comparison) -> Any:
    from rich.table import Table

    heads = found.plan.problem.heads
    table = Table("attention kept by", box=None, pad_edge=False)
    table.add_column("mean", justify="right")
    names = {"oracle": "the best blocks", "plan": "this plan", "raster": "raster order", "random": "random blocks"}
    for head in range(heads if heads <= 8 else 0):
        table.add_column(f"head {head + 1}", justify="right", style="dim")
    for key, words in names.items():
        shares = [f"{share:.3f}" for share in record["recall_of_heads"][key]] if heads <= 8 else []
        table.add_row(words, f"{record['recall'][key]:.3f}", *shares, style="bold" if key == "plan" else "")
    return table


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"


@contextmanager
def _progress() -> Iterator[Any]:
    """A function that shows what is being done, on stderr."""
    from rainfusion.cli.console import stderr

    status: Status
    with stderr().status("Starting") as status:
        yield lambda step: status.update(f"{step} ...")
