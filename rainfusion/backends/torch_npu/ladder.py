"""The ladder: which operator attends, in order of preference, and what happens when CANN lacks one.

| rung | operator                         | reads                    | log-sum-exp | where                    |
|------|----------------------------------|--------------------------|-------------|--------------------------|
| 1    | npu::npu_block_sparse_attention  | the block mask           | yes         | everywhere               |
| 2    | mindiesd::block_sparse_attention | the block mask           | yes         | with MindIE-SD           |
| 3    | mindiesd::rainfusionattention    | lists of kept blocks     | no          | with MindIE-SD, A2 and A3 |
| 4    | npu::npu_fusion_attention        | the mask, token by token | yes         | while that mask is small |

Below them is a refusal with the reason of every rung: what was to be sparse never becomes dense unseen.
"""

from __future__ import annotations

from torch import Tensor

from rainfusion.backends.torch_npu.block_mask import BlockMask
from rainfusion.backends.torch_npu.fusion_attention import FusionAttention
from rainfusion.backends.torch_npu.index_lists import IndexLists
from rainfusion.backends.torch_npu.operators import LacksSymbolError, trouble
from rainfusion.backends.torch_npu.rung import Attended, Rung, Wanted
from rainfusion.core.errors import LoweringError, RainfusionWarning, warn_caller

LADDER: tuple[Rung, ...] = (
    BlockMask("npu::npu_block_sparse_attention"),
    BlockMask("mindiesd::block_sparse_attention"),
    IndexLists("mindiesd::rainfusionattention"),
    FusionAttention("npu::npu_fusion_attention"),
)


def rung_for(wanted: Wanted) -> Rung:
    """The first rung that can do it.

    Raises:
        LoweringError: none can; the message has the reasons.
    """
    able = next((rung for rung in LADDER if not _reasons(rung, wanted)), None)
    if able is None:
        raise LoweringError(f"{'; '.join(refusals(wanted))}. backend='torch' does it with plain torch operations")
    return able


def refusals(wanted: Wanted) -> list[str]:
    """Why no rung can do it, one entry a rung; empty where one can."""
    reasons = {rung: _reasons(rung, wanted) for rung in LADDER}
    if not all(reasons.values()):
        return []
    return [f"{rung}: {' and '.join(why)}" for rung, why in reasons.items()]


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, wanted: Wanted) -> Attended:
    """Attend by the first rung that can; see `Rung.arguments` for the tensors.

    Warns:
        RainfusionWarning: CANN lacks an operator. Once: this process does not try it again.

    Raises:
        LoweringError: no rung is left.
    """
    while True:
        rung = rung_for(wanted)
        try:
            return rung.attend(q, k, v, mask, wanted)
        except LacksSymbolError as lacking:
            left = [str(other) for other in LADDER if not _reasons(other, wanted)]
            instead = f"using {left[0]} instead" if left else "no other operator can do this plan"
            warn_caller(f"{lacking}; {instead}", RainfusionWarning)


def _reasons(rung: Rung, wanted: Wanted) -> list[str]:
    """Why a rung is out. What is installed is looked up last: it may have to import MindIE-SD."""
    documented = [*rung.objections(wanted)]
    missing = "" if documented else trouble(rung.operator, rung.keywords)
    return documented or ([missing] if missing else [])
