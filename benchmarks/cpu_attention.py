"""Sparse against dense attention on a CPU: one table, every variant interleaved in one process.

    python benchmarks/cpu_attention.py --json record.json

Prints the median milliseconds of each variant and its ratio to the best dense attention of the same dtype
in the same run. The mask is the one that the plan selects: whole windows, the first frame kept dense.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import statistics
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import torch
from openvino import opset13 as op

import rainfusion
from rainfusion.backends.openvino.runtime import core, parallel_streams
from rainfusion.backends.openvino.tensors import BFLOAT16, ELEMENTS, tensor_on
from rainfusion.core.backend import Device
from rainfusion.core.layout import TokenLayout
from rainfusion.core.mask import BlockMask
from rainfusion.core.planner import plan
from rainfusion.core.policies import Fixed, TopK
from rainfusion.core.problem import AttentionProblem

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Variants = dict[str, Callable[[], Any]]

DENSE = ("torch SDPA, dense", "OpenVINO SDPA, dense", "OpenVINO matmuls, dense")
CHAIN, ATTEND, WHOLE = "openvino: mask chain", "openvino: attend", "openvino: all"


def main() -> None:
    arguments = _arguments()
    record: dict[str, Any] = {"machine": _machine(), "grid": arguments.grid, "heads": arguments.heads}
    record |= {"ratios": [], "runs": []}
    for dtype in arguments.dtypes:
        shape = (1, arguments.heads, int(np.prod(arguments.grid)), arguments.head_dim)
        torch.manual_seed(0)
        tensors = tuple(torch.randn(shape).to(getattr(torch, dtype)) for _ in range(3))
        for sparsity in arguments.sparsity:
            run = measure(tensors, tuple(arguments.grid), sparsity, arguments.rounds, arguments.flex)
            record["runs"].append({"dtype": dtype, "shape": shape, **run})
            record["ratios"].append(_ratio(dtype, shape, run))
            show(dtype, shape, run)
    if arguments.json:
        arguments.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def measure(tensors: Tensors, grid: tuple[int, int, int], sparsity: float, rounds: int, flex: bool) -> dict[str, Any]:
    """Median milliseconds of every variant, `rounds` times in random order, and the errors of the sparse ones."""
    variants = {**dense_variants(*tensors), **sparse_variants(tensors, TokenLayout(grid), sparsity, flex)}
    errors = _errors(variants)
    times: dict[str, list[float]] = {name: [] for name in variants}
    order = random.Random(0)
    for _ in range(rounds):
        # What ran before leaves its data in the caches and its threads awake.
        for name, run in order.sample(list(variants.items()), len(variants)):
            start = time.perf_counter()
            run()
            times[name].append((time.perf_counter() - start) * 1e3)
    medians = {name: statistics.median(taken) for name, taken in times.items()}
    planned = plan(AttentionProblem.from_tensors(*tensors), TokenLayout(grid), TopK(sparsity))
    # What else runs here slows the variants unequally: more threads than free cores hurt those that wait for all.
    load = os.getloadavg()[0]
    return {"sparsity": planned.sparsity, "load": load, "median_ms": medians, "all_ms": times, "relative_l2": errors}


def show(dtype: str, shape: tuple[int, ...], run: dict[str, Any]) -> None:
    """Print one table."""
    medians = run["median_ms"]
    best = min(medians[name] for name in DENSE)
    ideal = 1 / (1 - run["sparsity"])
    print(f"\n{dtype} {shape}, sparsity {run['sparsity']:.3f}; ideal {ideal:.2f}x; load {run['load']:.1f}")
    print(f"  {'variant':<28} {'ms':>8} {'x best dense':>13} {'relative L2':>12}")
    for name, median in medians.items():
        ratio = "" if name == CHAIN else f"{best / median:.2f}"
        error = f"{run['relative_l2'][name]:.1e}" if name in run["relative_l2"] else ""
        print(f"  {name:<28} {median:8.1f} {ratio:>13} {error:>12}")
    print(f"  mask chain / attend: {medians[CHAIN] / medians[ATTEND]:.1%}", flush=True)


def _ratio(dtype: str, shape: tuple[int, ...], run: dict[str, Any]) -> dict[str, Any]:
    """The whole call against the best dense attention, as the hardware matrix reads it."""
    medians = run["median_ms"]
    best = min(DENSE, key=lambda name: medians[name])
    return {
        "problem": f"{shape[1]} heads of {shape[3]}, {shape[2]} tokens, {run['sparsity']:.0%} skipped",
        "dtype": dtype,
        "baseline": best,
        "ratio": round(medians[best] / medians[WHOLE], 3),
    }


# -- dense -----------------------------------------------------------------------------------------


def dense_variants(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Variants:
    """The baselines: everybody's own dense attention."""
    runs = (
        partial(torch.nn.functional.scaled_dot_product_attention, q, k, v),
        _openvino_dense((q, k, v), lambda q, k, v, scale: op.scaled_dot_product_attention(q, k, v)),
        _openvino_dense((q, k, v), _matmuls),
    )
    return dict(zip(DENSE, runs, strict=True))


def _matmuls(q: ov.Node, k: ov.Node, v: ov.Node, scale: ov.Node) -> ov.Node:
    logits = op.multiply(op.matmul(q, k, False, True), scale)
    return op.matmul(op.softmax(logits, -1), v, False, False)


