"""Attention kernels for a profiler, each launched once between the marks that it is told to look at.

    ncu --profile-from-start off --metrics sm__cycles_elapsed.max,dram__bytes_read.sum python benchmarks/cuda_profile.py

Cycles at a clock that the profiler holds say what a kernel needs; at its power limit a card's own clock says what it
burns. The problems are those of `cuda_attention.py --parts attend`; lines beginning with ## tell launches apart.
"""

from __future__ import annotations

from argparse import Namespace

import torch
from cuda_attention import ATTEND, FLASH_4, OURS, attend_kernels, random_mask, tensors


def main() -> None:
    torch.manual_seed(0)
    for heads, length, sparsity in ATTEND:
        q, k, v = tensors(heads, length, Namespace(head_dim=128, dtype="bfloat16"))
        kernels = attend_kernels(q, k, v, random_mask(heads, length, sparsity))
        for name in (OURS, FLASH_4):
            if name in kernels:
                kernels[name]()  # compiles
                torch.cuda.synchronize()
                print(f"## {heads} heads, {length} tokens, {sparsity:.0%} skipped: {name}", flush=True)
                torch.cuda.profiler.start()
                kernels[name]()
                torch.cuda.synchronize()
                torch.cuda.profiler.stop()


if __name__ == "__main__":
    main()
