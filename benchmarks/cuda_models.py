"""A denoising step of real diffusers models on a CUDA device, dense against sparse, eager and compiled.

    python benchmarks/cuda_models.py
    python benchmarks/cuda_models.py --models wan-14b-720p qwen-image-1328 --rounds 2 --json out.json

Models have their published sizes and random weights: only time is measured here, never quality. Sparse steps go through
`apply_rainfusion`, dense ones through diffusers' own attention backends, of which the fastest is the baseline. In every
round each variant runs once, in random order: a card at its power limit runs as fast as the heat before it allows.
Figures are medians over rounds.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import torch

from rainfusion.core.errors import RainfusionWarning
from rainfusion.integrations.diffusers import RainFusionConfig, apply_rainfusion
from rainfusion.testing.environment import environment

DENSE = ("_native_cudnn", "_native_flash")  # diffusers' names
SPARSE = (0.8, 0.9)
RUN_STEPS, DENSE_SHARE = (40, 50), 0.2


def main() -> None:
    args = _arguments()
    warnings.simplefilter("ignore", RainfusionWarning)
    torch.manual_seed(0)
    where = torch.cuda.get_device_name() if args.device == "cuda" else args.device
    print(f"{where}, torch {torch.__version__}, diffusers {diffusers.__version__}, random weights")
    record: dict[str, Any] = {"where": where, "diffusers": diffusers.__version__, "environment": environment()}
    for name in args.models:
        record[name] = measured(name, args)
        if args.json:
            args.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", default=[*MODELS], choices=[*MODELS])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, help="fewer layers than the model has")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--modes", nargs="+", default=["eager", "compiled"], choices=["eager", "compiled"])
    parser.add_argument("--dense", nargs="+", default=[*DENSE], help="diffusers' attention backends to compare with")
    parser.add_argument("--settings", type=json.loads, default={}, help="more arguments of RainFusionConfig, as JSON")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


# -- models of published sizes -------------------------------------------------------------------------


def wan(heads: int, ffn: int, layers: int, latents: tuple[int, ...]) -> Callable[..., Any]:
    def make(few: int | None) -> tuple[torch.nn.Module, Callable[[], dict[str, Any]]]:
        model = diffusers.WanTransformer3DModel(num_attention_heads=heads, ffn_dim=ffn, num_layers=few or layers)
        return model, lambda: {
            "hidden_states": torch.randn(1, 16, *latents),
            "timestep": torch.tensor([500.0]),
            "encoder_hidden_states": torch.randn(1, 512, 4096),
        }

    return make


def hunyuan_video_15(latents: tuple[int, ...]) -> Callable[..., Any]:
    def make(few: int | None) -> tuple[torch.nn.Module, Callable[[], dict[str, Any]]]:
        model = diffusers.HunyuanVideo15Transformer3DModel(num_layers=few or 54)
        return model, lambda: {
            "hidden_states": torch.randn(1, 65, *latents),
            "timestep": torch.tensor([500.0]),
            "encoder_hidden_states": torch.randn(1, 1000, 3584),
            "encoder_attention_mask": torch.arange(1000)[None] < 200,
            "encoder_hidden_states_2": torch.randn(1, 256, 1472),
            "encoder_attention_mask_2": torch.arange(256)[None] < 1,
            "image_embeds": torch.zeros(1, 729, 1152),
        }

    return make


def qwen_image(side: int) -> Callable[..., Any]:
    def make(few: int | None) -> tuple[torch.nn.Module, Callable[[], dict[str, Any]]]:
        model = diffusers.QwenImageTransformer2DModel(num_layers=few or 60)
        return model, lambda: {
            "hidden_states": torch.randn(1, side * side, 64),
            "timestep": torch.tensor([0.5]),
            "encoder_hidden_states": torch.randn(1, 256, 3584),
            "encoder_hidden_states_mask": None,
            "img_shapes": [[(1, side, side)]],
        }

    return make


MODELS: dict[str, Callable[..., Any]] = {
    "wan-14b-720p": wan(40, 13824, 40, (21, 90, 160)),
    "wan-1.3b-480p": wan(12, 8960, 30, (21, 60, 104)),
    "hunyuan-video-1.5-720p": hunyuan_video_15((31, 45, 80)),
    "qwen-image-1328": qwen_image(83),
}


# -- measuring -----------------------------------------------------------------------------------------


def measured(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Seconds a step of every variant, and ratios against the fastest dense one of the same mode."""
    model, arguments = random_model(MODELS[name], args.layers, args.device)
    found = {}
    print(f"\n{name}, {sum(p.numel() for p in model.parameters()) / 1e9:.1f} B parameters")
    for mode in args.modes:
        if mode == "compiled":
            model.compile_repeated_blocks(fullgraph=True)
        found[mode] = _table(_seconds(_variants(name, model, args), model, arguments, args), mode, args)
    del model
    torch._dynamo.reset()
    if args.device == "cuda":
        torch.cuda.empty_cache()
    return found


