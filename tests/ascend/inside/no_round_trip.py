"""What a call of a lowered plan, after its first, copies between host and device: nothing, or the lengths given."""

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
@pytest.mark.parametrize("kv_lengths", ["none", "on the host", "on the device"])
def test_a_call(policy, omitted, kv_lengths):
    target = find_target("torch_npu")
    given = () if kv_lengths == "none" else (600,) * VIDEO.problem.batch
    lowered = target.lower(replace(VIDEO, omitted=omitted, kv_lengths=given).plan(policy=policy))
    tensors = target.tensors(VIDEO)
    lengths = {}
    if given:
        lengths["kv_lengths"] = (
            given if kv_lengths == "on the host" else torch.tensor(given, dtype=torch.int32).to("npu")
        )
    lowered(*tensors, **lengths)  # the first call brings constants to the device
    to_device, to_host = counted()
    lowered(*tensors, **lengths)
    # The operator takes numbers, all else reads a tensor: one copy, in the direction that is left.
    assert counted() == (to_device + (kv_lengths == "on the host"), to_host + (kv_lengths == "on the device"))


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
