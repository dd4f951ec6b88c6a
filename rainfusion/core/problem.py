"""AttentionProblem: the static facts of one attention call."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from rainfusion.core.arrays import dtype_name, shape_of
from rainfusion.core.checks import as_int, as_number, one_of
from rainfusion.core.errors import ProblemError

DTYPES = {"float16": "f16", "bfloat16": "bf16", "float32": "f32", "float64": "f64"}
TENSOR_LAYOUTS = ("bhsd", "bshd")
_LARGEST_SCALE = (2.0 - 2.0**-23) * 2.0**127  # float32's largest number


@dataclass(frozen=True)
class AttentionProblem:
    """Shapes, dtype and scale of `softmax(q kᵀ · scale) v`; hashable, so plans can be cached by it.

    Args:
        batch: number of sequences; each has its own mask.
        heads: query heads.
        q_len, kv_len: tokens of the query and of the key/value side; they may differ.
        head_dim: channels per head, the same for q, k and v.
        dtype: ``"float16"``, ``"bfloat16"``, ``"float32"`` or ``"float64"``.
        kv_heads: key/value heads (default: `heads`); must divide `heads` (grouped-query attention,
            query head h reads key/value head ``h // (heads // kv_heads)``).
        scale: factor on the logits (default: ``head_dim ** -0.5``).
        tensor_layout: ``"bhsd"`` or ``"bshd"``, the axis order of q, k, v and the output.

    Raises:
        ProblemError: a size below 1, head counts that do not divide, an unknown dtype or layout, a scale
            that is not finite or that float32 does not hold (float64 tensors: float64).
    """

    batch: int
    heads: int
    q_len: int
    kv_len: int
    head_dim: int
    dtype: str = "float32"
    kv_heads: int = None  # type: ignore[assignment]  # filled in below
    scale: float = None  # type: ignore[assignment]  # filled in below
    tensor_layout: str = "bhsd"

    def __post_init__(self) -> None:
        one_of(self.dtype, DTYPES, "dtype", ProblemError)
        one_of(self.tensor_layout, TENSOR_LAYOUTS, "tensor_layout", ProblemError)
        set_field = partial(object.__setattr__, self)
        for name in ("batch", "heads", "q_len", "kv_len", "head_dim"):
            set_field(name, as_int(getattr(self, name), name, ProblemError))
        set_field("kv_heads", self.heads if self.kv_heads is None else as_int(self.kv_heads, "kv_heads", ProblemError))
        if self.heads % self.kv_heads:
            raise ProblemError(f"heads={self.heads} is not a multiple of kv_heads={self.kv_heads}")
        set_field("scale", self._checked_scale(self.scale))

    def _checked_scale(self, scale: float | None) -> float:
        if scale is None:
            return float(self.head_dim**-0.5)
        number = as_number(scale, "scale", ProblemError, "one, or leave it out for head_dim ** -0.5")
        if abs(number) > _LARGEST_SCALE and self.dtype != "float64":
            raise ProblemError(f"scale={number:g} is beyond float32, in which logits are computed; give a smaller one")
        return number

    @classmethod
    def from_tensors(
        cls, q: Any, k: Any, v: Any, *, scale: float | None = None, tensor_layout: str = "bhsd"
    ) -> AttentionProblem:
        """Read the problem off three tensors of any library that has `.shape` and `.dtype`.

        Args:
            q: ``[batch, heads, q_len, head_dim]`` (`bhsd`) or ``[batch, q_len, heads, head_dim]`` (`bshd`).
            k, v: the same axes with `kv_heads` and `kv_len`.

        Raises:
            ProblemError: not four axes, batch or head_dim that differ, k and v that differ, mixed dtypes.
        """
        one_of(tensor_layout, TENSOR_LAYOUTS, "tensor_layout", ProblemError)
        shapes = {name: _four_axes(name, x, tensor_layout) for name, x in (("q", q), ("k", k), ("v", v))}
        dtypes = {name: dtype_name(x) for name, x in (("q", q), ("k", k), ("v", v))}
        shown = ", ".join(f"{name} {tuple(x.shape)} {dtypes[name]}" for name, x in (("q", q), ("k", k), ("v", v)))
        for dtype in dtypes.values():
            if dtype not in DTYPES:
                raise ProblemError(
                    f"dtype {dtype} is not supported; use one of {', '.join(DTYPES)}{_as_supported(dtype)} "
                    f"(given {shown})"
                )
        if len(set(dtypes.values())) > 1:
            raise ProblemError(f"q, k and v need one dtype, given {shown}")
        if shapes["k"] != shapes["v"]:
            raise ProblemError(f"k and v need one shape, given {shown}")
        (batch, heads, q_len, dim), (kv_batch, kv_heads, kv_len, kv_dim) = shapes["q"], shapes["k"]
        if batch != kv_batch or dim != kv_dim:
            raise ProblemError(f"q and k need the same batch and head dim in layout {tensor_layout!r}, given {shown}")
        return cls(
            batch,
            heads,
            q_len,
            kv_len,
            dim,
            dtypes["q"],
            kv_heads,
            scale,  # type: ignore[arg-type]  # None for the default
            tensor_layout,
        )

    @property
    def group(self) -> int:
        """Query heads per key/value head."""
        return self.heads // self.kv_heads

    @property
    def q_shape(self) -> tuple[int, int, int, int]:
        """Shape of q and of the output, in the tensors' own layout."""
        return self._shape(self.heads, self.q_len)

    @property
    def kv_shape(self) -> tuple[int, int, int, int]:
        """Shape of k and v, in the tensors' own layout."""
        return self._shape(self.kv_heads, self.kv_len)

    @property
    def dense_flops(self) -> int:
        """Floating-point operations of dense attention: two matrix products of 2·q·kv·d each."""
        return 4 * self.batch * self.heads * self.q_len * self.kv_len * self.head_dim

    def _shape(self, heads: int, length: int) -> tuple[int, int, int, int]:
        if self.tensor_layout == "bhsd":
            return (self.batch, heads, length, self.head_dim)
        return (self.batch, length, heads, self.head_dim)

    def __str__(self) -> str:
        heads = f"h={self.heads}" if self.group == 1 else f"h={self.heads}/{self.kv_heads}"
        lengths = f"q={self.q_len} kv={self.kv_len}"
        return f"b={self.batch} {heads} {lengths} d={self.head_dim} {DTYPES[self.dtype]} {self.tensor_layout}"


def _as_supported(dtype: str) -> str:
    """How an array of a dtype that is not supported becomes one that is, where that is not plain."""
    if dtype.startswith((">", "<")):
        return ", in this machine's byte order: x.astype(x.dtype.newbyteorder('='))"
    return ", which x.dequantize() gives" if dtype.startswith(("qint", "quint")) else ""


def _instead_of(x: Any) -> str:
    """What to give instead of something without a plain shape."""
    kind = f"{type(x).__module__}.{type(x).__name__}"
    if kind.startswith("torch.fx."):
        return "torch.fx cannot trace through rainfusion: wrap your function (torch.fx.wrap), or use torch.compile"
    if kind.startswith("torch.") and getattr(x, "is_nested", False):
        return (
            "it is nested, so its samples differ in length: pad it (torch.nested.to_padded_tensor) and give kv_lengths"
        )
    return "give a NumPy array or a tensor with .shape and .dtype"


def _cut(shape: tuple[int, ...]) -> str:
    return f"{shape}" if len(shape) <= 8 else f"of {len(shape)} axes"


def _four_axes(name: str, x: Any, tensor_layout: str) -> tuple[int, int, int, int]:
    shape = shape_of(x)
    if shape is None or dtype_name(x) in ("None", "unknown"):
        raise ProblemError(f"{name} is a {type(x).__name__}; {_instead_of(x)}")
    if len(shape) != 4:
        raise ProblemError(f"{name} has shape {_cut(shape)}; give four axes in the order {tensor_layout!r}")
    b, second, third, d = shape
    return (b, second, third, d) if tensor_layout == "bhsd" else (b, third, second, d)
