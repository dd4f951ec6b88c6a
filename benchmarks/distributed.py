"""Attention over a video that is spread over several GPUs, beside one GPU alone: speed, what travels, and exactness.

    PYTHONPATH=. torchrun --nproc-per-node 2 benchmarks/distributed.py --json distributed-h200-x2.json
    PYTHONPATH=. torchrun --nproc-per-node 2 benchmarks/distributed.py --tiny      # on the CPU, with gloo

Every method of `rainfusion.distributed`, dense Ulysses around torch's attention, and one device, dense and sparse. The
methods take turns in random order; a time is the median over rounds of the slowest rank's, each round after a call that
is not timed. Tokens are in block order, as `rainfusion.distributed.shard` leaves them.

Beside the time of a call stand two parts of it: its computations alone (what would arrive is copied from memory), and
its transfers alone (the same collectives, one after the other). The share of the transfers that is hidden is
(computations + transfers - call) / transfers.

First, every method's output, log-sum-exp and mask are compared with those of one device; the status is 1 where they
differ by more than rounding, and where anything was not measured.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import rainfusion
import rainfusion.distributed as rd
from rainfusion.core.errors import RainfusionWarning
from rainfusion.distributed import ranks as collectives
from rainfusion.distributed.ranks import Ranks
from rainfusion.testing.environment import environment

DENSE, SPARSE = "one device, dense", "one device, sparse"
DENSE_ULYSSES = "ulysses, dense"
_UNFINISHED = 120  # seconds that a rank waits for another one

Run = Callable[[], Any]
Tensors = tuple[Tensor, Tensor, Tensor]


class Size(NamedTuple):
    """The attention of a model."""

    name: str
    heads: int
    grid: tuple[int, int, int]
    head_dim: int = 128
    block: int = 128
    dtype: str = "bfloat16"

    @property
    def layout(self) -> rainfusion.TokenLayout:
        return rainfusion.TokenLayout(self.grid, block=self.block, sink="first_frame_keys")

    def settings(self, sparsity: float) -> dict[str, Any]:
        """Arguments of `attention`."""
        shared = {"grid": self.grid, "block": self.block, "sink": "first_frame_keys", "order": "given"}
        return {**shared, "sparsity": sparsity}


WAN, HUNYUAN = Size("Wan2.1-14B 720p", 40, (21, 45, 80)), Size("HunyuanVideo size", 24, (33, 45, 80))
TINY = (Size("tiny", 8, (5, 8, 16), 16, 16, "float32"), Size("tiny, bfloat16", 8, (4, 8, 16), 16, 16))


def main() -> None:
    args = _arguments()
    warnings.simplefilter("ignore", RainfusionWarning)
    device = join()
    began, world = time.monotonic(), dist.get_world_size()
    if uneven := [f"{size.name} has {size.heads}" for size in args.sizes if size.heads % world]:
        raise SystemExit(f"heads have to divide by {world} ranks, for dense Ulysses: {', '.join(uneven)}")
    record: dict[str, Any] = {"environment": environment(), "device": _name(device), "world": world, "rows": []}
    say(f"{world} x {record['device']}, {dist.get_backend()}, torch {torch.__version__}")
    for sparsity, size in itertools.product(args.sparsity, args.sizes):
        if any_rank(time.monotonic() - began > args.seconds, device):
            row = {"size": size.name, "sparsity": sparsity, "not_measured": f"{args.seconds} s are over"}
            say(f"not measured, {row['not_measured']}: {size.name}, {sparsity:.0%}")
        else:
            row = measured(size, sparsity, args.rounds, device)
        record["rows"].append(row)
        if args.json and dist.get_rank() == 0:  # after every row, should a later one fail
            args.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    say(f"{time.monotonic() - began:.0f} s")
    dist.destroy_process_group()
    sys.exit(0 if all("not_measured" not in row and not row["differs"] for row in record["rows"]) else 1)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="a few hundred tokens, to try it")
    parser.add_argument("--sparsity", nargs="+", type=float, default=[0.8, 0.9])
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=90, help="begin nothing new after this time")
    parser.add_argument("--json", type=Path, help="write the figures")
    args = parser.parse_args()
    args.sizes = TINY if args.tiny else (WAN, HUNYUAN)
    return args


def join() -> torch.device:
    """Join the process group that torchrun describes; the device of this rank."""
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)  # before NCCL, which takes the current device
        dist.init_process_group("nccl", timeout=timedelta(seconds=_UNFINISHED), device_id=device)
        return device
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=_UNFINISHED))
    return torch.device("cpu")


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def say(text: str) -> None:
    """Print, on the first rank."""
    if dist.get_rank() == 0:
        print(text, flush=True)


def largest(value: float, device: torch.device) -> float:
    """The largest value of all ranks."""
    held = torch.tensor([value], dtype=torch.float64, device=device)
    dist.all_reduce(held, dist.ReduceOp.MAX)
    return held.item()


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether it is so on any rank."""
    return largest(float(flag), device) > 0


