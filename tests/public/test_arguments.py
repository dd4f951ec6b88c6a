"""Every argument that does not fit is refused by the right class, naming what was given and what is allowed."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import rainfusion
from rainfusion import BlockMask, Fixed, TopK
from rainfusion.core.errors import (
    LayoutError,
    MaskError,
    PolicyError,
    ProblemError,
    RainfusionError,
    UnknownBackendError,
)


def tensor(*shape, dtype="float32", kind=np):
    return kind.zeros(shape, dtype=getattr(kind, dtype))


X = tensor(1, 2, 64, 8)
LONG = "x" * 10**6


def jagged():
    samples = [torch.zeros(length, 2, 8) for length in (64, 32)]
    return torch.nested.nested_tensor(samples, layout=torch.jagged).transpose(1, 2)


class Hostile:
    """An object of which everything fails."""

    def __getattr__(self, name):
        raise RuntimeError(name)

    def fail(self, *_):
        raise RuntimeError("fail")

    __repr__ = __bool__ = __eq__ = __hash__ = __len__ = __iter__ = __index__ = __float__ = fail


MASK = BlockMask.from_bool(np.ones((1, 2, 8, 8), bool), 64, 64, (8, 8))
BASE = {"q": X, "k": X, "v": X, "grid": (4, 4, 4), "block": 8, "sink": None}


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"q": [[1.0]]}, ProblemError, r"q is a list; give a NumPy array or a tensor"),
        ({"v": None}, ProblemError, r"v is a NoneType; give"),
        ({"q": X[0]}, ProblemError, r"q has shape \(2, 64, 8\); give four axes in the order 'bhsd'"),
        ({"k": tensor(1, 2, 60, 8)}, ProblemError, r"k and v need one shape, given q .*, k \(1, 2, 60, 8\) float32"),
        ({"k": tensor(2, 2, 64, 8), "v": tensor(2, 2, 64, 8)}, ProblemError, r"q and k need the same batch"),
        (
            {"q": tensor(1, 2, 64, 4)},
            ProblemError,
            r"same batch and head dim in layout 'bhsd', given q \(1, 2, 64, 4\)",
        ),
        ({"q": tensor(1, 3, 64, 8)}, ProblemError, r"heads=3 is not a multiple of kv_heads=2"),
        ({"q": tensor(1, 2, 0, 8)}, ProblemError, r"q_len=0 is not allowed; give a whole number from 1"),
        ({"k": tensor(1, 2, 0, 8), "v": tensor(1, 2, 0, 8)}, ProblemError, r"kv_len=0 is not allowed"),
        ({"q": X[:0], "k": X[:0], "v": X[:0]}, ProblemError, r"batch=0 is not allowed"),
        ({"q": X[:, :0], "k": X[:, :0], "v": X[:, :0]}, ProblemError, r"heads=0 is not allowed"),
        ({"q": X[..., :0], "k": X[..., :0], "v": X[..., :0]}, ProblemError, r"head_dim=0 is not allowed"),
        ({"k": X.astype(np.float64)}, ProblemError, r"need one dtype, given q \S+ .*float32, k .*float64, v .*float32"),
        ({n: X.astype(np.int32) for n in "qkv"}, ProblemError, r"dtype int32 is not supported; use one of float16, bf"),
        ({n: X.astype(complex) for n in "qkv"}, ProblemError, r"dtype complex128 is not supported"),
        ({n: X.astype(">f4") for n in "qkv"}, ProblemError, r"dtype >f4 is not supported"),
        ({"k": torch.zeros(1, 2, 64, 8)}, ProblemError, r"q is a numpy array and k a torch one"),
        ({n: torch.zeros(1, 2, 64, 8) for n in "qk"}, ProblemError, r"q is a torch array and v a numpy one"),
        ({"tensor_layout": "sbhd"}, ProblemError, r"tensor_layout='sbhd' is not known; choose one of 'bhsd', 'bshd'"),
        ({"scale": float("nan")}, ProblemError, r"scale=nan is not a finite number; give one, or leave it out"),
        ({"scale": "1"}, ProblemError, r"scale='1' is not a finite number"),
        ({"scale": True}, ProblemError, r"scale=True is not a finite number"),
        ({"scale": 10**400}, ProblemError, r"scale=1000.*\.\.\. is not a finite number"),
        ({"scale": -1e300}, ProblemError, r"scale=-1e\+300 is beyond float32"),
        ({"backend": ""}, UnknownBackendError, r"backend '' is not known; choose one of reference"),
        ({"backend": ["torch"]}, UnknownBackendError, r"backend \['torch'\] is not known; choose one of reference"),
        ({"omitted": "mean"}, ProblemError, r"omitted='mean' is not known; choose one of 'drop', 'summary'"),
        ({"grid": (4, 4, 5)}, LayoutError, r"grid 4x4x5 makes 80 tokens, but q has 64 and k has 64"),
        ({"text": 3}, LayoutError, r"grid 4x4x4 text=3@end makes 67 tokens"),
        ({"grid": None, "text": 3}, LayoutError, r"text=3 needs a grid; give grid=\(frames, height, width\)"),
        ({"grid": None, "sink": "first_frame", "parts": 5}, LayoutError, "parts=5 is no sequence; give a tuple"),
        ({"grid": (4, 16)}, LayoutError, r"grid=\(4, 16\) is not a tuple of 3"),
        ({"grid": (4.0, 4, 4)}, LayoutError, r"grid=4.0 is not an integer"),
        (
            {"window": (1, 2, 2)},
            LayoutError,
            r"window=\(1, 2, 2\) holds 4 tokens, .* of \(8, 8\); choose .* of 8, such",
        ),
        ({"block": 0}, LayoutError, r"block=0 is not allowed"),
        ({"block": (8, 8, 8)}, LayoutError, r"block=\(8, 8, 8\) is not a tuple of 2"),
        ({"text_position": "mid"}, LayoutError, r"text_position='mid' is not known"),
        ({"sink": "none"}, LayoutError, r"sink='none' is not known; choose one of 'first_frame', 'first_frame_keys'"),
        ({"sparsity": 1.0}, PolicyError, r"sparsity=1.0 is out of range; give a number in \[0, 1\)"),
        ({"sparsity": -0.2}, PolicyError, r"sparsity=-0.2 is out of range"),
        ({"sparsity": float("nan")}, PolicyError, r"sparsity=nan is not a finite number"),
        ({"sparsity": True}, PolicyError, r"sparsity=True is not a finite number"),
        ({"sparsity": "80%"}, PolicyError, r"sparsity='80%' is not a finite number"),
        ({"policy": "topk"}, PolicyError, r"policy='topk' is not a policy; give TopK\(...\), TopP\(...\), Hybrid"),
        ({"policy": TopK(0.5), "sparsity": 0.5}, ProblemError, r"sparsity and policy both say what to attend"),
        ({"mask": MASK, "sparsity": 0.5}, ProblemError, r"sparsity and mask both say what to attend"),
        ({"mask": MASK, "policy": TopK(0.5)}, ProblemError, r"policy and mask both say"),
        ({"policy": Fixed()}, MaskError, r"mask is a NoneType where a BlockMask is due; make one with Bl"),
        ({"mask": MASK.blocks}, MaskError, r"mask is a ndarray where a BlockMask is due"),
        ({"mask": MASK, "block": 16}, MaskError, r"of another problem: .*8x8 of 8x8.*needs batch=1, heads=2, 4x4"),
        ({"mask": MASK, "q": X[:, :, :61], "grid": None}, MaskError, r"of another problem: .*over 61x64 tokens"),
        (
            {"mask": BlockMask(MASK.blocks[:, :1], 64, 64, (8, 8))},
            MaskError,
            r"of another problem: BlockMask\(batch=1, heads=1.*heads=2",
        ),
        ({"backend": "cudnn"}, UnknownBackendError, r"backend 'cudnn' is not known; choose one of reference"),
        ({"backend": 3}, UnknownBackendError, r"backend 3 is not known"),
        ({"backend": Hostile()}, UnknownBackendError, r"backend <Hostile> is not known"),
        ({"backend": LONG}, UnknownBackendError, r"backend 'xxx"),
        ({"parts": 3}, LayoutError, r"parts=3 is no sequence; give a tuple of Grid, Text and Tokens"),
        ({"parts": Hostile()}, LayoutError, r"parts=<Hostile> is no sequence"),
        ({"return_lse": X}, ProblemError, r"return_lse=array.* is not a truth value; give True or False"),
        ({"return_mask": "no"}, ProblemError, r"return_mask='no' is not a truth value"),
        ({"scale": Hostile()}, ProblemError, r"scale=<Hostile> is not a finite number"),
        ({"block": Hostile()}, LayoutError, r"block=<Hostile>"),
        ({"kv_lengths": Hostile()}, ProblemError, r"kv_lengths is <Hostile>; give integers \[1\]"),
        ({"kv_lengths": [[1], [2, 3]]}, ProblemError, r"kv_lengths is object \(0,\); give integers"),
        ({"q": Hostile()}, ProblemError, r"q is a Hostile; give a NumPy array"),
        ({"v": X.astype(">f4")}, ProblemError, r"dtype >f4 is not supported; .*byte order: x\.astype"),
        ({n: jagged() for n in "qkv"}, ProblemError, r"nested.*kv_lengths"),
        ({"v": np.ma.masked_array(X)}, ProblemError, r"v \(MaskedArray\) .*pass x\.filled\(0\)"),
        ({"v": X.view(np.recarray)}, ProblemError, r"v \(recarray\) .*pass numpy\.asarray\(x\)"),
    ],
)
def test_what_does_not_fit_is_refused(change, error, said):
    arguments = BASE | change
    q, k, v = (arguments.pop(name) for name in "qkv")
    with pytest.raises(error, match=said) as caught:
        rainfusion.attention(q, k, v, **arguments)
    assert isinstance(caught.value, RainfusionError)
    assert len(str(caught.value)) < 500
    assert isinstance(caught.value, ValueError | LookupError)


def test_an_unknown_argument_is_no_argument():
    with pytest.raises(TypeError, match="unexpected keyword argument 'top_k'"):
        rainfusion.attention(X, X, X, top_k=3)


PLAN = rainfusion.plan(rainfusion.AttentionProblem(1, 2, 64, 64, 8), policy=TopK(0.5))


@pytest.mark.parametrize(
    "wrong", [None, 3, LONG, Hostile(), [LONG], np.zeros(3), np.float32(2), float("nan")], ids=type
)
@pytest.mark.parametrize(
    "call",
    [
        lambda x: rainfusion.merge(x, X[..., 0], X, X[..., 0]),
        lambda x: rainfusion.merge(X, X[..., 0], X, x),
        lambda x: rainfusion.merge(X, X[..., 0], X, X[..., 0], tensor_layout=x),
        lambda x: rainfusion.block_means(X, side=x),
        rainfusion.lower,
        lambda x: rainfusion.lower(PLAN, device=x) if x is not None else rainfusion.lower(x),
        lambda x: rainfusion.lower(PLAN, strict=x),
        rainfusion.choose,
        lambda x: rainfusion.plan(PLAN.problem, kv_lengths=x),
        rainfusion.unregister,
        PLAN.quotas,
        lambda x: PLAN.layout.axis(x, x),
        lambda x: BlockMask(x, 64, 64, (8, 8)),
        lambda x: BlockMask(MASK.blocks, 64, 64, x),
        lambda x: BlockMask(MASK.blocks, 64, 64, (8, 8), x if x is not None else 3),
        lambda x: BlockMask.from_kv_indices(x, x, 64, 64, (8, 8)),
        lambda x: BlockMask.where(x, MASK, MASK),
        lambda x: BlockMask.where(np.ones(2, bool), MASK, x),
        BlockMask.load,
        lambda x: MASK[x] if not isinstance(x, int) else MASK[x, x, x, x, x],
        MASK.to,
        lambda x: MASK.to_dense(x if x is not None else 3),
    ],
)
def test_no_value_ends_in_an_error_that_is_not_ours(call, wrong):
    with pytest.raises(RainfusionError) as caught:
        call(wrong)
    assert len(str(caught.value)) < 1000  # a table of backends has several lines


class Quantum:
    """An array on a device of its own."""

    shape, dtype, device = (1, 2, 64, 8), "float32", "qpu:0"


def test_a_device_that_no_backend_drives_is_refused_with_a_table():
    with pytest.raises(rainfusion.core.errors.NoBackendError) as caught:
        rainfusion.attention(Quantum(), Quantum(), Quantum(), sparsity=0, block=8)
    lines = str(caught.value).splitlines()
    assert lines[0] == "no backend can run this plan:"
    assert lines[1].split() == ["backend", "stage", "reason", "install"]
    assert any("reference" in line and "owns numpy, torch:cpu arrays; this is test_arguments" in line for line in lines)


def test_tensors_on_two_devices_are_refused():
    x, elsewhere = torch.zeros(1, 2, 64, 8), torch.empty(1, 2, 64, 8, device="meta")
    with pytest.raises(ProblemError, match="Move all arrays to one device"):
        rainfusion.attention(x, elsewhere, elsewhere, sparsity=0, block=8, backend="reference")


def test_a_lowered_plan_refuses_other_tensors_and_masks():
    problem = rainfusion.AttentionProblem(1, 2, 64, 64, 8)
    run = rainfusion.lower(rainfusion.plan(problem, policy=TopK(0)), backend="reference")
    with pytest.raises(ProblemError, match=r"q is \(1, 2, 32, 8\) float32; this plan takes \(1, 2, 64, 8\) float32"):
        run(X[:, :, :32], X, X)
    with pytest.raises(ProblemError, match=r"v is \(1, 2, 64, 8\) float64; this plan takes"):
        run(X, X, X.astype(np.float64))
    with pytest.raises(MaskError, match=r"mask is given, but this plan does not read it; plan with Fixed\(\)"):
        run(X, X, X, mask=MASK)
