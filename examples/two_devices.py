"""Attention over a video whose tokens are spread over the ranks of torch.distributed.

pip install 'rainfusion[torch]'
torchrun --nproc-per-node 2 examples/two_devices.py           # 19,456 tokens
torchrun --nproc-per-node 2 examples/two_devices.py --tiny    # 976 tokens, on the CPU as well
"""

import argparse
import os
import time

import torch
import torch.distributed as dist

import rainfusion
import rainfusion.distributed as rd


def main() -> None:
    """Attend in three ways, and compare each with what this rank computes alone."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="976 tokens instead of 19,456")
    args = parser.parse_args()
    grid, text, block = ((5, 12, 16), 16, 16) if args.tiny else ((10, 40, 48), 256, 128)

    on_cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_cuda else torch.device("cpu")
    if on_cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_cuda else "gloo")

    settings = {"grid": grid, "text": text, "block": block, "sparsity": 0.6, "sink": None}
    layout = rainfusion.TokenLayout(grid, text, block=block, sink=None)
    generator = torch.Generator().manual_seed(0)  # the same video on all ranks; a model has its own part of one
    whole = [torch.randn(1, 4, layout.length, 64, generator=generator).to(device) for _ in range(3)]
    alone = rainfusion.attention(*whole, **settings)

    q, k, v = (rd.shard(x, layout) for x in whole)  # whole blocks in block order
    for method in ("ulysses", "gather", "ring"):
        rd.attention(q, k, v, order="given", method=method, **settings)  # the first call plans
        start = time.perf_counter()
        out, mask = rd.attention(q, k, v, order="given", method=method, return_mask=True, **settings)
        together = rd.unshard(out, layout)  # in the order of the sequence again
        milliseconds = (time.perf_counter() - start) * 1000
        if dist.get_rank() == 0:
            error = float((together - alone).abs().max())
            print(
                f"{method}: {q.shape[2]} of {layout.length} tokens on each of {dist.get_world_size()} ranks, "
                f"density {mask.density:.3f}, {milliseconds:.0f} ms, largest difference {error:.1e}"
            )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
