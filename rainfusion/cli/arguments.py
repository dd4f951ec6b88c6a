"""Options that more than one command takes, and how they are read."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from functools import wraps
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

if TYPE_CHECKING:
    from rainfusion.core.layout import Part, TokenLayout
    from rainfusion.core.policies import Policy

JSON = Annotated[bool, typer.Option("--json", help="Print one JSON record on stdout, nothing else.")]
_SINKS = "first_frame, first_frame_keys, last_frame or last_frame_keys, two joined by +, or none"
_COUNTING = "realised"


@dataclass(frozen=True)
class Selection:
    """Blocks, what is kept of them and in how many bits, as `plan` and `run` take it from the command line."""

    text: Annotated[int, typer.Option(help="Text tokens in the same sequence.")] = 0
    text_position: Annotated[str, typer.Option(help="Where the text stands: 'start' or 'end'.")] = "end"
    sparsity: Annotated[
        str | None,
        typer.Option(
            metavar="SHARE[,SHARE...]",
            help="Share of block pairs to skip, protected ones counted in; one, or one a head.  \\[default: 0.8]",
        ),
    ] = None
    top_p: Annotated[
        float | None,
        typer.Option(
            help="Softmax mass of the block scores to keep, instead of --sparsity; with both, what either keeps."
        ),
    ] = None
    floor: Annotated[float, typer.Option(help="With --top-p alone: least share of key blocks a row keeps.")] = 0.0
    counting: Annotated[
        str, typer.Option(help="'realised': sparsity is what is really skipped; 'paper': protected blocks come on top.")
    ] = _COUNTING
    block: Annotated[str, typer.Option(metavar="N|NxM", help="Tokens a block, or query x key.")] = "128"
    window: Annotated[
        str | None,
        typer.Option(metavar="TxHxW", help="Tokens folded into blocks.  \\[default: the most compact that fills one]"),
    ] = None
    sink: Annotated[str, typer.Option(metavar="SINK", help=f"Protected frames: {_SINKS}.")] = "first_frame"
    precision: Annotated[str | None, typer.Option(help="Attend in 8 bits: 'int8' or 'fp8'.")] = None
    rotate: Annotated[
        bool, typer.Option("--rotate", help="With --precision: rotate channels before they are rounded.")
    ] = False

    def layout(self, grid: str) -> TokenLayout:
        """The layout of one grid, ``FRAMESxHEIGHTxWIDTH``, and the text."""
        from rainfusion.core.layout import TokenLayout

        frames, height, width = sizes(grid, (3,), "--grid")
        box, sink = (frames, height, width), read_sink(self.sink, "--sink")
        return TokenLayout(box, self.text, self.text_position, self._window(), self._block(), sink)

    def layout_of_parts(self, text: str) -> TokenLayout:
        """The layout of parts as ``--parts`` writes them, see `parts`.

        Raises:
            typer.BadParameter: they are not understood, or the text is given a second time.
        """
        from rainfusion.core.layout import TokenLayout

        if self.text or self.text_position != "end":
            raise typer.BadParameter("excludes --parts; write text:COUNT where the text stands", param_hint="--text")
        return TokenLayout(parts=parts(text, self.sink), window=self._window(), block=self._block())

    def policy(self) -> Policy:
        """The policy that the options name.

        Raises:
            typer.BadParameter: options that exclude each other, or shares that are no numbers.
        """
        from rainfusion.core.policies import Hybrid, TopK, TopP

        share = None if self.sparsity is None else shares(self.sparsity)
        if self.floor and (self.top_p is None or share is not None):
            raise typer.BadParameter("goes with --top-p alone", param_hint="--floor")
        if self.top_p is None:
            return TopK(0.8 if share is None else share, self.counting)
        if self.counting != _COUNTING:
            raise typer.BadParameter("excludes --top-p", param_hint="--counting")
        return TopP(self.top_p, self.floor) if share is None else Hybrid(share, self.top_p)

    def _window(self) -> Any:
        return None if self.window is None else sizes(self.window, (3,), "--window")

    def _block(self) -> Any:
        read = sizes(self.block, (1, 2), "--block")
        return read[0], read[-1]


def takes_selection(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the fields of `Selection` as options, in place of its argument ``selection``."""
    hints = get_type_hints(Selection, include_extras=True)
    own = inspect.signature(command, eval_str=True).parameters.values()
    shared = [
        inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=hints[f.name])
        for f in fields(Selection)
        if f.default is not MISSING
    ]
    listed = [p.replace(kind=p.KEYWORD_ONLY) for p in own]
    at = next(i for i, p in enumerate(listed) if p.name == "selection")
    listed[at : at + 1] = shared

    @wraps(command)
    def with_options(**given: Any) -> None:
        selection = Selection(**{f.name: given.pop(f.name) for f in fields(Selection)})
        command(selection=selection, **given)

    with_options.__signature__ = inspect.Signature(listed)  # type: ignore[attr-defined]
    with_options.__annotations__ = {p.name: p.annotation for p in listed}
    return with_options


