"""What a random problem is: everything that the core can say, drawn from one seed.

Problems are small, so that many are tried: what goes wrong in attention by blocks goes wrong at edges (ragged blocks,
parts below a window, rows that keep nothing), and small problems consist of edges.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from math import lcm, prod
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import torch

import rainfusion

Generator = np.random.Generator
DTYPES = ("float16", "bfloat16", "float32", "float64")
_BLOCKS = (1, 2, 3, 4, 5, 7, 8, 8, 12, 16, 16, 24, 32, 32, 48, 64, 128)
_HEAD_DIMS = (1, 2, 3, 5, 8, 8, 16, 16, 17, 24, 32, 64, 80, 128)
_STRIDES = ("plain", "every_second", "swapped", "within", "reversed", "expanded")
_STRIDES_CHANCES = (0.5, 0.1, 0.1, 0.1, 0.1, 0.1)
_DEVICE_DTYPES = ("float16", "bfloat16", "float32")
# Blocks and head dims on an accelerator, where each pair is another kernel to compile; those of Hopper's kernel thrice.
_DEVICE_TILES = (
    *3 * (((128, 128), 64), ((128, 128), 128)),
    *(((128, 128), dim) for dim in (80, 256)),
    *(((64, 64), dim) for dim in (64, 128)),
    *(((128, 64), 64), ((32, 16), 24), ((16, 16), 16), ((24, 48), 32), ((48, 48), 1)),
    *(((8, 8), 17), ((5, 7), 8), ((1, 2), 5)),
)
SEEDS_A_KIND = 10  # on accelerators; one of them is a problem that must be refused
_KINDS = 120
_MOST_LOGITS = 10_000_000
_SINKS = ("first_frame", "first_frame_keys", "last_frame", "last_frame_keys")


class Part(NamedTuple):
    """A part of the sequence in words of the fuzzer's own."""

    kind: str  # "grid", "text" or "tokens"
    sizes: tuple[int, ...]
    window: tuple[int, int, int] | None = None
    sinks: tuple[str, ...] = ()

    @property
    def count(self) -> int:
        return prod(self.sizes)

    def build(self) -> Any:
        """The same as a part of rainfusion."""
        if self.kind == "grid":
            sink: Any = self.sinks or None
            return rainfusion.Grid(*self.sizes, window=self.window, sink=sink)
        return {"text": rainfusion.Text, "tokens": rainfusion.Tokens}[self.kind](self.count)


class Choice(NamedTuple):
    """How blocks are chosen; `kind` is ``topk``, ``paper``, ``topp``, ``hybrid``, ``quotas`` or ``mask``."""

    kind: str
    sparsity: float | tuple[float, ...] = 0.0
    mass: float | None = None
    floor: float = 0.0

    def of_heads(self, heads: int) -> Choice:
        """The same for another number of heads, with shares for each where there were some."""
        if not isinstance(self.sparsity, tuple):
            return self
        return self._replace(sparsity=tuple(float(share) for share in np.resize(self.sparsity, heads)))

    def policy(self) -> Any:
        """The policy of rainfusion; None where quotas or a mask alone say what to attend."""
        if self.kind in ("topk", "paper"):
            return rainfusion.TopK(self.sparsity, "paper" if self.kind == "paper" else "realised")
        if self.kind == "topp":
            return rainfusion.TopP(self.mass, self.floor)
        if self.kind == "hybrid":
            return rainfusion.Hybrid(self.sparsity, self.mass)
        return None