def _openvino_dense(tensors: Tensors, attention: Callable[..., ov.Node]) -> Callable[[], None]:
    arrays = [_as_numpy(x) for x in tensors]
    element = ELEMENTS[arrays[0].dtype]
    inputs = [op.parameter(list(x.shape), element) for x in arrays]
    scale = op.constant(np.array(arrays[0].shape[-1] ** -0.5, np.float32))
    wide = [op.convert(x, ov.Type.f32) for x in inputs]
    model = ov.Model([op.convert(attention(*wide, scale), element)], inputs, "dense")
    precision = ov.Type.f32 if element == ov.Type.f16 else element
    settings = {"INFERENCE_PRECISION_HINT": precision, "NUM_STREAMS": 1, "INFERENCE_NUM_THREADS": _cores()}
    request = core().compile_model(model, "CPU", settings).create_infer_request()
    for at, array in enumerate(arrays):
        request.set_input_tensor(at, tensor_on(array))
    request.rainfusion_inputs = arrays  # a tensor does not keep the array below it alive
    return request.infer


def _as_numpy(x: torch.Tensor) -> np.ndarray:
    return x.view(torch.uint16).numpy().view(BFLOAT16) if x.dtype == torch.bfloat16 else x.numpy()


# -- sparse ----------------------------------------------------------------------------------------


def sparse_variants(tensors: Tensors, layout: TokenLayout, sparsity: float, flex: bool) -> Variants:
    """rainfusion's two CPU backends under the mask that the plan selects, and flex_attention under the same."""
    problem = AttentionProblem.from_tensors(*tensors)
    whole = plan(problem, layout, TopK(sparsity))
    lowered = rainfusion.lower(whole, device="cpu", backend="openvino", strict=True)
    _, mask = rainfusion.lower(
        plan(problem, layout, TopK(sparsity), returns=("%out", "%mask")), device="cpu", backend="openvino"
    )(*tensors)
    given = plan(problem, layout, Fixed())
    chain = lowered.steps[0]
    arguments = [{**lowered.constants, **_natives(lowered, tensors)}[name] for name in chain.segment.inputs]
    attends = {name: rainfusion.lower(given, device="cpu", backend=name) for name in ("torch", "openvino")}
    variants: Variants = {"torch backend: attend": partial(attends["torch"], *tensors, mask=mask)}
    if flex:
        variants["torch flex_attention"] = _flex(tensors, layout, mask)
    variants[CHAIN] = lambda: chain.run(*arguments) and None
    variants[ATTEND] = partial(attends["openvino"], *tensors, mask=mask)
    variants[WHOLE] = partial(lowered, *tensors)
    return variants


def _natives(lowered: Any, tensors: Tensors) -> dict[str, np.ndarray]:
    return {name: lowered.backend.to_native(x) for name, x in zip(("%q", "%k", "%v"), tensors, strict=True)}


def _flex(tensors: Tensors, layout: TokenLayout, mask: BlockMask) -> Callable[[], torch.Tensor]:
    """torch's own block-sparse attention, on tensors put into block order beforehand and not put back."""
    from torch.nn.attention import flex_attention as flex

    ordered = [x[:, :, torch.from_numpy(layout.order.copy())].contiguous() for x in tensors]
    counts, indices = mask.to_kv_indices(width=mask.blocks.shape[-1])
    blocks = flex.BlockMask.from_kv_blocks(
        torch.zeros_like(counts), torch.zeros_like(indices), counts, indices, BLOCK_SIZE=mask.block
    )
    compiled = torch.compile(flex.flex_attention)
    return lambda: compiled(*ordered, block_mask=blocks)


def _errors(variants: Variants) -> dict[str, float]:
    """Relative L2 distance of each sparse output from that of the torch backend; this also warms everything up."""
    outputs = {name: run() for name, run in variants.items()}
    reference = outputs["torch backend: attend"].float()
    return {name: float((outputs[name].float() - reference).norm() / reference.norm()) for name in (ATTEND, WHOLE)}


# -- the machine -----------------------------------------------------------------------------------


def _machine() -> dict[str, Any]:
    flags = _cpu_info("flags").split()
    return {
        "cpu": _cpu_info("model name") or platform.processor(),
        # What a hypervisor leaves of a name: AMD's family 25 is Zen 4 (or 3), 26 is Zen 5.
        "family": _cpu_info("cpu family"),
        "cores": _cores(),
        "instructions": [flag for flag in ("avx512f", "avx512_bf16", "amx_bf16") if flag in flags],
        "versions": {name: version(name) for name in ("rainfusion", "openvino", "torch", "numpy")},
    }


def _cpu_info(key: str) -> str:
    """The first value of a line of /proc/cpuinfo, where there is one."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), "")


def _cores() -> int:
    return parallel_streams(Device("cpu"))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grid", type=int, nargs=3, default=[32, 16, 16], metavar=("T", "H", "W"))
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.8, 0.9])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=7)
    compiler = shutil.which(os.environ.get("CXX", "g++")) is not None
    flex = {"action": argparse.BooleanOptionalAction, "default": compiler}
    parser.add_argument("--flex", **flex, help="also torch.compile(flex_attention); where there is a C++ compiler")
    parser.add_argument("--json", type=Path, help="write every measurement to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", _cores())))
    return arguments


if __name__ == "__main__":
    main()
