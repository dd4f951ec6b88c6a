"""Evidence: what one test saw, carried to the report by pytest's own user properties (also between processes)."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pytest

    from rainfusion.plugins.conformance.target import Target

PROPERTY = "rainfusion"


@dataclass(frozen=True)
class Evidence:
    """A JSON object that grows while the test runs."""

    record: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, item: pytest.Item) -> Evidence:
        """The evidence of a test, made on first use."""
        properties = dict(item.user_properties)
        if PROPERTY not in properties:
            properties[PROPERTY] = {"test": item.name}
            item.user_properties.append((PROPERTY, properties[PROPERTY]))
        return cls(properties[PROPERTY])  # type: ignore[arg-type]

    def ran_on(self, target: Target) -> None:
        """Note the target: backend and its revision, device and what imitates it, claims."""
        claims = {key: _plain(value) for key, value in asdict(target.capabilities).items()}
        self.record["target"] = {
            "backend": target.backend.name,
            "revision": target.revision,
            "device": str(target.device),
            "device_name": target.device.name,
            "stand_in": target.stand_in,
            "capabilities": claims,
        }

    def saw(self, **numbers: float) -> None:
        """Note measured numbers; JSON has no infinity, which is written as text."""
        self.record.update({key: x if math.isfinite(x) else str(x) for key, x in numbers.items()})


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, frozenset) else value