# -- the methods -----------------------------------------------------------------------------------------


def whole_tensors(size: Size, device: torch.device) -> Tensors:
    """q, k and v of all tokens, equal on all ranks."""
    generator = torch.Generator(device).manual_seed(0)
    shape = (1, size.heads, size.layout.length, size.head_dim)
    q, k, v = (
        torch.randn(shape, generator=generator, device=device, dtype=getattr(torch, size.dtype)) for _ in range(3)
    )
    return q, k, v


@cache
def groups(device: str) -> dict[str, Any]:
    """The methods that this many ranks can run, each with its group."""
    found: dict[str, Any] = dict.fromkeys(("ulysses", "gather", "ring"))
    world = dist.get_world_size()
    if world >= 4 and world % 2 == 0:
        found["unified"] = init_device_mesh(device, (world // 2, 2), mesh_dim_names=("ring", "ulysses"))
    return found


def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """torch's attention: by cuDNN on GPUs, which is the fastest there."""
    if not q.is_cuda:
        return scaled_dot_product_attention(q, k, v)
    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION], set_priority=True):
        return scaled_dot_product_attention(q, k, v)


def dense_ulysses(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Tensor:
    """torch's attention over all tokens of some heads; every rank has equally many heads."""
    ranks = Ranks.of()
    heads, mine = q.shape[1] // ranks.world, q.shape[2]
    started = [
        ranks.all_to_all(x.split(heads, 1), [(1, heads, length, x.shape[3]) for length in lengths], 2)
        for x in (q, k, v)
    ]
    out = dense(*(wait() for wait in started))
    return ranks.all_to_all(out.split(lengths, 2), [(1, heads, mine, q.shape[3])] * ranks.world, 1)()


# -- one size, at one sparsity ---------------------------------------------------------------------------


def measured(size: Size, sparsity: float, rounds: int, device: torch.device) -> dict[str, Any]:
    """A row of the record."""
    say(f"\n{size.name}: {size.heads} heads of {size.head_dim}, {size.layout.length} tokens, {sparsity:.0%} skipped")
    whole = whole_tensors(size, device)
    shards = tuple(rd.shard(x, rainfusion.TokenLayout(block=size.block)) for x in whole)
    lengths = [int(n) for n in Ranks.of().gather_objects(shards[0].shape[2])]
    settings = {**size.settings(sparsity), "backend": "triton" if device.type == "cuda" else None}
    runs: dict[str, Run] = {
        DENSE: partial(dense, *whole),
        SPARSE: partial(rainfusion.attention, *whole, **settings),
        DENSE_ULYSSES: partial(dense_ulysses, *shards, lengths),
    }
    methods = {
        name: partial(rd.attention, *shards, group=group, method=name, **settings)
        for name, group in groups(device.type).items()
    }
    runs.update(methods)
    differs = differences(runs, methods, lengths, device)
    sent, parts = {}, {}
    for name in (DENSE_ULYSSES, *methods):
        with Transfers.recorded() as transfers:
            runs[name]()
        sent[name] = transfers.sent
        parts[f"{name}: computations"] = partial(transfers.left_out, runs[name])
        parts[f"{name}: transfers"] = transfers.alone
    ms = medians({**runs, **parts}, rounds, device)
    row = {
        "size": size.name,
        "heads": size.heads,
        "head_dim": size.head_dim,
        "tokens": size.layout.length,
        "dtype": size.dtype,
        "sparsity": sparsity,
        "differs": differs,
        "one_device": {name: round(ms[name], 3) for name in (DENSE, SPARSE)},
        "methods": {name: _of_method(name, ms, sent[name]) for name in sent},
    }
    _tell(row)
    return row


def _of_method(name: str, ms: dict[str, float], sent: int) -> dict[str, float]:
    """What is recorded of a method; speed-ups are those over one device that does the same, and over dense Ulysses."""
    call, computing, moving = ms[name], ms[f"{name}: computations"], ms[f"{name}: transfers"]
    alone = ms[DENSE if name == DENSE_ULYSSES else SPARSE]
    return {
        "ms": round(call, 3),
        "computations_ms": round(computing, 3),
        "transfers_ms": round(moving, 3),
        "hidden": round((computing + moving - call) / moving, 3),
        "bytes_sent": sent,
        "over_one_device": round(alone / call, 3),
        "over_dense_ulysses": round(ms[DENSE_ULYSSES] / call, 3),
    }


def _tell(row: dict[str, Any]) -> None:
    for name, ms in row["one_device"].items():
        say(f"  {name:<20} {ms:9.2f} ms")
    for name, it in row["methods"].items():
        say(
            f"  {name:<20} {it['ms']:9.2f} ms, {it['over_one_device']:5.2f}x of one device, "
            f"{it['over_dense_ulysses']:5.2f}x of dense Ulysses; {it['computations_ms']:8.2f} ms of computations, "
            f"{it['transfers_ms']:7.2f} ms of transfers ({it['bytes_sent'] / 1e6:.1f} MB), "
            f"{it['hidden']:.0%} of them hidden"
        )


def medians(runs: dict[str, Run], rounds: int, device: torch.device) -> dict[str, float]:
    """Milliseconds of a call, the slowest rank's; medians over rounds."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds):
        for name in random.Random(turn).sample(list(runs), len(runs)):  # the same order on all ranks
            runs[name]()
            times[name].append(largest(milliseconds(runs[name], device), device))
    return {name: statistics.median(of) for name, of in times.items()}


def milliseconds(run: Run, device: torch.device, calls: int = 2) -> float:
    """Milliseconds of a call of this rank, begun when all ranks are ready."""
    if device.type != "cuda":
        dist.barrier()
        start = time.perf_counter()
        for _ in range(calls):
            run()
        return (time.perf_counter() - start) * 1000 / calls
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    dist.barrier()
    before.record()
    for _ in range(calls):
        run()
    after.record()
    after.synchronize()
    return before.elapsed_time(after) / calls


# -- exactness -------------------------------------------------------------------------------------------


def differences(
    runs: dict[str, Run], methods: dict[str, Run], lengths: list[int], device: torch.device
) -> dict[str, str]:
    """By method, how it differs from one device by more than rounding, on any rank; empty where all is well."""
    rank, found = dist.get_rank(), {}
    mine = slice(sum(lengths[:rank]), sum(lengths[: rank + 1]))
    objections = {DENSE_ULYSSES: _of_outputs(runs[DENSE_ULYSSES](), runs[DENSE]()[:, :, mine])}
    alone, lse, mask = runs[SPARSE](return_lse=True, return_mask=True)
    for name, run in methods.items():
        out_here, lse_here, mask_here = run(return_lse=True, return_mask=True)
        pairs = int((mask_here.blocks != mask.blocks).sum())
        objections[name] = [
            *([f"{pairs} of {mask.blocks.numel()} block pairs of the mask differ"] if pairs else []),
            *_of_outputs(out_here, alone[:, :, mine]),
            *_of_lse(lse_here, lse[:, :, mine]),
        ]
    for name, mine_here in objections.items():
        told = Ranks.of().gather_objects(mine_here)
        text = "; ".join(f"rank {rank}: {', '.join(of)}" for rank, of in enumerate(told) if of)
        if text:
            found[name] = text
            say(f"  DIFFERS FROM ONE DEVICE: {name}: {text}")
    if not found:
        say(f"  equal to one device: {', '.join(objections)}")
    return found


def _of_outputs(found: Tensor, right: Tensor) -> list[str]:
    """Outputs of one dtype may differ by two roundings of the largest of them."""
    limit = 1e-5 if right.dtype == torch.float32 else 2 * torch.finfo(right.dtype).eps * float(right.abs().max())
    error = float((found.float() - right.float()).abs().max())
    return [] if error <= limit else [f"the output differs by up to {error:.2e}, more than {limit:.2e}"]


def _of_lse(found: Tensor, right: Tensor) -> list[str]:
    error = float((found - right).abs().max())
    return [] if error <= 1e-3 else [f"the log-sum-exp differs by up to {error:.2e}, more than 1e-3"]


# -- transfers -------------------------------------------------------------------------------------------


@dataclass
class Transfers:
    """The collectives of a call, so that they can be counted, and started again or left out.

    Attributes:
        starts: each starts one of them, with what it sent, and returns what to wait for.
        arrived: what each of them received.
        bytes: what this rank sent to others.
    """

    starts: list[Callable[[], list[Any]]] = field(default_factory=list)
    arrived: list[list[Tensor]] = field(default_factory=list)
    bytes: int = 0

    @classmethod
    @contextmanager
    def recorded(cls) -> Iterator[Transfers]:
        """Record those of the block."""
        found = cls()
        with _replaced(found._all_to_all, found._all_gather, found._point_to_point):
            yield found

    @property
    def sent(self) -> int:
        """Bytes that the rank that sends most sends to others."""
        return int(max(Ranks.of().gather_objects(self.bytes)))

    def alone(self) -> None:
        """Make the transfers again, one after the other."""
        for start in self.starts:
            for work in start():
                work.wait()

    def left_out(self, run: Run) -> None:
        """The call again, without a transfer: what arrived is copied from the one that was recorded."""
        arrived = iter(self.arrived)

        def collective(received: Tensor, *_: Any, group: Any, async_op: bool) -> Any:
            return _copied([received], next(arrived))[0]

        def point_to_point(operations: list[Any]) -> list[Any]:
            return _copied([op.tensor for op in operations if op.op is dist.irecv], next(arrived))

        with _replaced(collective, collective, point_to_point):
            run()

    def _started(self, start: Callable[[], list[Any]], received: list[Tensor]) -> list[Any]:
        self.starts.append(start)
        self.arrived.append(received)
        return start()

    def _all_to_all(self, received: Tensor, sent: Tensor, *sizes: list[int], group: Any, async_op: bool) -> Any:
        self.bytes += (sent.numel() - sizes[1][dist.get_rank(group)]) * sent.itemsize

        def start() -> list[Any]:
            return [_REAL.all_to_all(received, sent, *sizes, group=group, async_op=True)]

        return self._started(start, [received])[0]

    def _all_gather(self, received: Tensor, sent: Tensor, *, group: Any, async_op: bool) -> Any:
        self.bytes += (dist.get_world_size(group) - 1) * sent.nbytes

        def start() -> list[Any]:
            return [_REAL.all_gather(received, sent, group=group, async_op=True)]

        return self._started(start, [received])[0]

    def _point_to_point(self, operations: list[Any]) -> list[Any]:
        self.bytes += sum(op.tensor.nbytes for op in operations if op.op is dist.isend)
        received = [op.tensor for op in operations if op.op is dist.irecv]
        return self._started(partial(_REAL.point_to_point, [*operations]), received)


class _Over:
    """A transfer that is over."""

    def wait(self) -> None:
        """Nothing to wait for."""


def _copied(tensors: list[Tensor], recorded: list[Tensor]) -> list[Any]:
    for to, held in zip(tensors, recorded, strict=True):
        to.copy_(held)
    return [_Over()]


class _Collectives(NamedTuple):
    all_to_all: Any
    all_gather: Any
    point_to_point: Any


_REAL = _Collectives(dist.all_to_all_single, collectives._all_gather, dist.batch_isend_irecv)


@contextmanager
def _replaced(all_to_all: Any, all_gather: Any, point_to_point: Any) -> Iterator[None]:
    """Other functions in place of the collectives that `rainfusion.distributed.ranks` calls."""
    with (
        mock.patch.object(dist, "all_to_all_single", all_to_all),
        mock.patch.object(collectives, "_all_gather", all_gather),
        mock.patch.object(dist, "batch_isend_irecv", point_to_point),
    ):
        yield


if __name__ == "__main__":
    main()