def random_model(size: Callable[..., Any], layers: int | None, device: str) -> tuple[Any, dict[str, Any]]:
    """A bfloat16 model of a size of `MODELS`, of all its layers or fewer, and arguments of a forward; all random."""
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model, make = size(layers)
        arguments = make()
    torch.set_default_dtype(torch.float32)
    return model.eval().requires_grad_(False), arguments


def _variants(name: str, model: torch.nn.Module, args: argparse.Namespace) -> dict[str, Callable[[], Any]]:
    dense = args.dense if args.device == "cuda" else ("native",)
    variants = {f"dense, {backend.lstrip('_')}": lambda b=backend: dense_attention(model, b) for backend in dense}
    if "hunyuan-video-1.5" in name:  # whose own processors write out a mask of all pairs of tokens, unlike ours
        variants["dense, a mask of keys"] = lambda: apply_rainfusion(model, sparsity=0.0)
    for share in SPARSE:
        config = RainFusionConfig(sparsity=share, **args.settings)
        variants[f"{share:.0%} sparse"] = lambda config=config: apply_rainfusion(model, config)
    return variants


@contextlib.contextmanager
def dense_attention(model: Any, backend: str) -> Iterator[None]:
    """One of diffusers' own attention backends, by its name, for a while."""
    model.set_attention_backend(backend)
    try:
        yield
    finally:
        model.reset_attention_backend()


def _seconds(
    variants: dict[str, Callable[[], Any]], model: torch.nn.Module, arguments: Any, args: argparse.Namespace
) -> dict[str, float]:
    times: dict[str, list[float]] = {}
    for turn in range(args.rounds + 1):
        for name in random.sample(list(variants), len(variants)):
            try:
                with variants[name](), torch.no_grad():
                    took = timed(lambda: model(**arguments), args.device)
            except (RuntimeError, ValueError) as error:  # a dense backend that this model or machine has not
                if not name.startswith("dense"):
                    raise
                if turn == 0:
                    print(f"  {name}: {str(error).partition(chr(10))[0][:100]}")
                continue
            if turn:  # the first is the warm-up
                times.setdefault(name, []).append(took)
    return {name: statistics.median(taken) for name, taken in times.items()}


def timed(run: Callable[[], Any], device: str) -> float:
    """Seconds that a call takes, on a CUDA device by events of its stream."""
    if device == "cpu":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begun.record()
    run()
    ended.record()
    torch.cuda.synchronize()
    return float(begun.elapsed_time(ended)) / 1e3


def _table(seconds: dict[str, float], mode: str, args: argparse.Namespace) -> dict[str, Any]:
    """Print and return seconds a step, ratios, and what whole runs then take, computed."""
    best = min(took for name, took in seconds.items() if name.startswith("dense"))
    rows = {}
    for name, took in seconds.items():
        runs = {steps: steps * (DENSE_SHARE * best + (1 - DENSE_SHARE) * took) for steps in RUN_STEPS}
        rows[name] = {"seconds": round(took, 4), "ratio": round(best / took, 3)}
        computed = ", ".join(f"{steps} steps {total:.1f} s" for steps, total in runs.items())
        print(f"  {mode:<9} {name:<24} {took:8.3f} s   {best / took:5.2f}   computed, 20 % of steps dense: {computed}")
    return rows


if __name__ == "__main__":
    main()
