"""How far sparse attention takes a trained video model from what it makes with dense attention: one record a run.

    python benchmarks/quality/measure.py --json quality.json
    python benchmarks/quality/measure.py --groups sinks --grid 33x24x24 --json sinks-33.json
    python benchmarks/quality/measure.py --groups quick --grid 21x16x16 --device cpu --scenes 2 --steps 12 --json q.json

Every run starts from the same noise, scenes and dense kernel. Half of the scenes have their first frame given, half
their middle one. `page.py` makes the tables and pictures of docs/quality.md from the records.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
from diffusers.models.transformers import transformer_wan
from torch import Tensor

from quality import applied, metrics, pictures, scenes
from quality import model as video
from quality.groups import GROUPS, Run
from quality.rules import Sizes
from rainfusion.core.errors import RainfusionWarning
from rainfusion.demo.metrics import block_mass
from rainfusion.testing.environment import environment

SEED = 2026
_FRAMES_KEPT = 5


def main() -> None:
    args = _arguments()
    warnings.simplefilter("ignore", RainfusionWarning)
    bench = Bench(args)
    record = {"environment": environment(), "weights": video.digest(args.weights), **bench.facts(), "runs": []}
    kept = {"truth": _frames(bench.asked.video), "dense": _frames(bench.dense)}
    for group in args.groups:
        for run in GROUPS[group](bench.grid):
            started = time.perf_counter()
            row, outputs = bench.measured(run)
            row |= {"group": group, "seconds": round(time.perf_counter() - started, 2)}
            record["runs"].append(row)
            _say(row)
            if run.picture:
                kept[f"{run.rule.name} {run.share} {run.note}".strip()] = _frames(outputs)
            if args.json:
                args.json.parent.mkdir(parents=True, exist_ok=True)
                args.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    if args.frames:
        np.savez_compressed(args.frames, **kept)
    if args.picture:
        pictures.frames(kept, args.picture)


class Bench:
    """The model, what it is asked for, and what it makes with dense attention."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.device, self.steps = torch.device(args.device), args.steps
        self.grid: Sizes = tuple(int(n) for n in args.grid.split("x"))  # type: ignore[assignment]
        self.model = video.trained_model(args.weights).to(self.device, getattr(torch, args.dtype))
        self.asked, self.noise = drawn(args.scenes, self.grid, SEED, self.device)
        self.tuning = drawn(max(args.scenes // 4, 1), self.grid, SEED + 1, self.device)
        started = time.perf_counter()
        self.dense = video.denoise(self.model, self.asked, self.noise, steps=self.steps)
        self.dense_seconds = time.perf_counter() - started

    def facts(self) -> dict[str, Any]:
        truth = metrics.psnr(self.dense, self.asked.video)
        half = len(truth) // 2
        found = {
            "grid": self.grid,
            "scenes": len(truth),
            "steps": self.steps,
            "dense_seconds": round(self.dense_seconds, 2),
            "psnr_against_truth": {"first frame given": np.mean(truth[:half]), "middle": np.mean(truth[half:])},
        }
        print(json.dumps(found), flush=True)
        return found

    def measured(self, run: Run) -> tuple[dict[str, Any], Tensor]:
        """The record of a run, and its videos."""
        if run.config is not None:
            outputs, found = applied.denoised(self, run)
        else:
            watch = Watch(self.grid, self.steps)
            with self._attention(run, watch) as before:
                outputs = video.denoise(self.model, self.asked, self.noise, steps=self.steps, before=before)
            found = watch.found()
        row = {"rule": run.rule.name, "asked": run.share, "dense_steps": run.dense_steps, "note": run.note}
        return row | found | metrics.compared(outputs, self.dense), outputs

    @contextlib.contextmanager
    def _attention(self, run: Run, watch: Watch) -> Iterator[Any]:
        """The model's self-attention by a rule; gives the function that is to be told every step."""
        host, first, last = transformer_wan.dispatch_attention_fn, *run.dense_steps

        def attention(q: Tensor, k: Tensor, v: Tensor, **call: Any) -> Tensor:
            is_dense = watch.step < first or watch.step >= self.steps - last
            if q.shape[1] != k.shape[1] or is_dense:
                return host(q, k, v, **call)
            out, mask = run.rule.attention(q, k, v, self.grid, run.share)
            watch.note(q, k, mask)
            return out

        transformer_wan.dispatch_attention_fn = attention
        try:
            yield watch.begin
        finally:
            transformer_wan.dispatch_attention_fn = host


class Watch:
    """Looks at masks in a few steps: their density, and the share of the attention's mass that they keep."""

    def __init__(self, grid: Sizes, steps: int) -> None:
        self.step = 0
        self._looks_at = {steps // 10, steps // 2, steps - 1 - steps // 10}
        self._densities: list[float] = []
        self._recalls: list[np.ndarray] = []

    def begin(self, step: int) -> None:
        """A step begins."""
        self.step = step

    def note(self, q: Tensor, k: Tensor, mask: Any) -> None:
        """A sparse call; q and k are ``[B, S, H, D]``."""
        if self.step not in self._looks_at:
            return
        self._densities.append(mask.density)
        picked = [0, q.shape[0] - 1]
        q, k = (x[picked].transpose(1, 2).float() for x in (q, k))
        mass = block_mass(q, k, mask.layout, q.shape[-1] ** -0.5)
        kept = (mass * mask.blocks[picked].cpu().numpy()).sum(-1)
        self._recalls.append(kept.mean(-1).ravel())

    def found(self) -> dict[str, float]:
        """Mean density; mean and 5th percentile of the recall over heads, layers, steps and samples."""
        recalls = np.concatenate(self._recalls)
        return {
            "density": float(np.mean(self._densities)),
            "recall": float(recalls.mean()),
            "recall_5th": float(np.percentile(recalls, 5)),
        }


def drawn(count: int, grid: Sizes, seed: int, device: torch.device) -> tuple[video.Task, Tensor]:
    """Scenes of a seed, the first half with their first frame given and the others with their middle one, and noise."""
    generator = torch.Generator().manual_seed(seed)
    frame = torch.where(torch.arange(count) < count / 2, 0, grid[0] // 2)
    asked = video.task(scenes.draw(count, generator), grid, frame)
    noise = torch.randn(asked.video.shape, generator=generator)
    return video.Task(*(x.to(device) for x in asked)), noise.to(device)


def _frames(outputs: Tensor) -> np.ndarray:
    """Some frames of the first and the last video, uint8 ``[2, frames, H, W, 3]``."""
    times = torch.linspace(0, outputs.shape[2] - 1, _FRAMES_KEPT).round().long().to(outputs.device)
    picked = outputs[[0, -1]].float().clamp(-1, 1).index_select(2, times)
    return ((picked + 1) * 127.5).permute(0, 2, 3, 4, 1).byte().cpu().numpy()


def _say(row: dict[str, Any]) -> None:
    means = {name: np.mean(row[name]) for name in ("relative_l1", "psnr", "ssim")}
    said = " ".join(f"{name} {value:.4f}" for name, value in means.items())
    print(
        f"{row['group']:>10} {row['rule']:>28} {row['asked']:.2f} {row['note']:<18} density {row['density']:.4f} "
        f"recall {row.get('recall', np.nan):.3f} {said} {row['seconds']:.1f} s",
        flush=True,
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--groups", nargs="+", default=[name for name in GROUPS if name != "quick"], choices=[*GROUPS])
    parser.add_argument("--grid", default="21x24x24", help="frames x height x width, in tokens")
    parser.add_argument("--scenes", type=int, default=32)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--weights", type=Path, default=video.ASSET)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--frames", type=Path, help="where to save some frames, as .npz")
    parser.add_argument("--picture", type=Path, help="where to draw them side by side, as .png")
    return parser.parse_args()


if __name__ == "__main__":
    main()
