"""rainfusion: block-sparse attention for video and image diffusion transformers on any accelerator.

    out = rainfusion.attention(q, k, v, grid=(21, 45, 80), sparsity=0.8)

Importing it loads nothing: every public name is imported when it is first used. For backends and passes there are
`rainfusion.ops`, the operations, `rainfusion.passes`, and `rainfusion.TorchArrays`, which needs torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rainfusion.backends.torch_arrays import TorchArrays as TorchArrays
    from rainfusion.core import ops as ops
    from rainfusion.core import passes as passes
    from rainfusion.core.backend import INTERFACE as INTERFACE
    from rainfusion.core.backend import ORACLE as ORACLE
    from rainfusion.core.backend import PORTABLE as PORTABLE
    from rainfusion.core.backend import TUNED as TUNED
    from rainfusion.core.backend import VENDOR as VENDOR
    from rainfusion.core.backend import Backend as Backend
    from rainfusion.core.backend import BackendSpec as BackendSpec
    from rainfusion.core.backend import Capabilities as Capabilities
    from rainfusion.core.backend import Device as Device
    from rainfusion.core.backend import Kernel as Kernel
    from rainfusion.core.backend import Segment as Segment
    from rainfusion.core.choice import Candidate as Candidate
    from rainfusion.core.choice import Choice as Choice
    from rainfusion.core.errors import BackendError as BackendError
    from rainfusion.core.errors import BackendUnavailableError as BackendUnavailableError
    from rainfusion.core.errors import LayoutError as LayoutError
    from rainfusion.core.errors import LoweringError as LoweringError
    from rainfusion.core.errors import MaskError as MaskError
    from rainfusion.core.errors import NoBackendError as NoBackendError
    from rainfusion.core.errors import PlanFormatError as PlanFormatError
    from rainfusion.core.errors import PolicyError as PolicyError
    from rainfusion.core.errors import ProblemError as ProblemError
    from rainfusion.core.errors import RainfusionError as RainfusionError
    from rainfusion.core.errors import RainfusionWarning as RainfusionWarning
    from rainfusion.core.errors import SparsityWarning as SparsityWarning
    from rainfusion.core.errors import SpeedWarning as SpeedWarning
    from rainfusion.core.errors import UnknownBackendError as UnknownBackendError
    from rainfusion.core.executable import Executable as Executable
    from rainfusion.core.layout import BlockedAxis as BlockedAxis
    from rainfusion.core.layout import Grid as Grid
    from rainfusion.core.layout import Text as Text
    from rainfusion.core.layout import TokenLayout as TokenLayout
    from rainfusion.core.layout import Tokens as Tokens
    from rainfusion.core.mask import BlockMask as BlockMask
    from rainfusion.core.mask import PackedMask as PackedMask
    from rainfusion.core.plan import Plan as Plan
    from rainfusion.core.planner import plan as plan
    from rainfusion.core.policies import Budget as Budget
    from rainfusion.core.policies import Fixed as Fixed
    from rainfusion.core.policies import Hybrid as Hybrid
    from rainfusion.core.policies import Policy as Policy
    from rainfusion.core.policies import TopK as TopK
    from rainfusion.core.policies import TopP as TopP
    from rainfusion.core.problem import AttentionProblem as AttentionProblem
    from rainfusion.core.stages import Stages as Stages
    from rainfusion.dispatch import cache as cache
    from rainfusion.dispatch import choose as choose
    from rainfusion.dispatch import register as register
    from rainfusion.dispatch import unregister as unregister
    from rainfusion.dispatch import use as use
    from rainfusion.functional import attention as attention
    from rainfusion.functional import block_means as block_means
    from rainfusion.functional import lower as lower
    from rainfusion.functional import merge as merge
    from rainfusion.functional import select as select
    from rainfusion.plugins import hookimpl as hookimpl
    from rainfusion.plugins.probe import devices as devices

__version__ = "0.2.0"

_HOMES = {
    "rainfusion.functional": (
        "attention",
        "block_means",
        "lower",
        "merge",
        "select",
    ),
    "rainfusion.core.backend": (
        "INTERFACE",
        "ORACLE",
        "PORTABLE",
        "TUNED",
        "VENDOR",
        "Backend",
        "BackendSpec",
        "Capabilities",
        "Device",
        "Kernel",
        "Segment",
    ),
    "rainfusion.core.choice": (
        "Candidate",
        "Choice",
    ),
    "rainfusion.core.errors": (
        "BackendError",
        "BackendUnavailableError",
        "LayoutError",
        "LoweringError",
        "MaskError",
        "NoBackendError",
        "PlanFormatError",
        "PolicyError",
        "ProblemError",
        "RainfusionError",
        "RainfusionWarning",
        "SparsityWarning",
        "SpeedWarning",
        "UnknownBackendError",
    ),
    "rainfusion.core.executable": ("Executable",),
    "rainfusion.core.layout": (
        "BlockedAxis",
        "Grid",
        "Text",
        "TokenLayout",
        "Tokens",
    ),
    "rainfusion.core.mask": ("BlockMask", "PackedMask"),
    "rainfusion.core.plan": ("Plan",),
    "rainfusion.core.planner": ("plan",),
    "rainfusion.core.policies": (
        "Budget",
        "Fixed",
        "Hybrid",
        "Policy",
        "TopK",
        "TopP",
    ),
    "rainfusion.core.problem": ("AttentionProblem",),
    "rainfusion.core.stages": ("Stages",),
    "rainfusion.dispatch": (
        "cache",
        "choose",
        "register",
        "unregister",
        "use",
    ),
    "rainfusion.plugins": ("hookimpl",),
    "rainfusion.plugins.probe": ("devices",),
}
_MODULES = {"ops": "rainfusion.core.ops", "passes": "rainfusion.core.passes"}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}
__all__ = sorted({*_HOME_OF, *_MODULES})  # noqa: PLE0605
_HOME_OF["TorchArrays"] = "rainfusion.backends.torch_arrays"  # not for `import *`, which works without torch


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        value: Any = import_module(_MODULES[name])
    elif name in _HOME_OF:
        value = getattr(import_module(_HOME_OF[name]), name)
    else:
        raise AttributeError(f"module 'rainfusion' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "TorchArrays", "__version__"]
