"""How sparse attention, FP8 linear layers and First Block Cache add up in a step of Wan 2.1 on a CUDA device.

    python benchmarks/cuda_compose.py --json out.json
    python benchmarks/cuda_compose.py --table out.json
    python benchmarks/cuda_compose.py --model tiny --device cpu --compiler aot_eager

Every variant is compiled, and compared with the same model in bfloat16 and with dense attention, compiled, in the same
process. In every round each variant runs once, in random order, without the cache; then with it, where one step is
forced to miss and one to hit. Figures are medians over rounds. Weights are random: the relative error of the output
against dense bfloat16 says how far the arithmetic is off, never what a video looks like. A hit repeats the output of
the miss before it, as its input is the same.

The record holds what was measured. `--table` writes it as Markdown, together with what is computed from it: the mean
step for a share of hits, and whole runs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import statistics
import warnings
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from cuda_models import DENSE_SHARE, MODELS, RUN_STEPS, SPARSE, dense_attention, random_model, timed, wan
from diffusers.hooks import FirstBlockCacheConfig, HookRegistry
from diffusers.hooks.first_block_cache import _FBC_LEADER_BLOCK_HOOK
from float8_linear import Float8Layers

from rainfusion.core.errors import RainfusionWarning
from rainfusion.integrations.diffusers import RainFusionConfig, apply_rainfusion
from rainfusion.testing.environment import environment

WANS = {name: size for name, size in MODELS.items() if name.startswith("wan")} | {"tiny": wan(2, 256, 3, (17, 32, 32))}
HITS = 0.5  # a share of steps that one assumes; what a run really has depends on its threshold and its video
# The cache computes where a difference, which is 0 for an input that did not change, is above its threshold.
ALWAYS_MISS, ALWAYS_HIT = -1.0, float("inf")
Row = dict[str, Any]
"""A variant and what was measured of it; times in seconds."""


def main() -> None:
    args = _arguments()
    if args.table:
        print(table(json.loads(args.table.read_text(encoding="utf-8")), args.hits))
        return
    warnings.simplefilter("ignore", RainfusionWarning)
    diffusers.utils.logging.set_verbosity_error()
    random.seed(0)
    torch.manual_seed(0)
    record: dict[str, Any] = {}
    for record in recorded(args):  # after every round, so that a run cut short leaves what it has measured
        if args.json:
            args.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(table(record, args.hits))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="wan-14b-720p", choices=[*WANS])
    parser.add_argument("--layers", type=int, help="fewer layers than the model has; at least 2")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--dense", help="attention backend of diffusers to compare with; default: cuDNN, CPU: native")
    parser.add_argument("--settings", type=json.loads, default={}, help="more arguments of RainFusionConfig, as JSON")
    parser.add_argument("--compiler", default="inductor", help="backend of torch.compile")
    parser.add_argument("--hits", type=float, default=HITS, help="share of steps that hit the cache, for the table")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--table", type=Path, metavar="RECORD", help="measure nothing: write a record as Markdown")
    args = parser.parse_args()
    if not 0 <= args.hits <= 1:
        parser.error(f"--hits {args.hits} is no share; give a number from 0 to 1")
    if args.rounds < 1:
        parser.error(f"--rounds {args.rounds} measures nothing; give at least 1")
    if args.layers is not None and args.layers < 2:
        parser.error(f"--layers {args.layers} leaves a cache nothing to skip; give at least 2")
    # The fastest that `cuda_models.py` found for these models on an H200.
    args.dense = args.dense or ("_native_cudnn" if args.device == "cuda" else "native")
    return args


# -- measuring -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Variant:
    """How attention and linear layers of a model compute; sparsity 0 is the dense attention of diffusers."""

    sparsity: float
    float8: bool

    @property
    def attention(self) -> str:
        return f"{self.sparsity:.0%} sparse" if self.sparsity else "dense"

    @property
    def linear(self) -> str:
        return "FP8" if self.float8 else "bfloat16"


VARIANTS = [Variant(sparsity, float8) for sparsity in (0.0, *SPARSE) for float8 in (False, True)]


def recorded(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """After every round: where and what was measured, and a row for every variant."""
    where = torch.cuda.get_device_name() if args.device == "cuda" else args.device
    model, arguments = random_model(WANS[args.model], args.layers, args.device)
    frames, height, width = arguments["hidden_states"].shape[2:]
    about = {
        "where": where,
        "diffusers": diffusers.__version__,
        "environment": environment(),
        "model": args.model,
        "layers": len(model.blocks),
        "tokens": frames * (height // 2) * (width // 2),
        "dense": args.dense.lstrip("_"),
        "settings": args.settings,
    }
    print(f"{where}, torch {torch.__version__}, {args.model}, {about['layers']} layers, {about['tokens']} tokens")
    for rounds, rows in enumerate(Bench(model, arguments, args).rows(), 1):
        yield about | {"rounds": rounds, "rows": rows}


class Bench:
    """One model in all its variants.

    Args:
        model: a Wan transformer in bfloat16; its blocks are compiled and stay so.
        arguments: of a forward.
        args: `device`, `dense`, `settings`, `compiler` and `rounds` of the command line.
    """

    def __init__(self, model: Any, arguments: dict[str, Any], args: argparse.Namespace) -> None:
        self.model, self.arguments, self.args = model, arguments, args
        self.float8 = Float8Layers(model.blocks)
        self.output = torch.empty(0)
        # What `compile_repeated_blocks` would compile includes the cache's hooks, in which torch finds no whole graph.
        for block in model.blocks:
            block.forward = torch.compile(block.forward, fullgraph=True, backend=args.compiler)

    def rows(self) -> Iterator[list[Row]]:
        """After every round: what was measured of every variant so far, in the order of `VARIANTS`."""
        errors = self._warmed_up()
        times: dict[Variant, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        for _ in range(self.args.rounds):
            for variant in random.sample(VARIANTS, len(VARIANTS)):
                with self._set_to(variant):
                    times[variant]["step"].append(self._seconds())
            with self._cache() as leader:
                for variant in random.sample(VARIANTS, len(VARIANTS)):
                    with self._set_to(variant):
                        for name, threshold in (("miss", ALWAYS_MISS), ("hit", ALWAYS_HIT)):
                            leader.threshold = threshold
                            times[variant][name].append(self._seconds())
            yield [
                {"attention": variant.attention, "linear": variant.linear}
                | {name: round(statistics.median(taken), 5) for name, taken in times[variant].items()}
                | {"relative_error": errors[variant]}
                for variant in VARIANTS
            ]

    def _warmed_up(self) -> dict[Variant, float]:
        """Compile every variant; the relative errors of their outputs against the first one's."""
        outputs: dict[Variant, torch.Tensor] = {}
        for variant in VARIANTS:
            with self._set_to(variant):
                took = self._seconds()
            outputs[variant] = self.output.float()
            if not outputs[variant].isfinite().all():
                raise SystemExit(f"{variant.attention}, {variant.linear}: an output is not finite; nothing is measured")
            print(f"  {variant.attention}, {variant.linear}: the first step took {took:.1f} s", flush=True)
        dense = outputs[VARIANTS[0]]
        return {variant: float((output - dense).norm() / dense.norm()) for variant, output in outputs.items()}

    @contextlib.contextmanager
    def _set_to(self, variant: Variant) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            if variant.float8:
                stack.enter_context(self.float8.used())
            if variant.sparsity:
                config = RainFusionConfig(sparsity=variant.sparsity, **self.args.settings)
                stack.enter_context(apply_rainfusion(self.model, config))
            else:
                stack.enter_context(dense_attention(self.model, self.args.dense))
            yield

    @contextlib.contextmanager
    def _cache(self) -> Iterator[Any]:
        """First Block Cache for a while, with a first step behind it; the hook whose threshold decides."""
        self.model.enable_cache(FirstBlockCacheConfig(threshold=ALWAYS_MISS))
        try:
            with self._set_to(VARIANTS[-1]):  # the shortest; without it the first miss would have nothing to compare
                self._step()
            yield HookRegistry.check_if_exists_or_initialize(self.model.blocks[0]).get_hook(_FBC_LEADER_BLOCK_HOOK)
        finally:
            self.model.disable_cache()

    def _seconds(self) -> float:
        return timed(self._step, self.args.device)

    def _step(self) -> None:
        with torch.no_grad(), self.model.cache_context("cond"):
            self.output = self.model(**self.arguments)[0]


