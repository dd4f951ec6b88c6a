"""Operators by their real schemas, on CPU tensors by the definitions, and the backend on them.

torch_npu's schemas are read from the wheel's own list, MindIE-SD's from its extension library. To load that takes
torch_npu and CANN (mindiesd_operators.py).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from rainfusion.backends.torch_npu import detection, operators
from rainfusion.backends.torch_npu.backend import TorchNpuBackend
from rainfusion.backends.torch_npu.chips import CHIPS, Chip
from rainfusion.backends.torch_npu.operators import Operator
from rainfusion.core.backend import Device
from rainfusion.core.ops import attend
from rainfusion.testing.cases import Case, builtin_cases
from rainfusion.testing.target import Target

A2, A3, ASCEND_950 = CHIPS
CPU = Device("cpu")

MINDIESD = ("block_sparse_attention", "rainfusionattention")
# What MindIE-SD called block_sparse_attention before: another operator.
MINDIESD_BEFORE = (
    "block_sparse_attention(Tensor query, Tensor key, Tensor value, Tensor sparse_mask, Tensor sparse_count_table, "
    "str input_layout='BNSD', int sparse_size=128, int num_heads=1, int num_key_value_heads=1, "
    "float scale_value=1., bool causal=True, int inner_precise=1) -> Tensor"
)


def mindiesd_schemas() -> dict[str, str]:
    """What MindIE-SD's extension library registers, by name."""
    texts = Path(os.environ["MINDIESD_LIBRARY"]).read_bytes().split(b"\0")
    schemas = [" ".join(text.decode().split()) for text in texts if re.match(rb"\w+\(Tensor .*-> ", text, re.DOTALL)]
    return {schema.partition("(")[0]: schema for schema in schemas}


class Emulated:
    """Operators that are registered while this lives; `calls` are the arguments they were called with."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self._libraries: list[torch.library.Library] = []

    def torch_npu(self) -> Emulated:
        """Register the operators of the wheel that the backend can call."""
        listed = Path(os.environ["TORCH_NPU_SCHEMAS"]).read_text(encoding="utf-8")
        names = ("npu_block_sparse_attention", "npu_fusion_attention")
        schemas = [re.search(rf"func: ({name}\(.*)", listed)[1] for name in names]  # type: ignore[index]
        return self.register("npu", schemas)

    def mindiesd(self) -> Emulated:
        """Register those of MindIE-SD's that the backend can call."""
        return self.register("mindiesd", (mindiesd_schemas()[name] for name in MINDIESD))

    def register(self, namespace: str, schemas: Iterable[str]) -> Emulated:
        """Define operators and give them kernels on the CPU."""
        library = torch.library.Library(namespace, "FRAGMENT")
        self._libraries.append(library)
        for schema in schemas:
            name = schema.partition("(")[0]
            library.define(schema)
            library.impl(name, self._recorded(f"{namespace}::{name}"), "CPU")
        return self

    def _recorded(self, operator: str) -> Any:
        declared = operators._operator(operator)._schema.arguments
        names = [argument.name for argument in declared]

        def kernel(*args: Any, **kwargs: Any) -> Any:
            given = {a.name: a.default_value for a in declared} | dict(zip(names, args, strict=False)) | kwargs
            self.calls.append((operator, given))
            return KERNELS[operator](given)

        return kernel


def _by_block_mask(given: dict[str, Any]) -> Any:
    mask, q, k = given["block_sparse_mask"].bool(), given["query"], given["key"]
    rows, lengths = (
        torch.tensor(given[name], dtype=torch.int32) for name in ("actual_seq_lengths", "actual_seq_lengths_kv")
    )
    assert ((rows >= 1) & (rows <= q.shape[2]) & (lengths >= 1) & (lengths <= k.shape[2])).all(), "lengths"
    starts = torch.arange(mask.shape[-1]) * given["block_shape"][1]
    within = mask & (starts < lengths[:, None])[:, None, None]
    assert within.any(dim=-1).all(), "a row without blocks is left unwritten"
    out, lse = attend(
        q,
        k,
        given["value"],
        mask=mask,
        lengths=lengths,
        block=tuple(given["block_shape"]),
        scale=given["scale_value"],
    )
    unwritten = (torch.arange(q.shape[2]) >= rows[:, None])[:, None]
    out, lse = out.masked_fill(unwritten[..., None], torch.nan), lse.masked_fill(unwritten, torch.nan)
    never_written = torch.full_like(lse, torch.nan)
    return out.to(q.dtype), (lse if given["softmax_lse_flag"] else never_written)[..., None]


