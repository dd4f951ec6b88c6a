"""Cases of attention whose tokens are spread over ranks, and how a rank runs its part of one."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import numpy as np

import rainfusion
from tests.distributed.workers import BACKEND, DEVICE

_ON_GPUS = {"float32": "bfloat16", "float64": "float16"}  # whose units multiply matrices of 16 bits


@dataclass(frozen=True)
class NearestForSome(rainfusion.Policy):
    """A policy of one's own: the first heads keep the blocks beside their own, the others more by their scores."""

    def budget(self, q: rainfusion.BlockedAxis, kv: rainfusion.BlockedAxis, heads: int) -> rainfusion.Budget:
        return rainfusion.Budget(np.arange(1, heads + 1)[:, None] * np.ones((1, q.free_blocks), np.int64))

    def prior(self, q: rainfusion.BlockedAxis, kv: rainfusion.BlockedAxis) -> np.ndarray:
        away = np.abs(np.arange(q.blocks)[:, None] - np.arange(kv.blocks))
        return np.stack([-100.0 * away, -100.0 * away, 0 * away, -0.1 * away])


@dataclass(frozen=True)
class Case:
    """One call of the whole sequence.

    Args:
        uneven: shards in the order of the sequence, cut at uneven places; only Ulysses takes them.
        operand: which of mask and quotas is given.
        balanced: as for `shard`.
    """

    method: str = "ulysses"
    batch: int = 1
    heads: int = 4
    kv_heads: int = 2
    grid: tuple[int, int, int] = (3, 4, 5)
    text: int = 7
    block: int | tuple[int, int] = 4
    sparsity: float | tuple[float, ...] | None = 0.5
    policy: rainfusion.Policy | None = None
    sink: str | None = "first_frame_keys"
    omitted: str = "drop"
    kv_lengths: tuple[int, ...] | None = None
    tensor_layout: str = "bhsd"
    dtype: str = "float32"
    uneven: bool = False
    balanced: bool = False
    operand: str | None = None
    head_dim: int = 8
    precision: str | None = None
    rotate: bool = False

    @property
    def computes_in(self) -> str:
        """The dtype of the tensors where this run computes."""
        found = _ON_GPUS.get(self.dtype, self.dtype) if DEVICE == "cuda" else self.dtype
        return "float32" if BACKEND == "triton" and found == "float64" else found

    @property
    def layout(self) -> rainfusion.TokenLayout:
        return rainfusion.TokenLayout(self.grid, self.text, block=self.block, sink=self.sink)

    @property
    def settings(self) -> dict[str, Any]:
        names = ("grid", "text", "block", "sparsity", "policy", "sink", "omitted", "kv_lengths", "tensor_layout")
        names += ("precision", "rotate")
        settings = {name: getattr(self, name) for name in names}
        settings["kv_lengths"] = None if self.kv_lengths is None else np.array(self.kv_lengths)
        if self.operand is not None:
            plan = rainfusion.plan(rainfusion.AttentionProblem(1, self.heads, self.length, self.length, 8), self.layout)
            rng = np.random.default_rng(1)
            settings["sparsity"] = None
            if self.operand == "quotas":
                free = plan.q_axis.free_blocks, plan.kv_axis.free_blocks
                settings["quotas"] = rng.integers(0, free[1] + 1, (self.heads, free[0]))
            else:
                settings["mask"] = self._mask(rng, (plan.q_axis.blocks, plan.kv_axis.blocks))
        return settings

    def _mask(self, rng: np.random.Generator, blocks: tuple[int, int]) -> rainfusion.BlockMask:
        """A mask with empty rows."""
        import torch

        kept = rng.random((self.batch, self.heads, *blocks)) < 0.3
        size = self.layout.block
        return rainfusion.BlockMask(torch.from_numpy(kept).to(DEVICE), self.length, self.length, size, self.layout)

    @property
    def length(self) -> int:
        return int(np.prod(self.grid)) + self.text

    @property
    def token_axis(self) -> int:
        return 2 if self.tensor_layout == "bhsd" else 1

    def tensors(self) -> list[Any]:
        """q, k and v of the whole sequence, where this run computes."""
        import torch

        generator, dtype = torch.Generator().manual_seed(0), getattr(torch, self.computes_in)
        shapes = [
            (self.batch, heads, self.length, self.head_dim) for heads in (self.heads, self.kv_heads, self.kv_heads)
        ]
        tensors = [torch.randn(shape, generator=generator).to(DEVICE, dtype) for shape in shapes]
        return tensors if self.tensor_layout == "bhsd" else [x.transpose(1, 2).contiguous() for x in tensors]


