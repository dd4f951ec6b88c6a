"""The Ascend chips that have block-sparse attention, as data: what their operators take, and where that is written.

Everything here is read in documentation and in the vendor's packages; nothing of it was tried on a chip. What a plan
is refused for, what an operator is given, the table in docs/ascend.md and the tests read this table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class Chip:
    """One generation of chips.

    Attributes:
        name: as CANN's documentation calls it.
        socs: its numbers in `torch_npu.npu.get_soc_version()`.
        dtypes: of q, k and v of the block-sparse operators.
        inner_precise: the softmax that is asked of them: 0 in float32; 4 in the tensors' dtype, with the running
            output rescaled in float32.
        key_block: key blocks are multiples of it; query blocks have any size.
        head_dims: others are padded with zeros, which change nothing.
        layouts: of the tensors of operators with a block mask; BNSD is the one that is used.
        has_lse: whether those operators give the log-sum-exp.
        has_index_lists: whether it has the older operator, which takes lists of blocks.
        graph_dtypes: dtypes that torch_npu's Meta kernel takes with this softmax, so that graphs can be captured.
        precisions: quantised attention that MindIE-SD has for it; not lowered to yet.
    """

    name: str
    socs: range
    inner_precise: int
    has_index_lists: bool
    graph_dtypes: tuple[str, ...]
    precisions: tuple[str, ...]
    dtypes: tuple[str, ...] = ("float16", "bfloat16")
    key_block: int = 128
    head_dims: tuple[int, ...] = (64, 128)
    layouts: tuple[str, ...] = ("BNSD", "TND")
    has_lse: bool = True


_BOTH = ("float16", "bfloat16")

CHIPS = (
    Chip("A2", range(220, 226), inner_precise=0, has_index_lists=True, graph_dtypes=_BOTH, precisions=()),
    Chip("A3", range(250, 256), inner_precise=0, has_index_lists=True, graph_dtypes=_BOTH, precisions=()),
    Chip(
        "950",
        range(260, 261),
        inner_precise=4,
        has_index_lists=False,
        graph_dtypes=("float16",),
        precisions=("int8", "fp8"),
    ),
)

SOURCES: Mapping[str, str] = MappingProxyType(
    {
        "socs": "MindIE-SD 3.1.0, utils/get_platform.py (it calls the 950 A5)",
        "dtypes": "CANN, aclnnBlockSparseAttention: types of query, key and value",
        "inner_precise": "CANN, aclnnBlockSparseAttentionV2: innerPrecise; MindIE-SD 3.1.0 insists on 4, too",
        "key_block": "CANN, aclnnBlockSparseAttention: blockShapeY; the Meta kernel of torch_npu 2.13",
        "head_dims": "CANN, aclnnBlockSparseAttention: constraints on D",
        "layouts": "CANN, aclnnBlockSparseAttention: qInputLayout (V2 adds BSND, which MindIE-SD 3.1.0 refuses)",
        "has_lse": "CANN, aclnnBlockSparseAttention: softmaxLseFlag; for the 950, release notes of ops-transformer",
        "has_index_lists": "CANN, aclnnRainFusionAttention: supported products",
        "graph_dtypes": "the Meta kernel of torch_npu 2.13, run in tests/ascend",
        "precisions": "MindIE-SD 3.1.0, sparse_flash_attn_rf_v3.py; CANN, aclnnBlockSparseAttentionV2 (FP8: 950 alone)",
    }
)
"""Where each fact is written, by the attribute of `Chip`."""


def chip_of(soc: int) -> Chip | None:
    """The chip with that number of torch_npu's, None where it is none of them."""
    return next((chip for chip in CHIPS if soc in chip.socs), None)
