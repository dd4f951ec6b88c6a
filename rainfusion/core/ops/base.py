"""Op: the base class of operations, their registry, and the types of the values between them.

An operation is a frozen dataclass. Three kinds of fields describe it: operands name the values it reads, results name
the values it makes, and every other field is an attribute. Its definition, `Op.meaning`, is written once in array-API
code and runs on every backend. The set is open: subclassing `Op` anywhere registers the operation.
"""

from __future__ import annotations

import base64
import hashlib
import math
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from functools import cache, cached_property
from typing import Any, ClassVar, NamedTuple

import numpy as np

from rainfusion.core.checks import shown
from rainfusion.core.errors import PlanFormatError

Array = Any
_MOST_DATA_BYTES = 2**28
_MOST_OF_A_PLAN = 2**30
_DATA_DTYPES = ("bool", "int32", "int64", "float32", "float64")


class ValueType(NamedTuple):
    """The shape and the dtype name of a value, known before any tensor is."""

    shape: tuple[int, ...]
    dtype: str

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


def operand(*, optional: bool = False) -> Any:
    """A dataclass field that names a value the operation reads; None where an optional one is absent."""
    return field(default=None, metadata={"role": "operand"}) if optional else field(metadata={"role": "operand"})


def result(*, optional: bool = False) -> Any:
    """A dataclass field that names a value the operation makes; None where an optional one is not needed."""
    return field(default=None, metadata={"role": "result"}) if optional else field(metadata={"role": "result"})