def _by_index_lists(given: dict[str, Any]) -> Any:
    lengths = given["actual_seq_qlen"], given["actual_seq_kvlen"]
    q, k, v = (
        x.unflatten(0, (len(lengths[0]), -1)).transpose(1, 2) for x in (given["query"], given["key"], given["value"])
    )
    blocks = given["select_idx"].unflatten(0, (len(lengths[0]), -1)).transpose(1, 2)
    slots = torch.arange(blocks.shape[-1]) < given["select_num_idx"].unflatten(0, (len(lengths[0]), -1)).mT[..., None]
    assert torch.equal(blocks >= 0, slots), "valid numbers come first, then -1"
    mask = torch.nn.functional.one_hot(blocks.clamp(min=0), blocks.shape[-1]).mul(slots[..., None]).sum(-2).bool()
    assert mask.any(dim=-1).all(), "a row without blocks is not documented"
    out, lse = attend(q, k, v, mask=mask, block=tuple(given["blockshape"]), scale=given["scale"])
    return out.to(q.dtype).transpose(1, 2).flatten(0, 1), torch.full_like(lse, torch.nan)


def _fusion_attention(given: dict[str, Any]) -> Any:
    q, k, v = (given[name].float() for name in ("query", "key", "value"))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    logits = q @ k.mT
    if given["pse"] is not None:
        logits = logits + given["pse"]
    logits = logits * given["scale"]  # of the bias too
    if given["atten_mask"] is not None:
        logits = logits.masked_fill(given["atten_mask"], torch.finfo(torch.float32).min)
    maximum = logits.amax(dim=-1, keepdim=True)
    weights = (logits - maximum).exp()
    total = weights.sum(dim=-1, keepdim=True)
    out = (weights @ v / total).to(given["query"].dtype)
    eight = (*maximum.shape[:3], 8)
    return out, maximum.expand(eight).clone(), total.expand(eight).clone(), out.new_empty(0), 0, 0, 0


KERNELS = {
    "npu::npu_block_sparse_attention": _by_block_mask,
    "npu::npu_fusion_attention": _fusion_attention,
    "mindiesd::block_sparse_attention": _by_block_mask,
    "mindiesd::rainfusionattention": _by_index_lists,
}


class OnCpu(TorchNpuBackend):
    """The backend on the emulated operators."""

    def devices(self) -> Sequence[Device]:
        return [CPU]

    def device_of(self, array: Any) -> Device | None:
        return CPU if isinstance(array, torch.Tensor) else None

    def running(self, device: Device) -> Any:
        return torch.no_grad()


_KINDS = {"Tensor": torch.Tensor, "List[int]": list, "str": str, "float": float, "int": int}


def assert_fits(operator: str, given: dict[str, Any]) -> None:
    """Arguments have names and types that the operator's schema declares, none that it needs is left out."""
    declared = {argument.name: argument for argument in operators._operator(operator)._schema.arguments}
    assert {name for name, argument in declared.items() if not argument.has_default_value()} <= {*given} <= {*declared}
    for name, value in given.items():
        kind = str(declared[name].type)
        kind = kind[len("Optional[") : -1] if kind.startswith("Optional[") else kind
        assert isinstance(value, _KINDS[kind]), f"{name} is {value!r}, declared {kind}"
        assert not isinstance(value, torch.Tensor) or value.is_contiguous(), f"{name} is not contiguous"


def target(monkeypatch: Any, chip: Chip = A2, *only: Operator) -> Target:
    """The backend as on a chip, with nothing remembered, with some operators only if these are given."""
    monkeypatch.setattr(detection, "chip", lambda: chip)
    monkeypatch.setattr(operators, "_lacking", {})
    if only:
        monkeypatch.setattr(operators, "OPERATORS", only)
    return Target(OnCpu(), CPU)


def by_name(name: str) -> Operator:
    """An operator by its name in torch."""
    return next(operator for operator in operators.OPERATORS if operator.operator == name)


def cases(*names: str) -> list[Case]:
    """Shared cases in bfloat16 by their names without the dtype; all without names."""
    found = [c for c in builtin_cases() if c.name.endswith("-bf16") and c.precision is None]
    chosen = [c for c in found if not names or c.name.removesuffix("-bf16") in names]
    assert len(chosen) == (len(names) or len(found))
    return chosen
