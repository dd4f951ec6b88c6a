"""Block-sparse attention on a CUDA device: every stage of the Triton backend beside what else there is.

    python benchmarks/cuda_attention.py
    python benchmarks/cuda_attention.py --parts attend lengths --json out.json

`attend`   the attention kernels alone, under random masks that keep equally many blocks in every row, in TFLOP/s on
           the kept blocks; beside flash-attn-4's block-sparse kernel (if it can be imported), compiled flex_attention
           under the same mask, and torch's dense kernels.
`stages`   one video: mask chain, order and output order; the whole call against cuDNN's dense attention.
`lengths`  the whole call against torch's dense attention, from short sequences on: where skipping begins to pay.

Medians of `triton.testing.do_bench`, the kernels of a table in random order, each warmed up for as long as it is
measured: a card at its power limit runs a kernel as fast as the heat of the one before it allows.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from triton.testing import do_bench

import rainfusion
from rainfusion.backends.triton import hardware
from rainfusion.backends.triton.attend_blocks import attend_blocks
from rainfusion.backends.triton.lowering import Lowered
from rainfusion.backends.triton.operands import Attention
from rainfusion.backends.triton.select_blocks import Extras, list_blocks
from rainfusion.backends.triton.tuning import AttendConfig, attend_configs
from rainfusion.core.axis import BlockedAxis
from rainfusion.core.errors import RainfusionWarning
from rainfusion.core.executable import Values
from rainfusion.integrations.flex_attention import to_flex

BLOCK = 128
WARM = 200  # milliseconds
ATTEND = ((12, 32768, 0.8), (12, 32768, 0.9), (40, 75776, 0.8), (40, 75776, 0.9))
VIDEOS = ((12, (21, 30, 52)), (40, (21, 45, 80)))
LENGTHS = ((12, (4, 16, 16)), (12, (8, 16, 16)), (12, (16, 16, 16)), (12, (16, 16, 32)), (12, (16, 32, 32)))
FLASH_4, FLEX = "flash-attn-4, block-sparse", "torch flex_attention, compiled"
CUDNN, FLASH, DENSE = "cuDNN, dense", "torch's flash, dense", "torch's choice, dense"
OTHERS = (FLASH_4, FLEX, CUDNN, FLASH)
Kernels = dict[str, Callable[[], Any]]


def main() -> None:
    args = _arguments()
    warnings.simplefilter("ignore", RainfusionWarning)
    torch.manual_seed(0)
    name = torch.cuda.get_device_name()
    print(f"{name}, torch {torch.__version__}, triton {triton.__version__}, {args.dtype}, D={args.head_dim}")
    record: dict[str, Any] = {"where": name, "ratios": []}
    for part in args.parts:
        record[part] = {"attend": attend, "stages": stages, "lengths": lengths}[part](args, record["ratios"])
    if args.json:
        args.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--parts", nargs="+", default=["attend", "stages", "lengths"])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the figures, and ratios as the hardware matrix reads them")
    return parser.parse_args()


def medians(kernels: Kernels, rounds: int) -> dict[str, float]:
    """Median milliseconds of each kernel; other people's that cannot run are named and left out."""
    able = {}
    for name, run in kernels.items():
        try:
            run()
            torch.cuda.synchronize()
            able[name] = run
        except Exception as error:  # they fail in every way there is
            if name not in OTHERS:
                raise
            print(f"  {name}: {type(error).__name__}: {str(error).partition(chr(10))[0][:100]}")
    times: dict[str, list[float]] = {name: [] for name in able}
    for turn in range(rounds):
        for name in random.Random(turn).sample(list(able), len(able)):
            times[name].append(do_bench(able[name], warmup=WARM, rep=WARM, return_mode="median"))
    return {name: statistics.median(t) for name, t in times.items()}


def tensors(heads: int, tokens: int, args: argparse.Namespace) -> tuple[Tensor, Tensor, Tensor]:
    shape = (1, heads, tokens, args.head_dim)
    q, k, v = (torch.randn(shape, device="cuda", dtype=getattr(torch, args.dtype)) for _ in range(3))
    return q, k, v