class Signature(NamedTuple):
    """The field names of an operation class by role."""

    operands: tuple[str, ...]
    results: tuple[str, ...]
    attributes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Op(ABC):
    """One operation of a plan.

    A subclass is a frozen, keyword-only dataclass with a unique `name`, fields from `operand()` and `result()`, and
    attributes that are hashable and made of plain JSON values, or that `encode` and `decode` translate.
    """

    name: ClassVar[str]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" in cls.__dict__:
            _register(cls)

    @abstractmethod
    def meaning(self, *args: Any, **kwargs: Any) -> Any:
        """The definition: from the operands, in field order and None where absent, to the results in field order.

        One array for one result, else a tuple; optional results are made whether or not they are named.
        """

    def infer(self, types: Mapping[str, ValueType]) -> dict[str, ValueType]:
        """The types of the results, by field, from those of the operands that are present, by field.

        By default every result has the type of the first operand.

        Raises:
            PlanFormatError: operands that do not fit the operation.
        """
        first = next(iter(types.values()))
        return dict.fromkeys(signature(type(self)).results, first)

    def encode(self, attribute: str) -> Any:
        """An attribute as JSON holds it."""
        return getattr(self, attribute)

    @classmethod
    def decode(cls, attribute: str, value: Any) -> Any:
        """An attribute from JSON; lists become tuples."""
        return _tuples(value)

    def details(self) -> dict[str, Any]:
        """What `print` shows after the operands, by label (empty for none); by default the attributes that are set."""
        values = {name: getattr(self, name) for name in signature(type(self)).attributes}
        return {name: value for name, value in values.items() if value is not None and value is not False}

    @cached_property
    def operands(self) -> dict[str, str]:
        """Value names by operand field, absent ones left out."""
        return self._present(signature(type(self)).operands)

    @cached_property
    def results(self) -> dict[str, str]:
        """Value names by result field, those that are not needed left out."""
        return self._present(signature(type(self)).results)

    @cached_property
    def reads(self) -> tuple[str, ...]:
        """The values it reads, once each."""
        return tuple(dict.fromkeys(self.operands.values()))

    @cached_property
    def makes(self) -> tuple[str, ...]:
        """The values it makes."""
        return tuple(self.results.values())

    def evaluate(self, values: Mapping[str, Array]) -> dict[str, Array]:
        """Run the definition: from values by name to the results that are named, by name."""
        roles = signature(type(self))
        names = (getattr(self, name) for name in roles.operands)
        with np.errstate(invalid="ignore", over="ignore", divide="ignore"):  # NaN and infinity spread without a word
            returned = self.meaning(*(None if name is None else values[name] for name in names))
        results = returned if isinstance(returned, tuple) else (returned,)
        given = zip((getattr(self, name) for name in roles.results), results, strict=True)
        return {name: value for name, value in given if name is not None}

    def to_dict(self) -> dict[str, Any]:
        """The operation as plain JSON values."""
        roles = signature(type(self))
        attributes = {name: self.encode(name) for name in roles.attributes}
        return {"op": self.name, **self.operands, **self.results, **attributes}

    def __getstate__(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def __str__(self) -> str:
        details = " ".join(f"{key}{key and '='}{_described(value)}" for key, value in self.details().items())
        return f"{self.name:<12} {' '.join(self.reads)}{'  ' if self.reads and details else ''}{details}".rstrip()

    def _present(self, names: tuple[str, ...]) -> dict[str, str]:
        return {name: value for name in names if (value := getattr(self, name)) is not None}


@cache
def signature(cls: type[Op]) -> Signature:
    """The fields of an operation class by role."""
    roles: dict[str, list[str]] = {"operand": [], "result": [], "attribute": []}
    for f in fields(cls):
        roles[f.metadata.get("role", "attribute")].append(f.name)
    return Signature(*(tuple(names) for names in roles.values()))


_OPS: dict[str, type[Op]] = {}


def _register(cls: type[Op]) -> None:
    known = _OPS.get(cls.name)
    if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
        raise PlanFormatError(
            f"operation {cls.name!r} is already defined by {known.__module__}.{known.__qualname__}; choose another name"
        )
    _OPS[cls.name] = cls


def from_dict(record: Mapping[str, Any]) -> Op:
    """The operation that `Op.to_dict` wrote.

    Raises:
        PlanFormatError: an unknown operation, fields it does not have, or attributes out of range.
    """
    name = record.get("op")
    cls = _OPS.get(name) if isinstance(name, str) else None
    if cls is None:
        raise PlanFormatError(
            f"operation {shown(name)} is not known; known are {', '.join(sorted(_OPS))}. Import the module that "
            "defines it"
        )
    roles = signature(cls)
    values: dict[str, Any] = {}
    for key, value in record.items():
        if key == "op":
            continue
        if key in roles.attributes:
            values[key] = cls.decode(key, value)
        elif key in (*roles.operands, *roles.results):
            values[key] = value_name(value)
        else:
            raise PlanFormatError(f"operation {name} has no field {shown(key)}")
    return cls(**values)


def refuse_much_data(records: Iterable[Mapping[str, Any]]) -> None:
    """Look at what operations of a file say of their data, before any is unpacked: all of it is limited, too.

    Raises:
        PlanFormatError: it is more.
    """
    stated = [value for record in records for value in record.values() if isinstance(value, dict)]
    sizes = [
        math.prod(value["shape"]) * np.dtype(value["dtype"]).itemsize
        for value in stated
        if value.get("dtype") in _DATA_DTYPES and _is_shape(value.get("shape"))
    ]
    expect(sum(sizes) <= _MOST_OF_A_PLAN, f"data of {sum(sizes)} bytes; at most {_MOST_OF_A_PLAN} are read")


def _is_shape(value: Any) -> bool:
    return isinstance(value, list) and len(value) <= 4 and all(type(n) is int and n >= 0 for n in value)


def value_name(name: Any) -> str:
    """The name itself if it can name a value: ``%`` and a Python identifier.

    Raises:
        PlanFormatError: it cannot.
    """
    if not isinstance(name, str) or len(name) > 80 or name[:1] != "%" or not name[1:].isidentifier():
        raise PlanFormatError(f"{shown(name)} does not name a value; give % and an identifier, such as %out")
    return name


def expect(holds: bool, message: str) -> None:
    """Raise PlanFormatError with the message unless `holds`; for `Op.infer`."""
    if not holds:
        raise PlanFormatError(message)


@dataclass(frozen=True, eq=False)
class Data:
    """A read-only array as an attribute: hashable, equal by content, written to JSON compressed.

    Raises:
        PlanFormatError: another dtype than bool, int32, int64, float32 or float64, or more than 256 MiB.
    """

    array: np.ndarray

    def __post_init__(self) -> None:
        array = np.ascontiguousarray(self.array)
        expect(array.dtype.name in _DATA_DTYPES, f"data of dtype {array.dtype}; give one of {', '.join(_DATA_DTYPES)}")
        expect(array.nbytes <= _MOST_DATA_BYTES, f"data of {array.nbytes} bytes; at most {_MOST_DATA_BYTES} are held")
        if array.flags.writeable or array is not self.array:
            array = array.copy()
            array.flags.writeable = False
        object.__setattr__(self, "array", array)

    @cached_property
    def digest(self) -> str:
        """SHA-256 over dtype, shape and content."""
        head = f"{self.array.dtype.name}{self.array.shape}".encode()
        return hashlib.sha256(head + self.array.tobytes()).hexdigest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Data) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def to_dict(self) -> dict[str, Any]:
        """Dtype, shape and the compressed content."""
        text = base64.b64encode(zlib.compress(self.array.tobytes(), 9)).decode()
        return {"dtype": self.array.dtype.name, "shape": list(self.array.shape), "zlib": text}

    @classmethod
    def from_dict(cls, record: Any) -> Data:
        """The data that `to_dict` wrote; never unpacks more than it says, nor more than is allowed.

        Raises:
            PlanFormatError: anything else.
        """
        try:
            dtype, shape = record["dtype"], tuple(record["shape"])
            expect(dtype in _DATA_DTYPES, f"data of dtype {shown(dtype)}; give one of {', '.join(_DATA_DTYPES)}")
            expect(len(shape) <= 4 and all(type(n) is int and n >= 0 for n in shape), f"data of shape {shown(shape)}")
            size = math.prod(shape) * np.dtype(dtype).itemsize
            expect(size <= _MOST_DATA_BYTES, f"data of {size} bytes; at most {_MOST_DATA_BYTES} are read")
            content = zlib.decompressobj().decompress(base64.b64decode(record["zlib"], validate=True), size + 1)
        except (LookupError, TypeError, ValueError, zlib.error) as error:
            raise PlanFormatError(f"not data of a plan: {type(error).__name__}: {error}") from error
        expect(len(content) == size, f"data of {shown(shape)} {dtype} unpacks to another size than {size} bytes")
        return cls(np.frombuffer(content, dtype=dtype).reshape(shape))

    def __repr__(self) -> str:
        return f"Data({self.array.dtype.name} {self.array.shape} {self.digest[:8]})"

    def __str__(self) -> str:
        if self.array.size == 0:
            return f"{self.array.dtype.name}{list(self.array.shape)}"
        low, high = self.array.min(), self.array.max()
        span = f"{low:g}" if low == high else f"{low:g}..{high:g}"
        return f"{span} {self.array.dtype.name}{list(self.array.shape)}"


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value


def _described(value: Any) -> str:
    if isinstance(value, tuple) and all(isinstance(v, int) for v in value):
        return "x".join(map(str, value))
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)
