"""rainfusion: block-sparse attention for video and image diffusion transformers on any accelerator.

    out = rainfusion.attention(q, k, v, grid=(21, 45, 80), sparsity=0.8)

Importing it loads nothing: every public name is imported when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rainfusion.api import attention as attention
    from rainfusion.api import choose as choose
    from rainfusion.api import lower as lower
    from rainfusion.api import register as register
    from rainfusion.api import unregister as unregister
    from rainfusion.api import use as use
    from rainfusion.core.backend import Backend as Backend
    from rainfusion.core.backend import BackendSpec as BackendSpec
    from rainfusion.core.backend import Capabilities as Capabilities
    from rainfusion.core.backend import Device as Device
    from rainfusion.core.backend import Kernel as Kernel
    from rainfusion.core.errors import RainfusionError as RainfusionError
    from rainfusion.core.errors import SparsityWarning as SparsityWarning
    from rainfusion.core.errors import SpeedWarning as SpeedWarning
    from rainfusion.core.ir import Plan as Plan
    from rainfusion.core.layout import TokenLayout as TokenLayout
    from rainfusion.core.lower import Executable as Executable
    from rainfusion.core.mask import BlockMask as BlockMask
    from rainfusion.core.planner import plan as plan
    from rainfusion.core.policy import Fixed as Fixed
    from rainfusion.core.policy import TopK as TopK
    from rainfusion.core.policy import TopP as TopP
    from rainfusion.core.problem import AttentionProblem as AttentionProblem
    from rainfusion.plugins import hookimpl as hookimpl
    from rainfusion.plugins.probe import devices as devices

__version__ = "0.1.0"

_HOMES = {
    "rainfusion.api": ("attention", "choose", "lower", "register", "unregister", "use"),
    "rainfusion.core.backend": ("Backend", "BackendSpec", "Capabilities", "Device", "Kernel"),
    "rainfusion.core.errors": ("RainfusionError", "SparsityWarning", "SpeedWarning"),
    "rainfusion.core.ir": ("Plan",),
    "rainfusion.core.layout": ("TokenLayout",),
    "rainfusion.core.lower": ("Executable",),
    "rainfusion.core.mask": ("BlockMask",),
    "rainfusion.core.planner": ("plan",),
    "rainfusion.core.policy": ("Fixed", "TopK", "TopP"),
    "rainfusion.core.problem": ("AttentionProblem",),
    "rainfusion.plugins": ("hookimpl",),
    "rainfusion.plugins.probe": ("devices",),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}
__all__ = sorted(_HOME_OF)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'rainfusion' has no attribute {name!r}")
    value = getattr(import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
