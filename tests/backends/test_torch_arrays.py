"""TorchArrays and host_arrays: which tensors are read, and that modes of the caller stay outside."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from rainfusion.backends.host_arrays import check_tensors
from rainfusion.backends.reference import ReferenceBackend
from rainfusion.backends.torch.backend import TorchBackend
from rainfusion.core.backend import Device
from rainfusion.core.errors import ProblemError
from rainfusion.core.layout import TokenLayout
from rainfusion.core.lowering import lower
from rainfusion.core.mask import BlockMask
from rainfusion.core.planner import plan
from rainfusion.core.policies import Fixed, TopK
from rainfusion.core.problem import AttentionProblem

CPU = Device("cpu")
BACKENDS = [TorchBackend(), ReferenceBackend()]


def lowered(backend, **how):
    planned = plan(AttentionProblem(1, 2, 70, 70, 8), TokenLayout((2, 5, 7), block=16, sink=None), TopK(0.5), **how)
    return lower(planned, backend, CPU)


def tensors():
    torch.manual_seed(0)
    return [torch.randn(1, 2, 70, 8) for _ in range(3)]


@pytest.fixture(params=BACKENDS, ids=lambda backend: backend.name)
def backend(request):
    return request.param


class Wrapped(torch.Tensor):
    """A subclass with operations of its own."""

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def freed(x, left=0):
    x = x.clone()
    x.untyped_storage().resize_(left)
    return x


def freed_view(x):
    both = torch.cat([x, x])
    view = both[1:]
    both.untyped_storage().resize_(x.nbytes)
    return view


STRANGE = {
    "freed": (freed, "memory was freed"),
    "freed in part": (lambda x: freed(x, 16), "memory was freed"),
    "freed view": (freed_view, "memory was freed"),
    "zeros without memory": (lambda x: torch._efficientzerotensor(x.shape), r"stands for zeros.*clone\(\)"),
    "quantised": (lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8), r"quantised.*dequantize\(\)"),
    "sparse": (lambda x: x.to_sparse(), r"torch\.sparse_coo.*to_dense"),
    "nested": (lambda x: torch.nested.nested_tensor([x[0]]), "nested.*to_padded_tensor.*kv_lengths"),
    "jagged": (lambda x: torch.nested.nested_tensor([x[0]], layout=torch.jagged), "nested"),
    "mkldnn": (lambda x: x.to_mkldnn(), r"torch\._mkldnn"),
    "fake": (lambda x: FakeTensorMode().from_tensor(x), r"FakeTensor, which has no data.*torch\.export"),
    "subclass": (lambda x: x.as_subclass(Wrapped), "Wrapped, a subclass with operations of its own"),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors", "ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize("kind", STRANGE)
def test_tensors_that_are_not_plain_memory_are_named(kind):
    make, said = STRANGE[kind]
    q, k, v = tensors()
    with pytest.raises(ProblemError, match=said):
        check_tensors(q, make(k), v)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated")  # torch.func.jvp imports what does it
@pytest.mark.parametrize(
    ("transform", "said"),
    [
        (torch.func.functionalize, r"functionalize.*torch\.compile and torch\.export"),
        (lambda f: torch.vmap(lambda q: f(q[None])), "vmap.*batch"),
        (torch.func.grad, "derivatives"),
        (lambda f: lambda q: torch.func.jvp(f, (q,), (q,)), "derivatives"),
        (make_fx, r"make_fx.*torch\.compile and torch\.export"),
        (lambda f: make_fx(f, tracing_mode="fake"), "FakeTensor|make_fx"),
    ],
    ids=["functionalize", "vmap", "grad", "jvp", "make_fx", "make_fx on fake tensors"],
)
def test_transforms_are_refused_in_one_sentence(backend, transform, said):
    q, k, v = tensors()
    executable = lowered(backend)
    with pytest.raises(ProblemError, match=said):
        transform(lambda q: executable(q, k, v).sum())(q)


@pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated", "ignore::torch.jit.TracerWarning")
def test_a_trace_is_refused(backend):
    q, k, v = tensors()
    executable = lowered(backend)
    with pytest.raises(ProblemError, match=r"torch\.jit\.trace"):
        torch.jit.trace(lambda q: executable(q, k, v), (q,), check_trace=False)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated")
def test_plain_tensors_are_read_within_a_transform_of_others(backend):
    q, k, v = tensors()
    right = lowered(backend)(q, k, v)
    executable = lowered(backend)
    for transform in (torch.func.functionalize, torch.func.grad, torch.vmap):
        got = []
        transform(lambda x, got=got: (got.append(executable(q, k, v)), (x * 1).sum())[1])(torch.ones(3))
        torch.testing.assert_close(got[0], right)


def test_masks_and_numbers_are_looked_at_too(backend):
    q, k, v = tensors()
    layout = TokenLayout((2, 5, 7), block=16, sink=None)
    problem = AttentionProblem(1, 2, 70, 70, 8)
    executable = lower(plan(problem, layout, Fixed(), kv_lengths=True), backend, CPU)
    mask = BlockMask(torch.ones(1, 2, 5, 5, dtype=torch.bool), 70, 70, (16, 16))
    with pytest.raises(ProblemError, match="vmap"):
        torch.vmap(lambda n: executable(q, k, v, mask=mask, kv_lengths=n))(torch.full((2, 1), 70))
    with pytest.raises(ProblemError, match="memory was freed"):
        executable(q, k, v, mask=BlockMask(freed(mask.blocks), 70, 70, (16, 16)), kv_lengths=[70])


def test_distributed_tensors_are_refused():
    distributed = pytest.importorskip("torch.distributed.tensor")
    from torch.distributed.device_mesh import init_device_mesh

    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=store)
    try:
        x = distributed.distribute_tensor(torch.ones(4), init_device_mesh("cpu", (1,)))
        with pytest.raises(ProblemError, match=r"DTensor.*to_local\(\)"):
            check_tensors(x)
    finally:
        torch.distributed.destroy_process_group()


def test_gradients_are_refused_but_not_without_autograd(backend):
    q, k, v = (x.requires_grad_() for x in tensors())
    executable = lowered(backend)
    with pytest.raises(ProblemError, match="no_grad"):
        executable(q, k, v)
    with torch.no_grad():
        assert not executable(q, k, v).requires_grad


def test_forward_mode_tangents_are_refused(backend):
    q, k, v = tensors()
    with forward_ad.dual_level(), pytest.raises(ProblemError, match=r"tangent.*primal"):
        lowered(backend)(forward_ad.make_dual(q, torch.ones_like(q)), k, v)


def test_parameters_and_views_are_plain(backend):
    q, k, v = tensors()
    right = lowered(backend)(q, k, v)
    with torch.no_grad():
        got = lowered(backend)(torch.nn.Parameter(q), k.transpose(1, 2).contiguous().transpose(1, 2), v)
    torch.testing.assert_close(got, right)


def test_a_lazily_negated_view_is_read_with_its_sign(backend):
    q, k, v = tensors()
    negated = torch.complex(torch.zeros_like(k), -k).conj().imag
    assert negated.is_neg()
    torch.testing.assert_close(lowered(backend)(q, negated, v), lowered(backend)(q, k, v))


class Counting(TorchDispatchMode):
    """A mode of a user's."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def flop_counter():
    from torch.utils.flop_counter import (
        FlopCounterMode,
    )  # imports triton, which other tests must do under its interpreter

    return FlopCounterMode(display=False)