@dataclass(frozen=True)
class Problem:
    """One call of `attention`, on NumPy arrays or torch tensors."""

    seed: int
    parts: tuple[Part, ...]
    window: tuple[int, int, int] | None
    block: tuple[int, int]
    short_form: bool
    batch: int
    heads: int
    kv_heads: int
    q_len: int
    kv_len: int
    head_dim: int
    dtype: str
    tensor_layout: str
    scale: float | None
    choice: Choice
    omitted: str
    order: str
    returns: tuple[bool, bool]  # the log-sum-exp, the mask
    values: str
    poison: str  # where NaN stands: "", "padding", "k", "v"
    strides: str
    kind: str  # "numpy" or "torch"
    lengths: np.ndarray | None
    with_quotas: bool
    precision: str | None = None
    rotate: bool = False

    @property
    def logit_scale(self) -> float:
        return self.head_dim**-0.5 if self.scale is None else self.scale

    @property
    def on_queries(self) -> bool:
        """Whether lengths end the queries as well."""
        return self.q_len == self.kv_len

    @cached_property
    def layout_settings(self) -> dict[str, Any]:
        """The arguments that describe the layout."""
        block = self.block[0] if self.block[0] == self.block[1] and self.seed % 2 else self.block
        settings: dict[str, Any] = {"block": block, "window": self.window}
        if not self.short_form:
            return {**settings, "parts": tuple(part.build() for part in self.parts)}
        for part in self.parts:
            if part.kind == "text":
                settings |= {"text": part.count, "text_position": "start" if part is self.parts[0] else "end"}
            else:
                settings |= {"grid": part.sizes, "sink": part.sinks[0] if len(part.sinks) == 1 else part.sinks or None}
        return settings

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The arguments of `attention` that are not tensors, without those that choose blocks."""
        rest = {name: getattr(self, name) for name in ("omitted", "order", "tensor_layout", "scale")}
        return {**self.layout_settings, **rest, **self.precision_settings}

    @property
    def precision_settings(self) -> dict[str, Any]:
        """The arguments that ask for 8 bits; none where nothing asks for them."""
        if self.precision is None:
            return {}
        return {"precision": self.precision, **({"rotate": True} if self.rotate else {})}

    def layout(self) -> rainfusion.TokenLayout:
        return rainfusion.TokenLayout(**self.layout_settings)

    def rng(self, stream: int) -> Generator:
        """Random numbers for one purpose; stream 0 drew the problem itself."""
        return np.random.default_rng([self.seed, stream])

    @cached_property
    def tensors(self) -> dict[str, np.ndarray]:
        """q, k and v as float64 ``[batch, heads, tokens, channels]``, rounded to the dtype."""
        rng = self.rng(1)
        sides = {"q": (self.heads, self.q_len), "k": (self.kv_heads, self.kv_len), "v": (self.kv_heads, self.kv_len)}
        drawn = {}
        for name, (heads, length) in sides.items():
            x = _values("normal" if name == "v" else self.values, (self.batch, heads, length, self.head_dim), rng)
            if self.strides == "expanded":
                x = np.broadcast_to(x[:1], x.shape)
            drawn[name] = x.astype(numpy_dtype(self.dtype)).astype(np.float64)
        return drawn

    def __str__(self) -> str:
        lengths = None if self.lengths is None else self.lengths.tolist()
        facts = {
            **{name: getattr(self, name) for name in ("batch", "heads", "kv_heads", "q_len", "kv_len", "head_dim")},
            **{name: getattr(self, name) for name in ("dtype", "choice", "values", "poison", "strides", "kind")},
            **self.settings,
        }
        said = ", ".join(f"{name}={value}" for name, value in facts.items())
        return f"seed {self.seed}: {said}, kv_lengths={lengths}, quotas={self.with_quotas}"


def draw(seed: int) -> Problem:
    """The problem of a seed."""
    rng = np.random.default_rng([seed, 0])
    block = _block(rng)
    parts, window, short_form = _parts(rng, block)
    own = sum(part.count for part in parts) or int(rng.integers(1, 250))
    other = int(rng.integers(1, 200))
    q_len, kv_len = ((own, own), (own, other), (other, own))[_pick(rng, (0.8, 0.1, 0.1))]
    kv_heads = int(rng.integers(1, 4))
    heads, batch = kv_heads * int(rng.choice([1, 1, 1, 2, 3])), int(rng.choice([1, 1, 2, 3]))
    choice = _choice(rng, heads)
    values = str(rng.choice(["normal", "normal", "normal", "large", "clustered", "whole", "equal", "zero", "small"]))
    padded = rng.random() < 0.3
    lengths = _lengths(rng, parts, kv_len, batch) if padded else None
    poison = (
        str(rng.choice(["", "", "", "padding"])) if padded else str(rng.choice(["", "k", "v"], p=[0.9, 0.06, 0.04]))
    )
    strides = str(rng.choice(_STRIDES, p=_STRIDES_CHANCES))
    if strides == "expanded" and poison == "padding":
        poison = ""  # one sample in memory cannot have the padding of several
    kind = "numpy" if rng.random() < 0.4 else "torch"
    head_dim = int(rng.choice(_HEAD_DIMS))
    precision, rotate = _precision(np.random.default_rng([seed, 11]), head_dim)
    return Problem(
        seed=seed,
        parts=parts,
        window=window,
        block=block,
        short_form=short_form,
        batch=batch,
        heads=heads,
        kv_heads=kv_heads,
        q_len=q_len,
        kv_len=kv_len,
        head_dim=head_dim,
        dtype=str(rng.choice(DTYPES)),
        tensor_layout=str(rng.choice(["bhsd", "bshd"])),
        scale=_scale(rng),
        choice=choice,
        omitted="summary" if rng.random() < 0.3 else "drop",
        order="given" if rng.random() < 0.15 else "window",
        returns=(bool(rng.random() < 0.5), bool(rng.random() < 0.5)),
        values=values,
        poison=poison,
        strides=strides,
        kind=kind,
        lengths=lengths,
        with_quotas=choice.kind == "quotas" or (choice.kind != "mask" and bool(rng.random() < 0.1)),
        precision=precision,
        rotate=rotate,
    )


def draw_for(seed: int, device: str) -> Problem:
    """The problem of a seed on a device: on the CPU as it is drawn, on others of one of a few kinds, and longer.

    Accelerators compile kernels for every kind of tile, dtype, head count and strides, in seconds, and run a problem in
    a fraction of one: seeds that a worker takes together are of one kind, and kinds come back. What stays free are
    parts, lengths, masks, policies and values. Their largest blocks need longer sequences to have edges.
    """
    problem = draw(seed)
    if device == "cpu":
        return problem
    kind = np.random.default_rng([seed // SEEDS_A_KIND % _KINDS, 10])
    block, head_dim = _DEVICE_TILES[kind.integers(len(_DEVICE_TILES))]
    kv_heads = int(kind.integers(1, 4))
    heads = kv_heads * int(kind.choice([1, 1, 1, 2, 3]))
    logits = problem.q_len * problem.kv_len * heads * problem.batch
    longer = next((n for n in (4, 3, 2) if min(block) >= 64 and logits * n * n < _MOST_LOGITS), 1)
    rest = problem.rng(9).integers(0, longer, problem.batch)
    strides = str(kind.choice(_STRIDES, p=_STRIDES_CHANCES))
    precision, rotate = _precision(np.random.default_rng([seed // SEEDS_A_KIND % _KINDS, 12]), head_dim)
    return replace(
        problem,
        parts=tuple(_longer(part, longer) for part in problem.parts),
        window=None,
        block=block,
        heads=heads,
        kv_heads=kv_heads,
        q_len=problem.q_len * longer,
        kv_len=problem.kv_len * longer,
        head_dim=head_dim,
        dtype=str(kind.choice(_DEVICE_DTYPES)),
        tensor_layout=str(kind.choice(["bhsd", "bshd"])),
        choice=problem.choice.of_heads(heads),
        omitted="summary" if kind.random() < 0.3 else "drop",
        order="given" if kind.random() < 0.15 else "window",
        returns=(bool(kind.random() < 0.5), problem.returns[1]),
        poison="" if strides == "expanded" and problem.poison == "padding" else problem.poison,
        strides=strides,
        lengths=None if problem.lengths is None else problem.lengths * longer + rest,
        kind="torch",
        precision=precision,
        rotate=rotate,
    )


def _longer(part: Part, longer: int) -> Part:
    """The part with that many times its tokens and no window of its own: one fills whole blocks of one size only."""
    if part.kind != "grid":
        return part._replace(sizes=(part.count * longer,))
    frames, height, width = part.sizes
    return part._replace(sizes=(frames, height * longer, width), window=None)


def mask_of(problem: Problem, rows: int, columns: int) -> np.ndarray:
    """The mask that is given: any density, with empty rows and columns."""
    rng = problem.rng(3)
    shape = (problem.batch, problem.heads, rows, columns)
    mask = rng.random(shape) < rng.choice([0.0, 0.1, 0.5, 0.5, 0.9, 1.0])
    if rng.random() < 0.5:
        mask &= rng.random((*shape[:3], 1)) < 0.8
    if rng.random() < 0.3:
        mask &= rng.random((1, 1, 1, columns)) < 0.8
    return mask


def quotas_of(problem: Problem, rows: int, columns: int) -> np.ndarray:
    """Quotas that are given, also beyond their range, for every head or for all."""
    rng = problem.rng(4)
    shape = (int(rng.choice([1, problem.heads])), rows)
    return rng.integers(-1, columns + 2, shape).astype(rng.choice(["int32", "int64"]))


def array_of(problem: Problem, name: str, x: np.ndarray, kind: str, device: str = "cpu") -> Any:
    """A tensor of the problem as the caller would hold it: in its layout, dtype, kind, device and strides."""
    stored = np.ascontiguousarray(x if problem.tensor_layout == "bhsd" else x.swapaxes(1, 2))
    if kind == "numpy":
        return _strided(stored.astype(numpy_dtype(problem.dtype)), problem.strides)
    return _strided(torch.from_numpy(stored).to(device, getattr(torch, problem.dtype)), problem.strides)


def numpy_dtype(name: str) -> Any:
    return np.dtype(ml_dtypes.bfloat16) if name == "bfloat16" else np.dtype(name)


def _strided(x: Any, strides: str) -> Any:
    """The same values in memory of other strides."""
    xp: Any = torch if isinstance(x, torch.Tensor) else np
    shape = tuple(x.shape)
    if strides == "every_second":
        wide = _zeros(x, (*shape[:3], 2 * shape[3]))
        wide[..., 1::2] = x
        return wide[..., 1::2]
    if strides == "swapped":
        stored = _zeros(x, (shape[0], shape[2], shape[1], shape[3]))
        view = stored.swapaxes(1, 2)
        view[...] = x
        return view
    if strides == "within":
        wide = _zeros(x, (shape[0], shape[1] + 1, shape[2] + 3, shape[3] + 1))
        wide[:, 1:, 2:-1, 1:] = x
        return wide[:, 1:, 2:-1, 1:]
    if strides == "reversed" and xp is np:  # torch has no negative strides
        return x[:, :, ::-1].copy()[:, :, ::-1]
    if strides == "expanded":
        return np.broadcast_to(x[:1], shape) if xp is np else x[:1].expand(shape)
    return x


def _zeros(like: Any, shape: tuple[int, ...]) -> Any:
    return like.new_zeros(shape) if isinstance(like, torch.Tensor) else np.zeros(shape, like.dtype)


def _values(recipe: str, shape: tuple[int, ...], rng: Generator) -> np.ndarray:
    if recipe == "whole":  # means and scores of whole blocks are exact: ties are
        return rng.integers(-1, 2, shape).astype(np.float64)
    if recipe == "equal":
        return np.broadcast_to(rng.standard_normal((*shape[:2], 1, shape[3])), shape)
    if recipe == "zero":
        return np.zeros(shape)
    x = rng.standard_normal(shape)
    if recipe == "clustered":
        centres = 2 * rng.standard_normal((*shape[:2], -(-shape[2] // 7), shape[3]))
        x = 0.3 * x + np.repeat(centres, 7, axis=2)[:, :, : shape[2]]
    return x * {"large": 20.0, "small": 1e-3}.get(recipe, 1.0)


def _block(rng: Generator) -> tuple[int, int]:
    q = int(rng.choice(_BLOCKS))
    if rng.random() < 0.7:
        return q, q
    return q, int(rng.choice(_BLOCKS))


def _parts(rng: Generator, block: tuple[int, int]) -> tuple[tuple[Part, ...], tuple[int, int, int] | None, bool]:
    """The parts, a window for all grids, and whether they are said in the short form."""
    form = _pick(rng, (0.2, 0.4, 0.4))
    window = _window(rng, block) if rng.random() < 0.25 else None
    if form == 0:
        return (), None, True
    if form == 1:
        grid, text = _grid(rng, block)._replace(window=None), Part("text", (int(rng.integers(1, 40)),))
        return ((grid,), (grid, text), (text, grid))[rng.integers(3)], window, True
    parts = tuple(_part(rng, block) for _ in range(rng.integers(1, 5)))
    has_grid = any(part.kind == "grid" for part in parts)
    return parts, window if has_grid else None, False


def _part(rng: Generator, block: tuple[int, int]) -> Part:
    kind = rng.choice(["grid", "text", "tokens"], p=[0.5, 0.3, 0.2])
    return _grid(rng, block) if kind == "grid" else Part(str(kind), (int(rng.integers(0, 40)),))


def _grid(rng: Generator, block: tuple[int, int]) -> Part:
    frames, height, width = (int(rng.integers(1, most)) for most in ((2, 4, 7)[rng.integers(3)], 8, 10))
    window = _window(rng, block) if rng.random() < 0.2 else None
    chosen = [str(s) for s in rng.permutation(_SINKS)[: rng.choice([0, 1, 1, 2])]]
    frames_named = {s.partition("_")[0] for s in chosen}
    return Part(
        "grid", (frames, height, width), window, tuple(chosen if len(frames_named) == len(chosen) else chosen[:1])
    )


def _window(rng: Generator, block: tuple[int, int]) -> tuple[int, int, int]:
    """Any window that fills whole blocks."""
    sides, rest = [1, 1, 1], lcm(*block) * int(rng.choice([1, 1, 2, 3]))
    for factor in range(2, rest + 1):
        while rest % factor == 0:
            sides[rng.integers(3)] *= factor
            rest //= factor
    return (sides[0], sides[1], sides[2])


def _lengths(rng: Generator, parts: tuple[Part, ...], kv_len: int, batch: int) -> np.ndarray:
    """Valid tokens of every sample, also beyond the sequence.

    Where the sequence ends in text, only that text is padded: dense attention relies on it.
    """
    text = parts[-1].count if parts and parts[-1].kind == "text" else 0
    least = kv_len - text if text and kv_len == sum(part.count for part in parts) else -2
    return rng.integers(max(least, kv_len - 30) if rng.random() < 0.5 else least, kv_len + 3, batch)


def _choice(rng: Generator, heads: int) -> Choice:
    kind = str(rng.choice(["topk", "paper", "topp", "hybrid", "quotas", "mask"], p=[0.35, 0.1, 0.15, 0.1, 0.1, 0.2]))
    share = float(rng.choice([0.0, 0.5, 0.8, 0.9, 0.999, rng.random(), rng.random()]))
    sparsity: Any = share
    if rng.random() < 0.3:
        sparsity = tuple(float(s) for s in np.round(rng.random(heads) * 0.99, 3))
    mass = float(rng.choice([0.0, 0.5, 0.9, 1.0, rng.random()])) if kind in ("topp", "hybrid") else None
    return Choice(kind, sparsity, mass, float(rng.choice([0.0, 0.0, rng.random(), 1.0])))


def _scale(rng: Generator) -> float | None:
    if rng.random() < 0.7:
        return None
    return float(rng.choice([0.0, 1.0, 0.5, -0.25, 0.125, rng.random()]))


def _precision(rng: Generator, head_dim: int) -> tuple[str | None, bool]:
    """A precision, seldom, and whether to rotate, which a power of two of channels can be."""
    precision = (None, "int8", "fp8")[_pick(rng, (0.75, 0.15, 0.1))]
    can = precision is not None and head_dim & (head_dim - 1) == 0
    return precision, can and bool(rng.random() < 0.5)


def _pick(rng: Generator, chances: tuple[float, ...]) -> int:
    return int(rng.choice(len(chances), p=chances))
