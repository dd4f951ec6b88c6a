"""Trains the small video model on scenes drawn as it goes: rectified flow, growing grids, Muon and AdamW.

    torchrun --nproc-per-node 2 benchmarks/quality/train.py --out assets/tiny_video.safetensors

On two H200s about nine minutes. What was run, and how well the model draws, goes beside the weights as JSON.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch.distributed as dist
from diffusers import WanTransformer3DModel
from safetensors.torch import save_file
from torch import Tensor

from quality import model as video
from quality import scenes
from quality.metrics import psnr

Grid = tuple[int, int, int]


@dataclass(frozen=True)
class Stage:
    """Some steps on grids of one size, taken in turn; `batches` of each on every device."""

    grids: tuple[Grid, ...]
    batches: tuple[int, ...]
    steps: int
    shift: float


STAGES = (
    Stage(((21, 8, 8),), (96,), 3000, 2.0),
    Stage(((21, 16, 16),), (24,), 1800, 3.0),
    Stage(((21, 24, 24), (33, 24, 24)), (12, 8), 560, 3.0),
)
LEARNING_RATE, WEIGHT_DECAY = 2e-3, 0.01
WARM_UP, COOL_DOWN = 200, 0.35
EMA = 0.998
NO_TEXT, NO_FRAME = 0.1, 0.25


def main() -> None:
    args = _arguments()
    rank, ranks, device = _join(args.device)
    torch.manual_seed(args.seed)
    stages = [replace(stage, steps=steps) for stage, steps in zip(STAGES, args.steps, strict=True)]
    training = Training(device, rank, ranks, args, sum(stage.steps for stage in stages))
    for stage in stages:
        training.run(stage)
        if rank == 0:
            _save(args.out, training.averaged)
    if rank == 0:
        averaged = training.averaged
        quality = {str(grid): drawn_well(averaged, grid, device) for grid in stages[-1].grids}
        _write(args, training.log, quality, ranks)
    if ranks > 1:
        dist.destroy_process_group()


class Training:
    """The model, its average, its optimisers, and how far it is."""

    def __init__(self, device: torch.device, rank: int, ranks: int, args: argparse.Namespace, steps: int) -> None:
        self.device, self.rank, self.ranks, self.steps = device, rank, ranks, steps
        self.model = video.new_model().to(device)
        self.averaged = copy.deepcopy(self.model).requires_grad_(False)
        if args.compile:
            self.model.compile_repeated_blocks(dynamic=False)
        self.generator = torch.Generator(device).manual_seed(args.seed * 1000 + rank)
        self.optimisers = _optimisers(self.model)
        self.done = 0
        self.log: list[dict[str, Any]] = []

    def run(self, stage: Stage) -> None:
        started, seen = time.perf_counter(), torch.zeros((), device=self.device)
        for step in range(stage.steps):
            which = step % len(stage.grids)
            error = self._loss(stage.grids[which], stage.batches[which], stage.shift)
            error.backward()
            self._share_gradients()
            self._step()
            seen += error.detach()
            if (step + 1) % 100 == 0 or step + 1 == stage.steps:
                loss = float(seen) / (step % 100 + 1)  # waits for the device
                row = {
                    "grid": stage.grids[which],
                    "step": step + 1,
                    "seconds": round(time.perf_counter() - started, 1),
                    "loss": round(loss, 5),
                }
                self.log.append(row)
                seen.zero_()
                if self.rank == 0 and ((step + 1) % 500 == 0 or step + 1 == stage.steps):
                    print(row, flush=True)

    def _loss(self, grid: Grid, batch: int, shift: float) -> Tensor:
        asked = drawn_task(grid, batch, self.generator)
        sigma = torch.sigmoid(torch.randn(batch, device=self.device, generator=self.generator))
        sigma = shift * sigma / (1 + (shift - 1) * sigma)
        noise = torch.randn(asked.video.shape, device=self.device, generator=self.generator)
        mix = sigma[:, None, None, None, None]
        noisy = (1 - mix) * asked.video + mix * noise
        with torch.autocast(self.device.type, torch.bfloat16):
            flow = self.model(torch.cat([noisy, asked.given], 1), 1000 * sigma, asked.text, return_dict=False)[0]
        return (flow.float() - (noise - asked.video)).square().mean()

    def _share_gradients(self) -> None:
        """The mean of all devices' gradients, in one message."""
        if self.ranks == 1:
            return
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        flat = torch.cat([g.flatten() for g in gradients])
        dist.all_reduce(flat, op=dist.ReduceOp.AVG)
        for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))

    def _step(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        rate = _rate(self.done, self.steps)
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = LEARNING_RATE * rate
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        self.done += 1
        decay = min(EMA, (1 + self.done) / (10 + self.done))
        with torch.no_grad():
            torch._foreach_lerp_([*self.averaged.parameters()], [*self.model.parameters()], 1 - decay)


def drawn_task(grid: Grid, batch: int, generator: torch.Generator) -> video.Task:
    """A batch to train on: some without a text, some without a given frame."""
    device = generator.device
    drawn = scenes.draw(batch, generator)
    frame = torch.randint(grid[0], (batch,), device=device, generator=generator)
    chance = torch.rand(2, batch, device=device, generator=generator)
    frame = torch.where(chance[0] < NO_FRAME, -1, frame)
    asked = video.task(drawn, grid, frame)
    return asked._replace(text=asked.text * (chance[1] >= NO_TEXT)[:, None, None])


def _optimisers(model: WanTransformer3DModel) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices, AdamW for the rest."""
    matrices = [p for p in model.blocks.parameters() if p.ndim == 2]
    chosen = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    return [Muon(matrices), torch.optim.AdamW(rest, lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.0, fused=True)]


class Muon(torch.optim.Optimizer):
    """Muon as `torch.optim.Muon` has it, matrices of one shape at once: a small model's would wait for launches."""

    def __init__(self, matrices: list[torch.nn.Parameter], momentum: float = 0.95) -> None:
        super().__init__(matrices, {"lr": LEARNING_RATE, "momentum": momentum})
        self._by_shape: dict[torch.Size, list[torch.nn.Parameter]] = {}
        for matrix in matrices:
            self._by_shape.setdefault(matrix.shape, []).append(matrix)
        self._moments = {
            shape: torch.zeros(len(alike), *shape, device=alike[0].device) for shape, alike in self._by_shape.items()
        }

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        group = self.param_groups[0]
        for shape, alike in self._by_shape.items():
            gradient, moment = torch.stack([p.grad for p in alike]), self._moments[shape]
            moment.lerp_(gradient, 1 - group["momentum"])
            update = _orthogonal(gradient.lerp(moment, group["momentum"])) * (0.2 * max(shape) ** 0.5)
            torch._foreach_mul_(alike, 1 - group["lr"] * WEIGHT_DECAY)
            torch._foreach_add_(alike, [*update.to(alike[0].dtype)], alpha=-group["lr"])


def _orthogonal(x: Tensor) -> Tensor:
    """Matrices ``[n, rows, columns]`` with all singular values near 1, by five steps of Newton and Schulz."""
    is_tall = x.shape[-2] > x.shape[-1]
    x = (x.mT if is_tall else x).bfloat16()
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        square = x @ x.mT
        x = 3.4445 * x + (-4.775 * square + 2.0315 * square @ square) @ x
    return x.mT if is_tall else x


def _rate(step: int, steps: int) -> float:
    """Of the learning rate: warm-up, constant, and down to nothing by a cosine."""
    left = (steps - step) / (COOL_DOWN * steps)
    return min((step + 1) / WARM_UP, 1.0) * (1.0 if left >= 1 else 0.5 - 0.5 * math.cos(math.pi * left))


def drawn_well(model: WanTransformer3DModel, grid: Grid, device: torch.device, batch: int = 8) -> dict[str, float]:
    """Mean PSNR of videos against the truth, in dB: with a given first, middle or last frame, and without one."""
    found = {}
    for name, frame in {"first": 0, "middle": grid[0] // 2, "none": -1}.items():
        generator = torch.Generator(device).manual_seed(77)
        asked = video.task(scenes.draw(batch, generator), grid, torch.full((batch,), frame, device=device))
        noise = torch.randn(asked.video.shape, device=device, generator=generator)
        with torch.autocast(device.type, torch.bfloat16):
            outputs = video.denoise(model, asked, noise)
        found[name] = round(fmean(psnr(outputs, asked.video)), 2)
    return found


def _save(path: Path, model: WanTransformer3DModel) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: value.to(torch.bfloat16).contiguous() for name, value in model.state_dict().items()}, path)


def _write(args: argparse.Namespace, log: list[dict[str, Any]], quality: Any, ranks: int) -> None:
    record = {
        "sha256": video.digest(args.out),
        "seed": args.seed,
        "devices": ranks,
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "stages": [asdict(stage) for stage in STAGES],
        "steps": args.steps,
        "psnr": quality,
        "log": log,
    }
    args.out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(quality)


def _join(device: str) -> tuple[int, int, torch.device]:
    """This process's rank, the number of ranks and its device."""
    ranks, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if ranks > 1:
        dist.init_process_group("nccl" if device == "cuda" else "gloo")
    return rank, ranks, torch.device(device, torch.cuda.current_device()) if device == "cuda" else torch.device(device)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=video.ASSET)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--steps", type=int, nargs=3, default=[stage.steps for stage in STAGES])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    return parser.parse_args()


if __name__ == "__main__":
    main()
