"""Row maxima, exponentials and rescaling on a consumer's registers."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

NONE = gl.constexpr(float("-inf"))


@gluon.constexpr_function
def accumulator(columns, depth):
    """The layout of a [64, columns] product of one warpgroup, whose instruction takes `depth` of the inner axis."""
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, columns, depth])


@gluon.jit
def row_max(s, ROW: gl.constexpr):
    """Row maximum as a tree over registers; Triton's own reduction is one serial chain a row."""
    x = s
    for _ in gl.static_range(4):
        a, b = x.reshape([x.shape[0], 2, x.shape[1] // 2]).permute([0, 2, 1]).split()
        x = gl.maximum(a, b)
    return gl.convert_layout(gl.max(x, 1), ROW)


@gluon.jit
def finite(peak):
    """What is taken off a row's logits: their maximum, or 0 where all of them are minus infinity."""
    return gl.where(peak == NONE, 0.0, peak)


@gluon.jit
def exp2(x):
    """2 to the power of x, approximate, in one instruction."""
    return gl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


def _multiply_code(n: int) -> str:
    """PTX that multiplies n registers of a thread by the fades of their rows."""
    return "\n".join(f"mul.f32 ${i}, ${i}, ${2 * n + i};" for i in range(n))


def _rescale_code(n: int) -> str:
    """The same, unless all rows of the warp have a fade of 1.

    Registers of an accumulator alternate between a thread's two rows in pairs: operands 2n and 2n+2 are the fades.
    """
    test = f"setp.neu.f32 p, ${2 * n}, 0f3F800000;\nsetp.neu.or.f32 p, ${2 * n + 2}, 0f3F800000, p;"
    skip = "vote.sync.any.pred q, p, 0xffffffff;\n@!q bra SAME;"
    return f"{{\n.reg .pred p, q;\n{test}\n{skip}\n{_multiply_code(n)}\nSAME:\n}}"


def _operands(n: int) -> str:
    return ",".join(["=f"] * n + [str(i) for i in range(n)] + ["f"] * n)


_RESCALE_64, _RESCALE_32 = gl.constexpr(_rescale_code(64)), gl.constexpr(_rescale_code(32))
_MULTIPLY_64, _MULTIPLY_32 = gl.constexpr(_multiply_code(64)), gl.constexpr(_multiply_code(32))
_OPERANDS_64, _OPERANDS_32 = gl.constexpr(_operands(64)), gl.constexpr(_operands(32))


@gluon.jit
def rescaled(acc, fades, DIM: gl.constexpr):
    """acc times fades ``[64, 1]``; a warp whose rows keep their maximum steps over it."""
    if DIM == 128:
        return gl.inline_asm_elementwise(_RESCALE_64, _OPERANDS_64, [acc, fades], gl.float32, is_pure=True, pack=64)
    return gl.inline_asm_elementwise(_RESCALE_32, _OPERANDS_32, [acc, fades], gl.float32, is_pure=True, pack=32)


@gluon.jit
def multiplied(acc, fades, DIM: gl.constexpr):
    """acc times fades ``[64, 1]``, in place: written as a product, ptxas keeps both and runs out of registers."""
    if DIM == 128:
        return gl.inline_asm_elementwise(_MULTIPLY_64, _OPERANDS_64, [acc, fades], gl.float32, is_pure=True, pack=64)
    return gl.inline_asm_elementwise(_MULTIPLY_32, _OPERANDS_32, [acc, fades], gl.float32, is_pure=True, pack=32)
