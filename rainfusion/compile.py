"""torch.compile and torch.export: every call of rainfusion is one operator of the graph.

Planning, choosing and checking are Python that no tracer should walk through. While torch traces, a call records the
operator `rainfusion::call` instead of being made; when the graph runs, the operator makes the very call.

The operator takes tensors, whole numbers and floats as lists, and one text that says what they stand for. Tensors and
whole numbers may thus be symbolic, as the shapes of the results are: one graph serves every resolution, every length
of text and every sparsity. The text is static. It names a lowered plan by its JSON, its backend and its device, so
that a saved graph finds it in another process. To load one there, import this module first: it registers the operator
and how a `BlockMask` enters and leaves an exported program.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping
from dataclasses import fields
from functools import lru_cache
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree

from rainfusion import calls, dispatch
from rainfusion.core import policies
from rainfusion.core.errors import LayoutError, MaskError, ProblemError
from rainfusion.core.executable import Executable, live
from rainfusion.core.layout import Grid, Text, TokenLayout, Tokens, of_parts
from rainfusion.core.mask import BlockMask
from rainfusion.core.plan import Plan, given_types

try:
    from torch.fx.experimental.symbolic_shapes import has_static_value
except ImportError:  # an older torch, in whose graphs floats are constants

    def has_static_value(a: Any) -> bool:  # type: ignore[misc]
        """Whether the tracer knows the value."""
        return True


class Operands(NamedTuple):
    """What a text leaves open, each kind in the order in which the text mentions it."""

    tensors: list[Any]
    sizes: list[Any]
    numbers: list[Any]


# -- while torch traces: a call becomes an operator ------------------------------------------------


def record_call(
    arguments: Mapping[str, Any], settings: calls.Settings, returns: tuple[str, ...], backend: str | None
) -> Any:
    """A call of `attention`, `select` or `block_means` while torch traces; its results as the call returns them.

    Raises:
        ProblemError, LayoutError, MaskError: arguments of another kind. What else is wrong is said when the graph
            runs.
    """
    _check_kinds(arguments)
    _check_axes(arguments, settings.tensor_layout)
    mask = arguments["mask"]
    made = tuple(name for name in returns if name != "%mask" or mask is None)
    operands = Operands([], [], [])
    text = (
        "call",
        tuple((name, _write(value, name, operands)) for name, value in arguments.items()),
        tuple((name, _write(getattr(settings, name), name, operands)) for name in settings._fields),
        made,
        backend,
    )
    shapes = [_shape(name, arguments, settings) for name in made]
    results = tuple((_dtype(name, arguments["q"]), len(shape)) for name, shape in zip(made, shapes, strict=True))
    values = dict(zip(made, _operator(text, results, operands, shapes, like=arguments["q"]), strict=True))
    if "%mask" in values:
        values["%mask"] = _mask_made(values["%mask"], arguments, settings)
    return _returned(returns, values, mask)


def record(executable: Executable, arguments: Mapping[str, Any]) -> Any:
    """A call of a lowered plan while torch traces; its results as the call returns them.

    Raises:
        ProblemError, MaskError: arguments of another kind. What else is wrong is said when the graph runs.
    """
    _check_kinds(arguments)
    plan, mask = executable.plan, arguments["mask"]
    kinds = tuple(kind for kind in _kinds_of_results(executable.serial) if kind[0] != "%mask" or mask is None)
    made = tuple(name for name, _, _, _ in kinds)
    operands = Operands([], [], [])
    given = tuple((name, _write(value, name, operands)) for name, value in arguments.items() if value is not None)
    text = ("run", given, made, _address(executable.serial))
    results = tuple((dtype, shape) for _, dtype, shape, _ in kinds)
    like = next((value for value in arguments.values() if value is not None), None)
    values = dict(zip(made, _operator(text, results, operands, [], like=like), strict=True))
    for name, _, _, is_mask in kinds:
        if is_mask:
            lengths = plan.problem.q_len, plan.problem.kv_len
            values[name] = BlockMask._trusted(values[name], *lengths, plan.block, plan.layout)
    return _returned(plan.returns, values, mask)


def _operator(text: Any, results: Any, operands: Operands, shapes: list[Any], *, like: Any) -> list[Any]:
    sizes = [size for shape in shapes for size in shape]
    tensors: list[Any] = torch.ops.rainfusion.call(*operands, sizes, f"{(text, results)!r}")
    return [tensor.numpy() for tensor in tensors] if isinstance(like, np.ndarray) else tensors


def _returned(returns: tuple[str, ...], values: Mapping[str, Any], mask: BlockMask | None) -> Any:
    results = tuple(values.get(name, mask) for name in returns)
    return results[0] if len(results) == 1 else results


def _check_kinds(arguments: Mapping[str, Any]) -> None:
    for name, value in arguments.items():
        if name == "mask":
            if value is not None and not isinstance(value, BlockMask):
                raise MaskError(f"mask is a {type(value).__name__}; give a BlockMask")
        elif name not in ("quotas", "kv_lengths") and not isinstance(value, (Tensor, np.ndarray, type(None))):
            raise ProblemError(f"{name} is a {type(value).__name__}; a graph takes torch tensors")


def _check_axes(arguments: Mapping[str, Any], tensor_layout: str) -> None:
    for name in ("q", "k", "v"):
        value = arguments[name]
        if value is None and name != "v":
            raise ProblemError(f"{name} is None; give a tensor")
        if value is not None and value.ndim != 4:
            raise ProblemError(f"{name} has {value.ndim} axes; give four in the order {tensor_layout!r}")


# -- shapes of results, from shapes that may be symbolic -------------------------------------------


def _shape(name: str, arguments: Mapping[str, Any], settings: calls.Settings) -> tuple[Any, ...]:
    """The shape of a value that a call returns."""
    q, k = arguments["q"], arguments["k"]
    heads, tokens = (1, 2) if settings.tensor_layout == "bhsd" else (2, 1)
    batch, q_heads, q_len, channels = q.shape[0], q.shape[heads], q.shape[tokens], q.shape[3]
    if name == "%out":
        return tuple(q.shape)
    if name == "%lse":
        return (batch, q_heads, q_len)
    q_block, kv_block = _block(settings)
    rows, columns = -(-q_len // q_block), -(-k.shape[tokens] // kv_block)
    return {
        "%mask": (batch, q_heads, rows, columns),
        "%qb": (batch, q_heads, rows, channels),
        "%kb": (batch, k.shape[heads], columns, channels),
    }[name]


def _dtype(name: str, q: Any) -> str:
    """The dtype of a value that a call returns."""
    own = str((torch.as_tensor(q) if isinstance(q, np.ndarray) else q).dtype).rpartition(".")[2]
    if name == "%out":
        return own
    return "bool" if name == "%mask" else "float64" if own == "float64" else "float32"


def _block(settings: calls.Settings) -> tuple[Any, Any]:
    """Tokens in a query block and in a key block."""
    block = settings.block
    pair = tuple(block) if isinstance(block, (tuple, list)) else (block, block)
    if len(pair) != 2 or not all(isinstance(size, (int, torch.SymInt)) for size in pair):
        raise LayoutError(f"block={block!r} is not a plain whole number or two; the shape of the results depends on it")
    return pair[0], pair[1]


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _kinds_of_results(serial: str) -> tuple[tuple[str, str, tuple[int, ...], bool], ...]:
    """Name, dtype and shape of what a lowered plan returns, and whether that is a block mask."""
    plan = live[serial].plan
    shapes = {name: kind.shape for name, kind in plan.types.items()} | {"%out": plan.problem.q_shape}
    of_masks = given_types(plan)["%mask"]
    return tuple((name, plan.types[name].dtype, shapes[name], plan.types[name] == of_masks) for name in plan.returns)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _address(serial: str) -> str:
    """A lowered plan as a graph names it, in this process and in others."""
    executable = live[serial]
    address = json.dumps([executable.plan.to_json(), executable.backend.name, str(executable.device)])
    _called[address] = executable
    return address


# -- arguments as text and operands ----------------------------------------------------------------

_PARTS = (Grid, Text, Tokens)


def _write(value: Any, name: str, operands: Operands) -> Any:
    """A value as text: None, a truth value or text as it is, a tuple for anything else.

    Raises:
        ProblemError: a value that no graph can hold; it names the argument.
    """
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, (Tensor, np.ndarray)):
        return _write_array(value, operands)
    if isinstance(value, (int, float, torch.SymInt, torch.SymFloat)):
        return _write_number(value, operands)
    return _write_compound(value, name, operands)


def _write_compound(value: Any, name: str, operands: Operands) -> tuple[Any, ...]:
    if isinstance(value, (tuple, list)):
        return ("tuple", *[_write(item, name, operands) for item in value])
    if isinstance(value, _PARTS):
        kept = [_write(getattr(value, field.name), name, operands) for field in fields(value)]
        return (type(value).__name__, *kept)
    if isinstance(value, policies.Policy):
        kept = [(field.name, _write(getattr(value, field.name), name, operands)) for field in fields(value)]
        return ("policy", type(value).name, *kept)
    if isinstance(value, BlockMask):
        return _write_mask(value, operands)
    raise ProblemError(f"{name} holds a {type(value).__name__}; a graph takes numbers, text and tuples of them")


def _write_array(value: Any, operands: Operands) -> tuple[str]:
    if isinstance(value, Tensor):
        operands.tensors.append(value)
        return ("tensor",)
    operands.tensors.append(torch.as_tensor(value))  # torch.compile traces NumPy's arrays and numbers as tensors
    return ("array",) if value.ndim else ("number",)


def _write_number(value: Any, operands: Operands) -> tuple[str]:
    if isinstance(value, (int, torch.SymInt)):
        operands.sizes.append(value)
        return ("int",)
    # A float that the tracer knows is a constant; another is given as a tensor, or every value would get a graph.
    if has_static_value(value):
        operands.numbers.append(value)
        return ("float",)
    operands.tensors.append(torch.zeros((), dtype=torch.float64, device="cpu") + value)
    return ("number",)


def _write_mask(mask: BlockMask, operands: Operands) -> tuple[Any, ...]:
    operands.tensors.append(mask.blocks)
    operands.sizes.extend([mask.q_len, mask.kv_len, *mask.block])
    later = mask._later
    if isinstance(later, NotedLayout):
        for kept, more in zip(operands, later.operands, strict=True):
            kept.extend(more)
        return ("mask", later.text)
    if mask.layout is None:
        return ("mask", None)
    return ("mask", ("parts", _write(mask.layout.parts, "mask", operands), _write(mask.layout.block, "mask", operands)))


class Reader:
    """Reads what `_write` wrote."""

    def __init__(self, tensors: Any, sizes: Any, numbers: Any) -> None:
        self._tensors, self._sizes, self._numbers = iter(tensors), iter(sizes), iter(numbers)

    def read(self, text: Any) -> Any:
        """The value that a text stands for; to be asked in the order in which texts were written."""
        if type(text) is not tuple:
            return text
        kind, *items = text
        return _READERS[kind](self, *items)

    def _tensor(self) -> Tensor:
        tensor: Tensor = next(self._tensors)
        return tensor

    def _array(self) -> np.ndarray:
        array: np.ndarray = next(self._tensors).cpu().numpy()
        return array

    def _number(self) -> Any:
        return next(self._tensors).item()

    def _int(self) -> Any:
        return next(self._sizes)

    def _float(self) -> Any:
        return next(self._numbers)

    def _tuple(self, *items: Any) -> tuple[Any, ...]:
        return tuple([self.read(item) for item in items])

    def _grid(self, *items: Any) -> Grid:
        return Grid(*self._tuple(*items))

    def _text(self, count: Any) -> Text:
        return Text(self.read(count))

    def _tokens(self, count: Any) -> Tokens:
        return Tokens(self.read(count))

    def _policy(self, name: str, *items: tuple[str, Any]) -> policies.Policy:
        return policies.from_dict({"name": name, **{field: self.read(item) for field, item in items}})

    def _mask(self, layout: Any) -> BlockMask:
        blocks, (q_len, kv_len, rows, columns) = next(self._tensors), [next(self._sizes) for _ in range(4)]
        return BlockMask(blocks, q_len, kv_len, (rows, columns), self.read(layout))

    def _parts(self, parts: Any, block: Any) -> TokenLayout:
        return _layout_of(self.read(parts), self.read(block))

    def _settings(self, *items: tuple[str, Any]) -> TokenLayout:
        return calls.Settings(**{name: self.read(item) for name, item in items}).layout()


_READERS: dict[str, Any] = {
    "tensor": Reader._tensor,
    "array": Reader._array,
    "number": Reader._number,
    "int": Reader._int,
    "float": Reader._float,
    "tuple": Reader._tuple,
    "Grid": Reader._grid,
    "Text": Reader._text,
    "Tokens": Reader._tokens,
    "policy": Reader._policy,
    "mask": Reader._mask,
    "parts": Reader._parts,
    "settings": Reader._settings,
}


@lru_cache(maxsize=32)
def _layout_of(parts: Any, block: Any) -> TokenLayout:
    return TokenLayout(parts=parts, block=block)


# -- masks that leave a graph ----------------------------------------------------------------------


class NotedLayout:
    """The layout of a mask that left a graph, noted down there: it is worked out where its sizes are numbers."""

    def __init__(self, text: Any, operands: Operands) -> None:
        self.text, self.operands = text, operands
        self._layout: TokenLayout | None = None

    def __call__(self) -> TokenLayout:
        """The layout."""
        layout: TokenLayout = self._layout or Reader(*self.operands).read(self.text)
        if not self.is_traced():
            self._layout = layout
        return layout

    def is_traced(self) -> bool:
        """Whether a tracer still holds the sizes."""
        traced: bool = torch.compiler.is_compiling()
        return traced


_OF_LAYOUT = ("grid", "text", "text_position", "parts", "block", "window", "sink")


def _mask_made(blocks: Any, arguments: Mapping[str, Any], settings: calls.Settings) -> BlockMask:
    tokens = 2 if settings.tensor_layout == "bhsd" else 1
    q_len, kv_len = arguments["q"].shape[tokens], arguments["k"].shape[tokens]
    noted = Operands([], [], [])
    text = ("settings", *[(name, _write(getattr(settings, name), name, noted)) for name in _OF_LAYOUT])
    return BlockMask._trusted_later(blocks, q_len, kv_len, _block(settings), NotedLayout(text, noted))


def _leaves(mask: BlockMask) -> tuple[list[Any], Any]:
    operands = Operands([], [], [])
    _, text = _write_mask(mask, operands)
    return [leaf for kept in operands for leaf in kept], (text, tuple([len(kept) for kept in operands]))


def _named_leaves(mask: BlockMask) -> tuple[list[tuple[Any, Any]], Any]:
    leaves, context = _leaves(mask)
    return [(_pytree.SequenceKey(i), leaf) for i, leaf in enumerate(leaves)], context


def _from_leaves(given: Any, context: Any) -> BlockMask:
    (text, (tensors, sizes, _)), leaves = context, list(given)
    q_len, kv_len, rows, columns, *rest = leaves[tensors : tensors + sizes]
    if text is None:
        return BlockMask._trusted(leaves[0], q_len, kv_len, (rows, columns))
    noted = NotedLayout(text, Operands(leaves[1:tensors], rest, leaves[tensors + sizes :]))
    return BlockMask._trusted_later(leaves[0], q_len, kv_len, (rows, columns), noted)


_pytree.register_pytree_node(
    BlockMask,
    _leaves,
    _from_leaves,
    serialized_type_name="rainfusion.BlockMask",
    to_dumpable_context=repr,
    from_dumpable_context=ast.literal_eval,
    flatten_with_keys_fn=_named_leaves,
)
torch.serialization.add_safe_globals([BlockMask, NotedLayout, Operands, Grid, Text, Tokens, of_parts])

# -- when the graph runs: the operator makes the call ----------------------------------------------

_called: WeakValueDictionary[str, Executable] = WeakValueDictionary()


# The schema is spelled out: before 2.7 torch infers none from built-in generics.
@torch.library.custom_op(
    "rainfusion::call",
    mutates_args=(),
    schema="(Tensor[] tensors, SymInt[] sizes, float[] numbers, SymInt[] shapes, str text) -> Tensor[]",
)
def _make(tensors: Any, sizes: Any, numbers: Any, shapes: Any, text: str) -> list[Tensor]:
    (kind, *call), _ = _parsed(text)
    made = (_call if kind == "call" else _run)(Reader(tensors, sizes, numbers), *call)
    taken = {tensor.untyped_storage().data_ptr() for tensor in tensors}
    results = made if isinstance(made, tuple) else (made,)
    return [_own_memory(torch.as_tensor(getattr(value, "blocks", value)), taken) for value in results]


@_make.register_fake
def _(tensors: Any, sizes: Any, numbers: Any, shapes: Any, text: str) -> list[Tensor]:
    _, results = _parsed(text)
    left = iter(shapes)
    return [
        torch.empty(
            shape if isinstance(shape, tuple) else [next(left) for _ in range(shape)],
            dtype=getattr(torch, dtype),
            device=tensors[0].device,
        )
        for dtype, shape in results
    ]


def _refuse_backward(*_: Any) -> None:
    raise ProblemError("rainfusion computes no derivatives; call it under torch.no_grad()")


_make.register_autograd(_refuse_backward)


@lru_cache(maxsize=128)
def _parsed(text: str) -> Any:
    return ast.literal_eval(text)


def _call(reader: Reader, arguments: Any, settings: Any, returns: tuple[str, ...], backend: str | None) -> Any:
    given = {name: reader.read(text) for name, text in arguments}
    chosen = calls.Settings(**{name: reader.read(text) for name, text in settings})
    return calls.call(given, chosen, returns, backend)


def _run(reader: Reader, arguments: Any, returns: tuple[str, ...], address: str) -> Any:
    given = {name: reader.read(text) for name, text in arguments}
    executable = _called.get(address)
    if executable is None:
        plan, backend, device = json.loads(address)
        executable = _called[address] = dispatch.restore(Plan.from_json(plan), backend, device)
    results = executable.run(dict.fromkeys(("q", "k", "v", "mask", "quotas", "kv_lengths")) | given)
    results = results if isinstance(results, tuple) else (results,)
    return tuple(value for name, value in zip(executable.plan.returns, results, strict=True) if name in returns)


def _own_memory(tensor: Tensor, taken: set[int]) -> Tensor:
    """A result, contiguous, in memory that is no argument's and no other result's."""
    own = tensor.contiguous()
    own = own.clone() if own.untyped_storage().data_ptr() in taken else own
    taken.add(own.untyped_storage().data_ptr())
    return own
