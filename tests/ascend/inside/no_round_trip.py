"""A call of a lowered plan, after its first, copies nothing between host and device, neither way."""

from __future__ import annotations

import ctypes
from dataclasses import replace

import pytest
import torch

from rainfusion.core.policies import TopK, TopP
from rainfusion.testing.cases import builtin_cases
from rainfusion.testing.target import find_target

TO_DEVICE, TO_HOST = 1, 2
copies = ctypes.CDLL("libascendcl.so").stand_in_copies
copies.restype = ctypes.c_long
(VIDEO,) = (case for case in builtin_cases() if case.name == "all_together-bf16")


def counted() -> tuple[int, int]:
    torch.npu.synchronize()
    return copies(TO_DEVICE), copies(TO_HOST)


@pytest.mark.parametrize("omitted", ["drop", "summary"])
@pytest.mark.parametrize("policy", [TopK(0.2), TopP(0.6)], ids=str)
@pytest.mark.parametrize("kv_lengths", [False, True])
def test_a_call(policy, omitted, kv_lengths):
    target = find_target("torch_npu")
    given = (600,) * VIDEO.problem.batch if kv_lengths else ()
    lowered = target.lower(replace(VIDEO, omitted=omitted, kv_lengths=given).plan(policy=policy))
    tensors = target.tensors(VIDEO)
    lengths = {"kv_lengths": torch.tensor(given, dtype=torch.int32).to("npu")} if kv_lengths else {}
    lowered(*tensors, **lengths)  # the first call brings constants to the device
    before = counted()
    lowered(*tensors, **lengths)
    assert counted() == before


def test_that_copies_are_counted():
    before = counted()
    torch.ones(3, device="cpu").to("npu").cpu()
    assert counted() == (before[0] + 1, before[1] + 1)


def test_autocast_gradients_and_shortened_products_are_off_inside_and_as_they_were_outside():
    target = find_target("torch_npu")
    torch.npu.matmul.allow_hf32 = True
    with torch.autocast("npu", torch.float16), target.backend.running(target.device):
        inside = torch.is_autocast_enabled("npu"), torch.is_grad_enabled(), torch.npu.matmul.allow_hf32
    assert inside == (False, False, False)
    assert torch.npu.matmul.allow_hf32
    torch.npu.matmul.allow_hf32 = False