def dense(q: Tensor, k: Tensor, v: Tensor, kernel: SDPBackend) -> Callable[[], Tensor]:
    def run() -> Tensor:
        with sdpa_kernel(kernel):
            return scaled_dot_product_attention(q, k, v)

    return run


# -- the attention kernels alone -------------------------------------------------------------------------


def attend(args: argparse.Namespace, ratios: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """TFLOP/s on the kept blocks."""
    table = []
    for heads, length, sparsity in ATTEND:
        q, k, v = tensors(heads, length, args)
        mask = random_mask(heads, length, sparsity)
        flops = 4 * q.numel() * length
        times = medians(attend_kernels(q, k, v, mask), args.rounds)
        rates = {name: flops * (1 if "dense" in name else mask.density) / ms / 1e9 for name, ms in times.items()}
        baseline = _baseline(rates, FLASH_4)
        print(f"\nattend: {heads} heads, {length} tokens, {sparsity:.0%} skipped")
        for name, rate in rates.items():
            ratio = rate / rates[baseline]
            print(f"  {name:<32} {times[name]:8.3f} ms {rate:6.0f} TFLOP/s on kept blocks  {ratio:5.2f} of {baseline}")
        table.append({"heads": heads, "tokens": length, "sparsity": sparsity, "ms": times, "tflops": rates})
        problem = f"{heads} heads of {args.head_dim}, {length} tokens, {sparsity:.0%} skipped, attention per kept block"
        ratio = round(rates[OURS] / rates[baseline], 3)
        ratios.append({"problem": problem, "dtype": args.dtype, "baseline": baseline, "ratio": ratio})
    return table


def _baseline(measured: dict[str, float], *first: str) -> str:
    """What ratios are to: the first of these that could run."""
    return next(name for name in (*first, CUDNN, DENSE) if name in measured)


OURS, PLAIN = "rainfusion", "rainfusion, plain kernel"
PRECISIONS = {"int8": "rainfusion, int8", "fp8": "rainfusion, fp8"}


def attend_kernels(q: Tensor, k: Tensor, v: Tensor, mask: rainfusion.BlockMask) -> Kernels:
    problem = rainfusion.AttentionProblem.from_tensors(q, k, v)
    kernels: Kernels = {OURS: _attending(problem, q, k, v, mask)}
    for precision, name in PRECISIONS.items() if _has_8_bits(q) else ():
        kernels[name] = _attending(problem, q, k, v, mask, precision)
    kernels[PLAIN] = _plain(problem, q, k, v, mask)
    flash_4 = _flash_4(q, k, v, mask)
    if flash_4 is not None:
        kernels[FLASH_4] = flash_4
    kernels[FLEX] = _flex(q, k, v, mask)
    kernels[CUDNN] = dense(q, k, v, SDPBackend.CUDNN_ATTENTION)
    kernels[FLASH] = dense(q, k, v, SDPBackend.FLASH_ATTENTION)
    kernels[DENSE] = lambda: scaled_dot_product_attention(q, k, v)
    return kernels


def _attending(
    problem: rainfusion.AttentionProblem,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: rainfusion.BlockMask,
    precision: str | None = None,
) -> Callable[[], Any]:
    """Attention alone, over tokens that are folded and lists that are made."""
    plan = rainfusion.plan(problem, policy=rainfusion.Fixed(), precision=precision)
    lowered = _lowered(rainfusion.lower(plan, device="cuda:0", backend="triton"))
    values = {"%q": q, "%k": k, "%v": v, "%mask": mask.blocks}
    blocks = lowered.fold(values)
    lists = lowered.list(values, blocks)
    assert lists is not None
    return lambda: lowered.attend(values, blocks, lists)


def _plain(
    problem: rainfusion.AttentionProblem, q: Tensor, k: Tensor, v: Tensor, mask: rainfusion.BlockMask
) -> Callable[[], Any]:
    axis = BlockedAxis(k.shape[2], BLOCK, False, k.shape[2])
    lists, out = list_blocks(mask.blocks, None, axis, Extras()), torch.empty_like(q)
    config, precision = _settings(q)
    tiles = torch.arange(lists.counts.numel(), dtype=torch.int32, device="cuda")
    given = Attention(q, k, v, q.shape[2], k.shape[2], (BLOCK, BLOCK), lists, tiles, problem.scale)
    return lambda: attend_blocks(given, out, None, config, precision)


def _has_8_bits(q: Tensor) -> bool:
    return hardware.architecture(q.device) == "sm_90" and q.shape[3] in (64, 128)


def _settings(q: Tensor) -> tuple[AttendConfig, str]:
    """Those of the plain kernel, and how it multiplies."""
    return attend_configs(q.itemsize, q.shape[3], hardware.architecture(q.device))[0], hardware.precision(q.device)


def _lowered(executable: rainfusion.Executable) -> Lowered:
    """The stages of a plan that the Triton backend took as a whole."""
    (step,) = executable.steps
    assert isinstance(step.run, Lowered)
    return step.run


def random_mask(heads: int, length: int, sparsity: float) -> rainfusion.BlockMask:
    """Equally many key blocks in every row, at random."""
    blocks = length // BLOCK
    keep = round(blocks * (1 - sparsity))
    kept = torch.stack([torch.rand(blocks, blocks, device="cuda").topk(keep, -1)[1] for _ in range(heads)])
    grid = torch.zeros(1, heads, blocks, blocks, dtype=torch.bool, device="cuda").scatter_(-1, kept[None], True)
    return rainfusion.BlockMask.from_bool(grid, length, length, (BLOCK, BLOCK))


def _flash_4(q: Tensor, k: Tensor, v: Tensor, mask: rainfusion.BlockMask) -> Callable[[], Any] | None:
    try:
        from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch
        from flash_attn.cute.interface import _flash_attn_fwd
    except ImportError as error:
        print(f"  {FLASH_4}: not importable ({error})")
        return None
    counts, indices = mask.to_kv_indices()
    full = BlockSparseTensorsTorch(
        torch.zeros_like(counts), torch.zeros_like(indices), counts, indices.contiguous(), block_size=(BLOCK, BLOCK)
    )
    bshd = [x.transpose(1, 2).contiguous() for x in (q, k, v)]
    return lambda: _flash_attn_fwd(*bshd, block_sparse_tensors=full)


def _flex(q: Tensor, k: Tensor, v: Tensor, mask: rainfusion.BlockMask) -> Callable[[], Any]:
    from torch.nn.attention.flex_attention import flex_attention

    compiled, block_mask = torch.compile(flex_attention), to_flex(mask)
    return lambda: compiled(q, k, v, block_mask=block_mask)


# -- the stages of one video -----------------------------------------------------------------------------


def stages(args: argparse.Namespace, ratios: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Milliseconds of the stages, and of the whole call."""
    table = []
    for heads, grid in VIDEOS:
        q, k, v = tensors(heads, grid[0] * grid[1] * grid[2], args)
        times = medians(_stage_kernels(q, k, v, grid), args.rounds)
        baseline = _baseline(times)
        print(f"\nstages: {heads} heads, grid {grid}, {q.shape[2]} tokens, first frame dense, 80 % skipped unless said")
        for name, ms in times.items():
            print(f"  {name:<32} {ms:8.3f} ms  {times[baseline] / ms:6.2f}x of {baseline}")
        restore = times["attend, to the caller's tokens"] - times["attend, order given"]
        print(f"  mask chain, order and restoring: {times['mask chain and order'] + max(restore, 0):.3f} ms")
        table.append({"heads": heads, "grid": grid, "ms": times})
        for name in (name for name in times if name.startswith("whole call")):
            problem = f"{heads} heads of {args.head_dim}, {q.shape[2]} tokens, {name}"
            ratio = round(times[baseline] / times[name], 3)
            ratios.append({"problem": problem, "dtype": args.dtype, "baseline": baseline, "ratio": ratio})
    return table


def _stage_kernels(q: Tensor, k: Tensor, v: Tensor, grid: tuple[int, int, int]) -> Kernels:
    problem = rainfusion.AttentionProblem.from_tensors(q, k, v)
    layout, policy = rainfusion.TokenLayout(grid), rainfusion.TopK(0.8)
    plans = [rainfusion.plan(problem, layout, policy, order=order) for order in ("window", "given")]
    executables = [rainfusion.lower(plan, device="cuda:0", backend="triton") for plan in plans]
    window, given = (_lowered(executable) for executable in executables)
    values = Values(executables[0].constants)
    values.update({"%q": q, "%k": k, "%v": v})
    blocks, blocks_given = window.fold(values), given.fold(values)
    lists, lists_given = window.list(values, blocks), given.list(values, blocks_given)
    assert lists is not None
    assert lists_given is not None

    def call(sparsity: float, omitted: str = "drop", precision: str | None = None) -> Callable[[], Any]:
        return lambda: rainfusion.attention(
            q, k, v, grid=grid, sparsity=sparsity, omitted=omitted, precision=precision, backend="triton"
        )

    in_8_bits: Kernels = {}
    if _has_8_bits(q):
        plan = rainfusion.plan(problem, layout, policy, precision="int8")
        rounded = _lowered(rainfusion.lower(plan, device="cuda:0", backend="triton"))
        in_8_bits["mask chain and order, int8"] = lambda: rounded.list(values, rounded.fold(values))
        for precision in PRECISIONS:
            in_8_bits[f"whole call, 80 % skipped, {precision}"] = call(0.8, precision=precision)
            in_8_bits[f"whole call, 90 % skipped, {precision}"] = call(0.9, precision=precision)
        in_8_bits["whole call, 80 %, summaries, int8"] = call(0.8, "summary", "int8")
    return {
        **in_8_bits,
        "mask chain and order": lambda: window.list(values, window.fold(values)),
        "mask chain, order given": lambda: given.list(values, given.fold(values)),
        "attend, to the caller's tokens": lambda: window.attend(values, blocks, lists),
        "attend, order given": lambda: given.attend(values, blocks_given, lists_given),
        "whole call, 80 % skipped": call(0.8),
        "whole call, 80 %, summaries": call(0.8, "summary"),
        "whole call, 90 % skipped": call(0.9),
        CUDNN: dense(q, k, v, SDPBackend.CUDNN_ATTENTION),
        DENSE: lambda: scaled_dot_product_attention(q, k, v),
    }


# -- where skipping begins to pay ------------------------------------------------------------------------


def lengths(args: argparse.Namespace, ratios: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The whole call against torch's own choice of a dense kernel."""
    print(f"\nlengths: 80 % skipped, no sink\n{'heads':>7} {'tokens':>7} {'dense':>9} {'80 %':>9} {'ratio':>6}   (ms)")
    table = []
    for heads, grid in LENGTHS:
        tokens = grid[0] * grid[1] * grid[2]
        q, k, v = tensors(heads, tokens, args)

        def call(q: Tensor = q, k: Tensor = k, v: Tensor = v, grid: Any = grid) -> Any:
            return rainfusion.attention(q, k, v, grid=grid, sparsity=0.8, sink=None, backend="triton")

        def whole(q: Tensor = q, k: Tensor = k, v: Tensor = v) -> Any:
            return scaled_dot_product_attention(q, k, v)

        times = medians({DENSE: whole, "80 %": call}, args.rounds)
        whole_ms, sparse_ms = times[DENSE], times["80 %"]
        print(f"{heads:>7} {tokens:>7} {whole_ms:>9.3f} {sparse_ms:>9.3f} {whole_ms / sparse_ms:>6.2f}")
        table.append({"heads": heads, "tokens": tokens, "ms": times})
        problem = f"{heads} heads of {args.head_dim}, {tokens} tokens, whole call, 80 % skipped"
        ratio = round(whole_ms / sparse_ms, 3)
        ratios.append({"problem": problem, "dtype": args.dtype, "baseline": DENSE, "ratio": ratio})
    return table


if __name__ == "__main__":
    main()