def sizes(text: str, counts: tuple[int, ...], option: str) -> tuple[int, ...]:
    """Read ``21x45x80``; `counts` says how many sizes there may be.

    Raises:
        typer.BadParameter: anything else.
    """
    numbers = text.lower().split("x")
    if len(numbers) not in counts or not all(_is_number(number) for number in numbers):
        example = {1: "128", 2: "128x64", 3: "21x45x80"}
        wanted = " or ".join(example[n] for n in counts)
        raise typer.BadParameter(f"{text[:80]!r} is not understood; write it like {wanted}", param_hint=option)
    return tuple(int(number) for number in numbers)


def parts(text: str, sink: str) -> tuple[Part, ...]:
    """Read ``text:37,grid:1x13x15,tokens:20,grid:5x8x8:last_frame``: the parts of a sequence in their order.

    Args:
        sink: of the grids that name none.

    Raises:
        typer.BadParameter: anything else.
    """
    from rainfusion.core.layout import Grid, Text, Tokens

    read: list[Part] = []
    for item in text.split(","):
        kind, _, rest = item.strip().partition(":")
        size, _, own = rest.partition(":")
        if kind == "grid":
            frames, height, width = sizes(size, (3,), "--parts")
            read.append(Grid(frames, height, width, sink=read_sink(own or sink, "--parts" if own else "--sink")))
        elif kind in ("text", "tokens") and not own and _is_number(size):
            read.append((Text if kind == "text" else Tokens)(int(size)))
        else:
            example = "text:37,grid:1x13x15,tokens:20 or grid:5x8x8:last_frame"
            raise typer.BadParameter(f"{item[:80]!r} is not a part; write them like {example}", param_hint="--parts")
    return tuple(read)


def read_sink(text: str, option: str) -> tuple[str, ...] | None:
    """Read a sink: names joined by ``+``, or ``none``.

    Raises:
        typer.BadParameter: a name that is not known.
    """
    from rainfusion.core.layout import SINKS

    if text == "none":
        return None
    names = tuple(text.split("+"))
    for name in names:
        if name not in SINKS:
            raise typer.BadParameter(f"{name[:80]!r} is not known; give {_SINKS}", param_hint=option)
    return names


def shares(text: str, option: str = "--sparsity", each: str = "one share a head") -> float | tuple[float, ...]:
    """Read one share, or several with commas between.

    Args:
        option: that gives them.
        each: what several are.

    Raises:
        typer.BadParameter: not numbers.
    """
    try:
        read = tuple(float(share) for share in text.split(","))
    except ValueError:
        raise typer.BadParameter(
            f"{text[:80]!r} is not a number; write 0.8, or {each}: 0.7,0.9", param_hint=option
        ) from None
    return read[0] if len(read) == 1 else read


def _is_number(text: str) -> bool:
    """Whether `text` is a whole number that Python converts; more digits than any size has are none."""
    return text.strip().isdecimal() and len(text) <= 20
