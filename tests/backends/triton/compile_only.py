"""Compile what the Triton backend would launch, for a device that is not here: ``python compile_only.py cuda 90``.

The launchers run on CPU tensors; a driver that only names the target stands in for the device, and kernels are
compiled down to machine code instead of launched. Prints a line for each: its name, and its shared memory in bytes.
"""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

import rainfusion
from rainfusion import AttentionProblem, TokenLayout, TopK, TopP
from rainfusion.backends.triton import hardware
from rainfusion.core.backend import Device
from rainfusion.core.lowering import lower
from rainfusion.plugins.manager import host

_launch = JITFunction.run


class Target:
    """A driver that knows one thing: what to compile for."""

    def __init__(self, target: GPUTarget) -> None:
        self._target = target

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def main(backend: str, architecture: str) -> None:
    is_cuda = backend == "cuda"
    driver.set_active(Target(GPUTarget(backend, int(architecture) if is_cuda else architecture, 32 if is_cuda else 64)))
    name = f"sm_{architecture}" if is_cuda else architecture
    hardware.architecture = lambda device: name  # type: ignore[assignment]
    hardware.precision = lambda device: "tf32x3" if is_cuda else "ieee"
    JITFunction.run = compile_instead  # type: ignore[method-assign]
    torch.cuda.get_device_properties = lambda device: SimpleNamespace(multi_processor_count=132, L2_cache_size=2**25)
    attend("bfloat16", 128, length=640, policy=TopK(0.5))
    attend("float32", 128, length=700, policy=TopP(0.5), omitted="summary", grid=(5, 10, 14))
    if name == "sm_90":
        attend("float16", 64, length=640, policy=TopK(0.5))
        attend("bfloat16", 80, length=640, policy=TopK(0.5))
        attend("bfloat16", 128, length=700, policy=TopP(0.5), omitted="summary", grid=(5, 10, 14))
        attend("bfloat16", 128, length=700, policy=TopK(0.4), returns=("%out", "%lse"), grid=(5, 10, 14))
        both = ("%out", "%lse")
        attend("bfloat16", 128, length=640, policy=TopK(0.5), precision="int8")
        attend(
            "float16", 128, length=700, policy=TopK(0.4), returns=both, omitted="summary", precision="fp8", rotate=True
        )
        attend("float32", 64, length=640, policy=TopP(0.5), kv_lengths=True, omitted="summary", precision="int8")
    lengths: dict[str, Any] = {"quotas": True, "kv_lengths": True, "omitted": "summary"}
    attend("bfloat16", 128, length=640, policy=TopK(0.5), **lengths)
    attend("bfloat16", 64, length=640, policy=TopK(0.0), kv_lengths=True, returns=("%out", "%lse"))


def attend(dtype: str, dim: int, *, length: int, policy: Any, grid: Any = None, **settings: Any) -> None:
    problem = AttentionProblem(1, 2, length, length, dim, dtype)
    plan = rainfusion.plan(problem, TokenLayout(grid, sink=None), policy, **settings)
    q = torch.randn(1, 2, length, dim).to(getattr(torch, dtype))
    values = {"%q": q, "%k": q.clone(), "%v": q.clone(), "%kv_lengths": torch.ones(1, dtype=torch.int32)}
    values["%quotas"] = torch.ones(2, plan.q_axis.free_blocks, dtype=torch.int32)
    lowered = lower(plan, host().backend("triton"), Device("cpu"), strict=True)
    for step in lowered.steps:
        values.update(step.run({name: values.get(name) for name in step.segment.inputs}))


def compile_instead(self: JITFunction[Any], *args: Any, grid: Any, warmup: bool, **settings: Any) -> Any:
    kernel = _launch(self, *args, grid=grid, warmup=True, **settings)
    print(f"{self.fn.__module__.rpartition('.')[2]}.{self.fn.__name__} shared={kernel.metadata.shared}", flush=True)
    return kernel


if __name__ == "__main__":
    main(*sys.argv[1:])