class Result(NamedTuple):
    """What a device, or all ranks together, computed: ``[batch, heads, tokens, ...]``, and the mask's blocks."""

    out: np.ndarray
    lse: np.ndarray
    mask: np.ndarray


def as_result(case: Case, out: Any, lse: Any, mask: rainfusion.BlockMask) -> Result:
    out = out.double().cpu().numpy()
    bhsd = out if case.tensor_layout == "bhsd" else out.swapaxes(1, 2)
    return Result(bhsd, lse.double().cpu().numpy(), mask.blocks.cpu().numpy())


def on_one_device(case: Case) -> Result:
    call = {"return_lse": True, "return_mask": True, "backend": BACKEND}
    return as_result(case, *rainfusion.attention(*case.tensors(), **call, **case.settings))


def on_one_device_in_float64(case: Case, mask: np.ndarray) -> Result:
    """By a given mask, so that both attend to the same blocks."""
    import torch

    settings = {**case.settings, "sparsity": None, "policy": None, "quotas": None, "precision": None, "rotate": False}
    settings["mask"] = rainfusion.BlockMask(
        torch.from_numpy(mask), case.length, case.length, case.layout.block, case.layout
    )
    tensors = [x.double().cpu() for x in case.tensors()]
    return as_result(case, *rainfusion.attention(*tensors, return_lse=True, return_mask=True, **settings))


def on_ranks(group: Any, case: Case) -> Result:
    """This rank's part of a case, and the results of all ranks put together."""
    import torch.distributed as dist

    import rainfusion.distributed as rd

    if case.method == "unified" and isinstance(group, dist.ProcessGroup):
        world = dist.get_world_size(group)
        group = mesh_of((world // 2, 2) if world % 2 == 0 else (1, world))
    axis, world, rank = case.token_axis, *counted(group)
    if case.uneven:
        cuts = [case.length * i * i // world**2 + (i > 0) * (world - i) for i in range(world + 1)]
        shards = [x.narrow(axis, cuts[rank], cuts[rank + 1] - cuts[rank]) for x in case.tensors()]
        layout, order = rainfusion.TokenLayout(block=case.block), "window"
    else:
        shards = [rd.shard(x, case.layout, group=group, axis=axis, balanced=case.balanced) for x in case.tensors()]
        layout, order = case.layout, "given"
    spread: dict[str, Any] = {"group": group, "balanced": case.balanced}
    call = {**spread, "method": case.method, "order": order, "return_lse": True, "return_mask": True}
    call["backend"] = BACKEND
    out, lse, mask = rd.attention(*shards, **call, **case.settings)
    assert (out.shape, out.dtype) == (shards[0].shape, shards[0].dtype)
    whole = rd.unshard(out, layout, axis=axis, **spread), rd.unshard(lse, layout, **spread)
    return as_result(case, *whole, mask)


def on_a_mesh(_: Any, case: Case, shape: tuple[int, int]) -> Result | None:
    """As `on_ranks`, on a mesh of ring and Ulysses of the first processes; None on others. All processes call it."""
    mesh = mesh_of(shape)
    return None if mesh.get_coordinate() is None else on_ranks(mesh, case)


@cache
def mesh_of(shape: tuple[int, int]) -> Any:
    """A mesh of ring and Ulysses of the first processes."""
    from torch.distributed.device_mesh import DeviceMesh

    return DeviceMesh(DEVICE, np.arange(np.prod(shape)).reshape(shape).tolist(), mesh_dim_names=("ring", "ulysses"))


def counted(group: Any) -> tuple[int, int]:
    """How many ranks there are, and which this one is."""
    from rainfusion.distributed.ranks import Ranks

    ranks = Ranks.of(group)
    return ranks.world, ranks.rank
