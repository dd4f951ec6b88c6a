"""Small argument checks shared by the dataclasses of the core."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from numbers import Real
from typing import Any, TypeVar

Instance = TypeVar("Instance")

# Kernels index tokens and blocks in int32. The limit also keeps a plan or mask from a hostile file harmless.
LARGEST = 2**31 - 1
_FLAGS = {False: False, True: True}


def as_int(value: Any, name: str, error: type[Exception], minimum: int = 1) -> int:
    """Return `value` as an int from `minimum` to LARGEST, or raise `error` naming the argument.

    Under a tracer a size may be symbolic: index() would fix it to one number, so it is compared only, or, where it is
    a torch.SymInt, taken as it is.
    """
    if type(value).__name__ == "SymInt" or (type(value) is int and minimum <= value <= LARGEST):
        symbolic: int = value
        return symbolic
    try:
        number = operator.index(value)
    except Exception:  # no __index__, or one that fails
        raise error(f"{name}={shown(value)} is not an integer; give a whole number >= {minimum}") from None
    if isinstance(value, bool) or not minimum <= number <= LARGEST:
        raise error(f"{name}={shown(value)} is not allowed; give a whole number from {minimum} to {LARGEST}")
    return number


def as_number(value: Any, name: str, error: type[Exception], allowed: str) -> float:
    """Return `value` as a finite float, or raise `error`; text and truth values are no numbers."""
    if isinstance(value, Real) and not isinstance(value, bool):
        try:
            number = float(value)
        except Exception:  # too large for one, or a __float__ that fails
            number = math.inf
        if abs(number) < math.inf:  # math.isfinite would fix a number that a tracer keeps symbolic
            return number
    raise error(f"{name}={shown(value)} is not a finite number; give {allowed}")


def one_of(value: Any, allowed: Iterable[Any], name: str, error: type[Exception]) -> None:
    """Raise `error` unless `value` is one of `allowed`."""
    allowed = tuple(allowed)  # membership by `in` would compare arrays, too, element by element
    if not any(value is item or (isinstance(value, type(item)) and value == item) for item in allowed):
        raise error(f"{name}={shown(value)} is not known; choose one of {', '.join(map(repr, allowed))}")


def as_flag(value: Any, name: str, error: type[Exception]) -> bool:
    """Return a truth value as a bool, or raise `error`: text and arrays are never both true and meant."""
    try:
        return _FLAGS[value]  # NumPy's truth values are equal to Python's, and so are 0 and 1
    except Exception:  # another value, or one without a hash
        raise error(f"{name}={shown(value)} is not a truth value; give True or False") from None


def as_share(value: Any, name: str, error: type[Exception], *, top: bool) -> float:
    """Return `value` as a float in [0, 1), or in [0, 1] where `top` is set."""
    allowed = f"a number in [0, 1{']' if top else ')'}"
    share = as_number(value, name, error, allowed)
    if not (0.0 <= share < 1.0 or (top and share == 1.0)):
        raise error(f"{name}={shown(value)} is out of range; give {allowed}")
    return share


def as_instance(value: Any, kind: type[Instance], name: str, error: type[Exception], source: str = "") -> Instance:
    """Return `value` where it is a `kind`, or raise `error` naming the argument and where to get one."""
    if not isinstance(value, kind):
        hint = f" of {source}" if source else ""
        raise error(f"{name}={shown(value)} is a {type(value).__name__}; give a {kind.__name__}{hint}")
    return value


def as_sizes(value: Any, n: int, name: str, error: type[Exception]) -> tuple[int, ...]:
    """Return `value` as a tuple of `n` ints from 1 to LARGEST, or raise `error` naming the argument."""
    if not isinstance(value, tuple | list) or len(value) != n:
        raise error(f"{name}={shown(value)} is not a tuple of {n} whole numbers")
    return tuple(as_int(size, name, error) for size in value)


def shown(value: Any) -> str:
    """The value as Python writes it, on one line and cut to 80 characters, so that an error message stays readable.

    A value that cannot be written (an integer too long for `repr`, nesting too deep) is shown by its type.
    """
    try:
        text = " ".join(repr(value[:80] if isinstance(value, str | bytes | list | tuple) else value).splitlines())
    except BaseException:  # repr runs code of the value's class
        text = f"<{type(value).__name__}>"
    return text if len(text) <= 80 else f"{text[:77]}..."
