"""Every call that the backend can make, through the wheel's own Meta kernels: fake tensors on ``npu``.

A fake tensor has no data: whatever would read some back, or make a shape of it, fails here. Lengths of padded samples
are read back by design, so they are numbers here.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch_npu
from torch._subclasses.fake_tensor import FakeTensorMode

from rainfusion.backends.torch_npu import detection, lowering, operators
from rainfusion.backends.torch_npu.backend import TorchNpuBackend
from rainfusion.backends.torch_npu.chips import CHIPS
from rainfusion.core.backend import Device
from rainfusion.core.lowering import lower
from rainfusion.core.mask import BlockMask
from rainfusion.testing.cases import builtin_cases

NPU = Device("npu", 0)
A2, A3, ASCEND_950 = CHIPS
CASES = [case for case in builtin_cases() if case.problem.dtype == "float16" and case.precision is None]


class OnFakeTensors(TorchNpuBackend):
    """The backend, which takes tensors without data here."""

    def check_inputs(self, *tensors):
        pass


def results(case, chip, monkeypatch, dtype="float16", returns=("%out", "%lse", "%mask")):
    """Lower and call a case on fake tensors; nothing of it is known here but shapes and dtypes."""
    case = replace(case, problem=replace(case.problem, dtype=dtype))
    monkeypatch.setattr(detection, "chip", lambda: chip)
    monkeypatch.setattr(lowering, "on_host", lambda lengths: (case.problem.kv_len,) * case.problem.batch)
    planned = case.plan(returns=returns)
    p = planned.problem
    with FakeTensorMode(allow_non_fake_inputs=True):  # constants have data
        q, k, v = (
            torch.empty(shape, dtype=getattr(torch, dtype), device="npu:0")
            for shape in (p.q_shape, p.kv_shape, p.kv_shape)
        )
        given = {}
        if planned.takes("%mask"):
            grid = (p.batch, p.heads, planned.q_axis.blocks, planned.kv_axis.blocks)
            mask = BlockMask(torch.ones(grid, dtype=torch.bool, device="npu:0"), p.q_len, p.kv_len, planned.block)
            given["mask"] = mask
        for name in ("quotas", "kv_lengths"):
            if planned.takes(f"%{name}"):
                given[name] = torch.empty(planned.types[f"%{name}"].shape, dtype=torch.int32, device="npu:0")
        returned = lower(planned, OnFakeTensors(), NPU)(q, k, v, **given)
    return planned, dict(zip(returns, returned if len(returns) > 1 else (returned,), strict=True))


@pytest.mark.parametrize("chip", CHIPS, ids=lambda chip: chip.name)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_case(case, chip, monkeypatch):
    planned, got = results(case, chip, monkeypatch)
    out, lse, p = got["%out"], got["%lse"], planned.problem
    assert (out.shape, out.dtype, str(out.device)) == (p.q_shape, torch.float16, "npu:0")
    assert (lse.shape, lse.dtype, str(lse.device)) == ((p.batch, p.heads, p.q_len), torch.float32, "npu:0")
    assert str(got["%mask"].blocks.device) == "npu:0"


@pytest.mark.parametrize("name", ["video", "all_together", "summary", "given_mask", "blocks_of_32", "dense"])
@pytest.mark.parametrize("chip", [A2, A3], ids=lambda chip: chip.name)
def test_bfloat16(name, chip, monkeypatch):
    (case,) = (c for c in CASES if c.name == f"{name}-f16")
    _, got = results(case, chip, monkeypatch, "bfloat16")
    assert got["%out"].dtype == torch.bfloat16


def test_bfloat16_on_950_is_refused_by_the_meta_kernel_though_eager_mode_passes_it_on(monkeypatch):
    """So torch.compile and fake tensors do not work there in bfloat16; docs/ascend.md says so."""
    (case,) = (c for c in CASES if c.name == "video-f16")
    with pytest.raises(RuntimeError, match="inner_precise must be 0, got 4"):
        results(case, ASCEND_950, monkeypatch, "bfloat16")


def block_sparse(**changes):
    with FakeTensorMode():
        q = torch.empty((1, 4, 512, 128), dtype=changes.pop("dtype", torch.bfloat16), device="npu:0")
        k = torch.empty((1, 2, 512, 128), dtype=q.dtype, device="npu:0")
        given = {
            "query": q,
            "key": k,
            "value": k,
            "block_sparse_mask": torch.empty((1, 4, 4, 4), dtype=torch.int8, device="npu:0"),
            "block_shape": [128, 128],
            "inner_precise": 0,
        }
        return torch.ops.npu.npu_block_sparse_attention.default(**{**given, **changes})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"block_shape": [128, 64]}, "must be a multiple of 128"),
        ({"inner_precise": 1}, "inner_precise must be 0"),
        ({"scale": 0.1}, "Unknown keyword argument 'scale'"),
        ({"block_sparse_mask": None}, "block_sparse_mask"),
    ],
    ids=str,
)
def test_what_the_meta_kernel_refuses(changes, said):
    """That the checks above can fail at all."""
    block_sparse()
    with pytest.raises(RuntimeError, match=said):
        block_sparse(**changes)


def test_the_wheel_has_the_operators_that_are_its():
    names = [operator.operator for operator in operators.OPERATORS]
    assert [name for name in names if name.startswith("npu::")] == [names[0], names[-1]]
    assert torch_npu.npu_block_sparse_attention is torch.ops.npu.npu_block_sparse_attention
    assert torch_npu.npu_fusion_attention is torch.ops.npu.npu_fusion_attention
