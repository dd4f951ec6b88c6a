"""The Ascend chips that have block-sparse attention, and in what they differ.

Source: the CANN documentation of aclnnBlockSparseAttention and aclnnRainFusionAttention.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Chip:
    """One generation of chips.

    Attributes:
        name: as the documentation calls it.
        socs: its numbers in `torch_npu.npu.get_soc_version()`.
        inner_precise: the softmax of the block-sparse operators: 0 in float32; 4 in the tensors' dtype, with
            the running output rescaled in float32.
        has_index_lists: whether it has the older operator that takes lists of blocks.
    """

    name: str
    socs: range
    inner_precise: int
    has_index_lists: bool


CHIPS = (
    Chip("A2", range(220, 226), inner_precise=0, has_index_lists=True),
    Chip("A3", range(250, 256), inner_precise=0, has_index_lists=True),
    Chip("950", range(260, 261), inner_precise=4, has_index_lists=False),  # 4 is the one mode it has
)


def chip_of(soc: int) -> Chip | None:
    """The chip with that number, None where it is none of them."""
    return next((chip for chip in CHIPS if soc in chip.socs), None)
