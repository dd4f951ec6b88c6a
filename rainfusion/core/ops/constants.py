"""Operations without operands: the token order, arrays known at planning, and the mask that keeps everything.

They are evaluated once for a device, when something reads them, and shared by every plan that has the same one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from rainfusion.core.layout import TokenLayout
from rainfusion.core.ops.base import Data, Op, ValueType, expect, result


@dataclass(frozen=True, kw_only=True)
class WindowOrder(Op):
    """The token order of a layout and its inverse, int64 ``[tokens]`` each.

    Position p of the block order holds token ``order[p]``; token i stands at position ``inverse[i]``.
    """

    name: ClassVar[str] = "window_order"
    order: str | None = result(optional=True)
    inverse: str | None = result(optional=True)
    layout: TokenLayout

    def meaning(self) -> tuple[np.ndarray, np.ndarray]:
        assert self.layout.order is not None
        assert self.layout.inverse is not None
        return self.layout.order, self.layout.inverse

    def infer(self, types: Mapping[str, ValueType]) -> dict[str, ValueType]:
        expect(self.layout.length is not None, "window_order needs a layout with parts")
        assert self.layout.length is not None
        kind = ValueType((self.layout.length,), "int64")
        return {"order": kind, "inverse": kind}

    def encode(self, attribute: str) -> Any:
        return self.layout.to_dict()

    @classmethod
    def decode(cls, attribute: str, value: Any) -> Any:
        return TokenLayout.from_dict(value)

    def details(self) -> dict[str, Any]:
        layout = self.layout
        shown: dict[str, Any] = {"": f"({layout})", "window": layout.window}
        if len(layout.grids) == 1 and layout.grids[0].sinks:
            shown["sink"] = layout.grids[0].sinks
        return {name: value for name, value in {**shown, "block": layout.block}.items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class Constant(Op):
    """An array known at planning: row quotas, or a prior on the scores."""

    name: ClassVar[str] = "constant"
    value: str = result()
    data: Data

    def meaning(self) -> np.ndarray:
        return self.data.array

    def infer(self, types: Mapping[str, ValueType]) -> dict[str, ValueType]:
        return {"value": ValueType(self.data.array.shape, self.data.array.dtype.name)}

    def details(self) -> dict[str, Any]:
        return {"": self.data}

    def encode(self, attribute: str) -> Any:
        return self.data.to_dict()

    @classmethod
    def decode(cls, attribute: str, value: Any) -> Any:
        return Data.from_dict(value)


@dataclass(frozen=True, kw_only=True)
class AllBlocks(Op):
    """The mask of dense attention, all True: bool ``[batch, heads, q blocks, key blocks]``."""

    name: ClassVar[str] = "all_blocks"
    mask: str = result()
    shape: tuple[int, int, int, int]

    def meaning(self) -> np.ndarray:
        return np.ones(self.shape, dtype=bool)

    def infer(self, types: Mapping[str, ValueType]) -> dict[str, ValueType]:
        plain = len(self.shape) == 4 and all(type(n) is int and n > 0 for n in self.shape)
        expect(plain, "all_blocks needs four sizes of at least 1")
        return {"mask": ValueType(self.shape, "bool")}