MODES = {
    "inference": torch.inference_mode,
    "default device": lambda: torch.device("meta"),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "flop counter": flop_counter,
    "mode of a user's": Counting,
}


@pytest.mark.parametrize("omitted", ["drop", "summary"])
@pytest.mark.parametrize("mode", MODES)
def test_what_is_lowered_and_called_in_a_mode_serves_later_calls(mode, omitted):
    q, k, v = tensors()
    right = lowered(TorchBackend(), omitted=omitted)(q, k, v)
    with MODES[mode]():
        executable = lowered(TorchBackend(), omitted=omitted)
        inside = executable(q, k, v)
    torch.testing.assert_close(inside.clone(), right)
    torch.testing.assert_close(executable(q, k, v), right)


def test_what_is_lowered_under_fake_tensors_serves_later_calls(backend):
    q, k, v = tensors()
    with FakeTensorMode() as mode:
        executable = lowered(backend)
        with pytest.raises(ProblemError, match="FakeTensor"):
            executable(*(mode.from_tensor(x) for x in (q, k, v)))
        with pytest.raises(ProblemError, match="faked"):
            executable(q, k, v)
    torch.testing.assert_close(executable(q, k, v), lowered(backend)(q, k, v))


def under_fake_tensors(make):
    with FakeTensorMode():
        make()


@pytest.mark.parametrize(
    "within",
    [
        lambda make: torch.func.functionalize(lambda x: (make(), x)[1])(torch.ones(3)),
        lambda make: torch.vmap(lambda x: (make(), x)[1])(torch.ones(3)),
        lambda make: torch.func.grad(lambda x: (make(), x.sum())[1])(torch.ones(3)),
        lambda make: make_fx(lambda x: (make(), x + 1)[1])(torch.ones(3)),
        torch.inference_mode(),
        under_fake_tensors,
    ],
    ids=["functionalize", "vmap", "grad", "make_fx", "inference", "fake tensors"],
)
def test_constants_are_plain_tensors_wherever_they_are_made(within):
    constants = []
    make = lambda: constants.append(TorchBackend().from_host(np.arange(5), CPU))  # noqa: E731
    within(make)() if isinstance(within, torch.inference_mode) else within(make)
    (constant,) = constants
    check_tensors(constant)
    assert type(constant) is torch.Tensor
    assert not constant.is_inference()
    assert constant.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_arrays_travel_unchanged(dtype):
    backend = TorchBackend()
    values = np.linspace(-3, 3, 12).reshape(3, 4)
    tensor = backend.from_host(values, CPU, dtype)
    assert str(tensor.dtype) == f"torch.{dtype}"
    np.testing.assert_array_equal(backend.to_host(tensor), torch.from_numpy(values).to(tensor.dtype).double().numpy())
    if dtype == "bfloat16":
        ml_dtypes = pytest.importorskip("ml_dtypes")
        assert torch.equal(backend.from_host(values.astype(ml_dtypes.bfloat16), CPU), tensor)
