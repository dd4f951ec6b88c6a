"""Checks that every model family has to pass, on tiny models with random weights on the CPU.

A family is a `Tiny`: how to make the model, and the forwards to try. The test file of a family lists its own and runs
`check_family` on each.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch

import rainfusion
from rainfusion.core.layout import TokenLayout
from rainfusion.integrations.diffusers import RainFusionConfig, apply_rainfusion

BLOCK = 16


@dataclass(frozen=True)
class Tiny:
    """A tiny model of a family.

    Args:
        make: the model, with random weights; `made` seeds them.
        inputs: by name, the arguments of a forward; called anew for each, as tensors are random.
        sparse_calls: attention calls that a forward makes sparse; None: one a self-attention layer.
        dense_calls: those that stay dense whatever is configured.
        touch: changes one token's latent of the first sample of the arguments, in place, and returns its place
            (frame, row, column) in the grid; used to see that the adapter describes the order of tokens.
    """

    make: Callable[[], torch.nn.Module]
    inputs: dict[str, Callable[[], dict[str, Any]]]
    sparse_calls: int | None = None
    dense_calls: int = 0
    touch: Callable[[dict[str, Any]], tuple[int, int, int]] | None = None
    config: dict[str, Any] = field(default_factory=dict)

    def made(self) -> torch.nn.Module:
        torch.manual_seed(0)
        model = self.make().eval()
        for parameter in model.parameters():  # some families start some weights at zero, which would hide errors
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.02)
        return model


def config(tiny: Tiny, **settings: Any) -> RainFusionConfig:
    return RainFusionConfig(**({"block": BLOCK, "min_blocks": 0, "sink": None} | tiny.config | settings))


def check_family(tiny: Tiny, name: str) -> None:
    """Everything that holds of every family, for one forward."""
    model, arguments = tiny.made(), seeded(tiny.inputs[name])
    with torch.no_grad():
        untouched = first(model(**arguments))
        check_equal(tiny, model, arguments, untouched, sparsity=0.0, kind="dense")
        check_equal(tiny, model, arguments, untouched, sparsity=1e-9, kind="sparse")
        check_oracle(tiny, model, arguments)
        check_oracle(tiny, model, arguments, order="layer")
        assert torch.equal(first(model(**arguments)), untouched), "not removed bitwise"


def check_equal(
    tiny: Tiny, model: torch.nn.Module, arguments: Any, untouched: torch.Tensor, sparsity: float, kind: str
) -> None:
    """A budget that keeps every block changes nothing but rounding."""
    with apply_rainfusion(model, config(tiny, sparsity=sparsity)) as handle:
        out = first(model(**arguments))
    report = handle.report()
    expected = sum(report.layers.values()) if tiny.sparse_calls is None else tiny.sparse_calls
    assert report.count(kind=kind) == expected + (tiny.dense_calls if kind == "dense" else 0), str(report)
    assert_close(out, untouched, 2e-5)


def check_oracle(tiny: Tiny, model: torch.nn.Module, arguments: Any, **settings: Any) -> None:
    """Sparse attention is the softmax over the tokens of the blocks that were selected, in float64."""
    with apply_rainfusion(model, config(tiny, sparsity=0.6, **settings)) as handle:
        out = first(model(**arguments))
        with oracle() as masks:
            expected = first(model(**arguments))
        dense = first(_dense(model, handle, arguments))
    assert masks
    assert any(not mask.all() for mask in masks), "nothing was skipped"
    assert_close(out, expected, 2e-5)
    assert not torch.allclose(out, dense, rtol=1e-4, atol=1e-6), "sparse attention made no difference"


def _dense(model: torch.nn.Module, handle: Any, arguments: Any) -> Any:
    handle.remove()
    return model(**arguments)


@contextlib.contextmanager
def oracle() -> Iterator[list[torch.Tensor]]:
    """rainfusion.attention by a token mask and a softmax in float64, with the blocks that rainfusion selects."""
    attention, masks = rainfusion.attention, []

    def slow(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **settings: Any) -> Any:
        returned = attention(q, k, v, **{**settings, "return_mask": True})
        mask, parts = returned[1], settings["parts"]
        layout = TokenLayout(parts=parts, block=settings["block"], window=settings["window"])
        allowed = torch.as_tensor(mask.to_dense(layout if settings["order"] == "window" else None))
        queries, keys = (torch.ones(q.shape[0], q.shape[1], dtype=torch.bool) for _ in range(2))
        if settings["kv_lengths"] is not None:
            place = torch.as_tensor(layout.inverse.copy())
            keys = place[None] < settings["kv_lengths"][:, None]
            queries = keys
        allowed = allowed & keys[:, None, None, :]
        masks.append(allowed)
        group = q.shape[2] // k.shape[2]
        heads_first = [x.transpose(1, 2).double() for x in (q, k, v)]
        qd, kd, vd = heads_first[0], *(x.repeat_interleave(group, 1) for x in heads_first[1:])
        scale = q.shape[-1] ** -0.5 if settings["scale"] is None else settings["scale"]
        weights = (qd @ kd.mT * scale).masked_fill(~allowed, -torch.inf).softmax(-1).nan_to_num(0.0)
        out = (weights @ vd).masked_fill(~queries[:, None, :, None], 0.0).transpose(1, 2).to(q.dtype)
        return (out, mask) if settings.get("return_mask") else out

    with mock.patch.object(rainfusion, "attention", slow):
        yield masks


def check_places(tiny: Tiny, name: str) -> None:
    """A change of one latent reaches attention at the token where the adapter says that it stands."""
    assert tiny.touch is not None
    model = tiny.made()
    seen: list[tuple[torch.Tensor, Any]] = []
    attention = rainfusion.attention

    def spy(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **settings: Any) -> Any:
        if len(seen) in (0, calls):
            seen.append((q.clone(), settings["parts"]))
        else:
            seen.append((q, None))
        return attention(q, k, v, **settings)

    calls = -1
    applied = apply_rainfusion(model, config(tiny, sparsity=0.6, order="layer"))
    with torch.no_grad(), applied, mock.patch.object(rainfusion, "attention", spy):
        model(**seeded(tiny.inputs[name]))
        calls = len(seen)
        arguments = seeded(tiny.inputs[name])
        frame, row, column = tiny.touch(arguments)
        model(**arguments)
    (before, parts), (after, _) = seen[0], seen[calls]
    # Rounding may differ between two runs by where tensors lie in memory; the touched token changes by far more.
    same = torch.isclose(before[0], after[0], rtol=1e-4, atol=1e-5)
    changed = (~same).flatten(1).any(1).nonzero().flatten().tolist()
    layout = TokenLayout(parts=parts, block=BLOCK)
    starts = dict(zip(map(id, layout.parts), layout.starts, strict=True))
    grid = layout.grids[-1]
    assert changed == [starts[id(grid)] + (frame * grid.height + row) * grid.width + column]


def seeded(make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    torch.manual_seed(1)
    return make()


def first(output: Any) -> torch.Tensor:
    """The sample of a model's output, or what there is of several."""
    found = (
        output
        if isinstance(output, torch.Tensor)
        else next(iter(output.values() if hasattr(output, "values") else output))
    )
    return torch.stack(list(found)) if isinstance(found, list) else found


def assert_close(out: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    error = ((out - expected).abs().max() / expected.abs().max()).item()
    assert error <= tolerance, f"off by {error:.2e} of the largest value"
