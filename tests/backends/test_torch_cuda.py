"""The torch backend on CUDA, where torch's own kernels do the products: rows without keys, lengths, and bad numbers."""

from __future__ import annotations

import math

import pytest
import torch

from rainfusion.backends.reference import ReferenceBackend
from rainfusion.backends.torch.backend import TorchBackend
from rainfusion.core.backend import Device
from rainfusion.core.layout import TokenLayout
from rainfusion.core.lowering import lower
from rainfusion.core.mask import BlockMask
from rainfusion.core.plan import Plan
from rainfusion.core.planner import plan
from rainfusion.core.policies import Fixed, TopK
from rainfusion.core.problem import AttentionProblem

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.filterwarnings("ignore::rainfusion.core.errors.SparsityWarning"),
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype"),
]

CUDA, CPU = Device("cuda", 0), Device("cpu")
TOLERANCE = {"float64": 1e-12, "float32": 5e-6, "float16": 4e-3, "bfloat16": 3e-2}
LENGTH = 700
LAYOUT = TokenLayout((5, 10, 13), text=50, text_position="start", block=(64, 64), sink="first_frame_keys")


def planned(dtype, policy, *, lse, dim=64, **how):
    problem = AttentionProblem(2, 4, LENGTH, LENGTH, dim, dtype, 2)
    return plan(problem, LAYOUT, policy, returns=("%out", "%lse") if lse else ("%out",), **how)


def tensors(made):
    torch.manual_seed(0)
    p = made.problem
    return [torch.randn(shape).to(getattr(torch, p.dtype)) for shape in (p.q_shape, p.kv_shape, p.kv_shape)]


def check(made, q, k, v, mask=None, lengths=None):
    """The plan on CUDA against the definitions in float64: the same NaN, infinity, and numbers."""
    on_cuda, on_host = {}, {}
    if mask is not None:
        facts = (LENGTH, LENGTH, LAYOUT.block)
        on_cuda["mask"], on_host["mask"] = BlockMask(mask.cuda(), *facts), BlockMask(mask.numpy(), *facts)
    if lengths is not None:
        on_cuda["kv_lengths"], on_host["kv_lengths"] = lengths.cuda(), lengths.numpy()
    got = lower(made, TorchBackend(), CUDA)(*(x.cuda() for x in (q, k, v)), **on_cuda)
    wide = Plan.from_json(made.to_json().replace(f'"{made.problem.dtype}"', '"float64"'))
    right = lower(wide, ReferenceBackend(), CPU)(*(x.double().numpy() for x in (q, k, v)), **on_host)
    several = isinstance(right, tuple)
    for x, want in zip(got if several else (got,), right if several else (right,), strict=True):
        limit = max(TOLERANCE[made.problem.dtype], 1e-5 if several else 0)
        torch.testing.assert_close(x.cpu().double(), torch.from_numpy(want), rtol=0, atol=limit, equal_nan=True)
    return got


def random_mask():
    blocks = torch.rand((2, 4, 11, 11), generator=torch.Generator().manual_seed(0)) < 0.5
    blocks[..., 1] = True
    blocks[0, 0, 2], blocks[1, 3, 10] = False, False
    return blocks


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("lse", [False, True])
@pytest.mark.parametrize("omitted", ["drop", "summary"])
@pytest.mark.parametrize("dim", [64, 40])
def test_rows_of_a_given_mask_that_keep_nothing(dtype, lse, omitted, dim):
    made = planned(dtype, Fixed(), lse=lse, omitted=omitted, dim=dim)
    check(made, *tensors(made), mask=random_mask())


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("lse", [False, True])
@pytest.mark.parametrize("omitted", ["drop", "summary"])
@pytest.mark.parametrize("policy", [TopK(0.0), Fixed()], ids=str)
def test_tokens_beyond_a_samples_length_take_no_part(dtype, lse, omitted, policy):
    made = planned(dtype, policy, lse=lse, omitted=omitted, kv_lengths=True)
    q, k, v = tensors(made)
    order = LAYOUT.order.copy()
    k[1, :, order[661:]], v[1, :, order[661:]] = math.nan, math.inf
    mask = random_mask() if policy == Fixed() else None
    check(made, q, k, v, mask, torch.tensor([700, 661], dtype=torch.int32))


def test_lengths_make_the_host_wait_for_nothing():
    made = planned("bfloat16", TopK(0.5), lse=False, kv_lengths=True)
    executable = lower(made, TorchBackend(), CUDA)
    q, k, v = (x.cuda() for x in tensors(made))
    lengths = torch.tensor([700, 661], dtype=torch.int32).cuda()
    executable(q, k, v, kv_lengths=lengths)
    torch.cuda.set_sync_debug_mode("error")
    try:
        executable(q, k, v, kv_lengths=lengths)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("lse", [False, True])
@pytest.mark.parametrize("policy", [TopK(0.0), Fixed()], ids=str)
@pytest.mark.parametrize("what", ["nan key", "nan value", "nan query", "infinite key", "all minus infinity"])
def test_numbers_that_are_not_finite(dtype, lse, policy, what):
    made = planned(dtype, policy, lse=lse)
    q, k, v = tensors(made)
    if what == "all minus infinity":
        q[0, 1, 7], k = -math.inf, k.abs() + 0.5
    elif what == "infinite key":
        k[0, 1, 100] = math.inf
    else:
        {"key": k, "value": v, "query": q}[what.split()[1]][0, 1, 100, 3] = math.nan
    check(made, q, k, v, random_mask() if policy == Fixed() else None)