# -- the tables of a record ----------------------------------------------------------------------------


def table(record: dict[str, Any], hits: float) -> str:
    """A record as Markdown: steps, then whole runs. What is computed is said to be.

    Args:
        hits: share of a run's sparse steps that hit the cache, from 0 to 1.
    """
    rows = record["rows"]
    dense = {row["linear"]: row["step"] for row in rows if row["attention"] == "dense"}
    base = dense["bfloat16"]
    steps = [
        f"| attention | linear layers | a step | times as fast | relative error | a miss | a hit | mean at {hits:.0%} "
        "hits (computed) | times as fast (computed) |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    runs = [
        f"| attention | linear layers | {' | '.join(f'{n} steps' for n in RUN_STEPS)} | times as fast | "
        f"{' | '.join(f'{n} steps, cache' for n in RUN_STEPS)} | times as fast |",
        f"|---|---|{'---|' * 2 * (len(RUN_STEPS) + 1)}",
    ]
    for row in rows:
        name = f"| {row['attention']} | {row['linear']} |"
        mean = (1 - hits) * row["miss"] + hits * row["hit"]
        error = f"{row['relative_error']:.2g}" if row["relative_error"] else "0"
        steps.append(
            f"{name} {_time(row['step'])} | {base / row['step']:.2f}x | {error} | {_time(row['miss'])} | "
            f"{_time(row['hit'])} | {_time(mean)} | {base / mean:.2f}x |"
        )
        # Dense steps of a run have the row's linear layers, and no hits: they come first, where steps differ most.
        cells = []
        for step in (row["step"], mean):
            average = DENSE_SHARE * dense[row["linear"]] + (1 - DENSE_SHARE) * step
            cells += [*(_time(n * average) for n in RUN_STEPS), f"{base / average:.2f}x"]
        runs.append(f"{name} {' | '.join(cells)} |")
    shares = f"{DENSE_SHARE:.0%} of the steps dense, one forward a step; with the cache, {hits:.0%} hits among the rest"
    return "\n".join([*steps, "", f"Whole runs, computed: {shares}.", "", *runs])


def _time(seconds: float) -> str:
    """Three digits."""
    if seconds < 1:
        return f"{seconds * 1e3:.3g} ms"
    return f"{seconds:.0f} s" if seconds >= 100 else f"{seconds:#.3g} s"


if __name__ == "__main__":
    main()
