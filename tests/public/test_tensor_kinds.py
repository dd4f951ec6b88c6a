"""Tensors that are not plain memory, through every public call on every CPU backend: right, or refused in our words."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.autograd import forward_ad

import rainfusion
from rainfusion import LayoutError, ProblemError, RainfusionError, TokenLayout

pytestmark = [
    pytest.mark.filterwarnings("ignore::rainfusion.RainfusionWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated"),  # torch.func.jvp imports what does it
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors"),
]
Q, K, V = (torch.randn(2, 2, 64, 16, generator=torch.Generator().manual_seed(seed)) for seed in range(3))
HOW = {"block": 8, "sparsity": 0.5}

CALLS = {
    "attention": lambda backend: lambda q, k, v: rainfusion.attention(q, k, v, backend=backend, **HOW),
    "8 bits": lambda backend: lambda q, k, v: rainfusion.attention(q, k, v, precision="int8", backend=backend, **HOW),
    "select": lambda backend: lambda q, k, v: rainfusion.select(q, k, backend=backend, **HOW).blocks,
    "block_means": lambda backend: lambda q, k, v: rainfusion.block_means(k, block=8, backend=backend),
}


class Named(torch.Tensor):
    """A subclass without operations of its own."""


class Holding(torch.Tensor):
    """A subclass that has no data of its own."""

    @staticmethod
    def __new__(cls, x):
        return torch.Tensor._make_wrapper_subclass(cls, x.shape, dtype=x.dtype)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise NotImplementedError(f"{func} is not for {cls.__name__}")


def with_tangent(call):
    with forward_ad.dual_level():
        return call(Q, forward_ad.make_dual(K, torch.ones_like(K)), V)


REFUSED = {
    "forward-mode tangent": (with_tangent, "tangent"),
    "jvp": (lambda call: torch.func.jvp(lambda k: call(Q, k, V), (K,), (K,)), "derivatives"),
    "jacfwd": (lambda call: torch.func.jacfwd(lambda k: call(Q, k, V))(K), "derivatives|vmap"),
    "grad": (lambda call: torch.func.grad(lambda k: call(Q, k, V).sum())(K), "derivatives"),
    "vmap": (lambda call: torch.vmap(lambda k: call(Q[:1], k[None], V[:1]))(K), "vmap"),
    "functionalize": (lambda call: torch.func.functionalize(lambda k: call(Q, k, V))(K), "functionalize"),
    "subclass": (lambda call: call(*map(Holding, (Q, K, V))), "Holding, a subclass with operations of its own"),
    "sparse": (lambda call: call(Q, K.to_sparse(), V), "to_dense"),
    "nested": (lambda call: call(Q, torch.nested.nested_tensor([*K]), V), "nested|one problem|shape"),
    "complex": (lambda call: call(Q, torch.complex(K, K), V), "complex64"),
    "meta": (lambda call: call(*(x.to("meta") for x in (Q, K, V))), "meta"),
}


@pytest.fixture(params=["reference", "torch", "openvino"])
def backend(request):
    if request.param != "reference":
        pytest.importorskip(request.param)
    return request.param


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.parametrize("call", CALLS)
def test_they_are_refused_in_our_words(backend, call, kind):
    make, said = REFUSED[kind]
    with pytest.raises(RainfusionError, match=said) as refused:
        make(CALLS[call](backend))
    assert len(str(refused.value)) < 600


@pytest.mark.parametrize("call", CALLS)
def test_views_and_names_are_read_as_they_are(backend, call):
    run = CALLS[call](backend)
    right = run(Q, K, V)
    for q, k, v in (
        (x.as_subclass(Named) for x in (Q, K, V)),
        (torch.nn.Parameter(x, requires_grad=False) for x in (Q, K, V)),
        (torch.complex(x, -x).conj().imag for x in (Q, K, V)),  # lazily negated
    ):
        got = run(q, k, v)
        assert type(got) is torch.Tensor
        assert torch.equal(got, right)


# -- merge and to_blocks compute with the arrays' own library ------------------------------------------


def test_merge_and_to_blocks_are_differentiable_and_batched():
    """They are plain array code, so what torch does to functions works on them."""
    layout, lse = TokenLayout((4, 4, 4), block=8), K[..., 0]

    def merged(out):
        return rainfusion.merge(out, lse, V, V[..., 0])[0]

    right, change = torch.func.jvp(merged, (Q,), (torch.ones_like(Q),))
    assert torch.equal(right, merged(Q))
    weight = torch.sigmoid(lse - V[..., 0])[..., None].expand_as(Q)
    torch.testing.assert_close(change, weight)
    torch.testing.assert_close(torch.func.grad(lambda out: merged(out).sum())(Q), weight)
    assert torch.equal(torch.vmap(lambda x: layout.to_blocks(x, 1))(Q), layout.to_blocks(Q))


@pytest.mark.parametrize(
    "make", [lambda x: x.to_sparse(), lambda x: x.to_mkldnn(), Holding], ids=["sparse", "oneDNN", "subclass"]
)
def test_merge_and_to_blocks_refuse_what_their_library_does_not_compute_with(make):
    with pytest.raises(ProblemError, match=r"out_a, lse_a, out_b, lse_b .* cannot be merged.*dense arrays"):
        rainfusion.merge(make(Q), make(Q[..., 0]), make(K), make(K[..., 0]))
    layout = TokenLayout((4, 4, 4), block=8)
    if make(Q).layout == torch.sparse_coo:
        assert torch.equal(layout.to_blocks(make(Q)).to_dense(), layout.to_blocks(Q))
        return
    with pytest.raises(LayoutError, match=r"x .* cannot be put into another order.*dense arrays"):
        layout.to_blocks(make(Q))


def test_a_nested_tensor_has_no_axis_to_put_in_order():
    with pytest.raises(LayoutError, match="not an axis"):
        TokenLayout((4, 4, 4), block=8).to_blocks(torch.nested.nested_tensor([*Q]))


def test_numpy_stays_numpy():
    assert isinstance(TokenLayout((4, 4, 4), block=8).to_blocks(Q.numpy()), np.ndarray)
