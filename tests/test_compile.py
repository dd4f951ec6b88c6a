"""torch.compile and torch.export over rainfusion: one operator in the graph, the same numbers, few graphs."""

from __future__ import annotations

import gc
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch._dynamo.backends.registry import lookup_backend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim, export
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree

import rainfusion
import rainfusion.compile
from rainfusion import (
    AttentionProblem,
    BlockMask,
    Budget,
    Grid,
    Hybrid,
    LayoutError,
    MaskError,
    Policy,
    ProblemError,
    Text,
    TokenLayout,
    TopK,
    TopP,
)

GRID, BLOCK = (4, 8, 16), 64
OPERATOR = torch.ops.rainfusion.call.default
pytestmark = pytest.mark.filterwarnings("ignore::rainfusion.RainfusionWarning")
# Tracing, functionalisation and fakes as in real use, but no C++ compiler.
compiled: Any = torch.compile(backend="aot_eager", fullgraph=True)
Tensors = list[torch.Tensor]


@pytest.fixture(autouse=True)
def _from_scratch() -> Iterator[None]:
    torch._dynamo.reset()
    with torch.no_grad():
        yield


@pytest.fixture(params=["reference", "torch"], autouse=True)
def _backend(request: pytest.FixtureRequest) -> Iterator[None]:
    with rainfusion.use(request.param):
        yield


once = pytest.mark.parametrize("_backend", ["reference"], indirect=True)  # where no backend makes a difference


def tensors(length: int = 512, dtype: torch.dtype = torch.float32, batch: int = 1) -> Tensors:
    generator = torch.Generator().manual_seed(length)
    return [torch.randn(batch, 2, length, 32, generator=generator).to(dtype) for _ in range(3)]


def attention(*tensors: Any, **settings: Any) -> Any:
    return rainfusion.attention(*tensors, **{"grid": GRID, "block": BLOCK, **settings})


def select(*tensors: Any, **settings: Any) -> BlockMask:
    return rainfusion.select(*tensors, **{"grid": GRID, "block": BLOCK, **settings})


def executable(*returns: str, policy: Policy | None = None, **operands: bool) -> rainfusion.Executable:
    layout, problem = TokenLayout(GRID, block=BLOCK), AttentionProblem(1, 2, 512, 512, 32)
    plan = rainfusion.plan(problem, layout, policy or TopK(0.3), returns=returns or ("%out",), **operands)
    return rainfusion.lower(plan, like=tensors()[0])


def assert_same(a: Any, b: Any) -> None:
    """Equal in value, kind, shape, and what masks say of themselves."""
    for x, y in zip(*(made if isinstance(made, tuple) else (made,) for made in (a, b)), strict=True):
        if isinstance(x, BlockMask):
            assert [(type(n), n) for n in (x.q_len, x.kv_len)] == [(int, y.q_len), (int, y.kv_len)]
            assert (x.block, x.layout) == (y.block, y.layout)
        arrays = [getattr(made, "blocks", made) for made in (x, y)]
        assert type(arrays[0]) is type(arrays[1])
        assert arrays[0].dtype == arrays[1].dtype
        assert torch.equal(*map(torch.as_tensor, arrays))


def graphs(model: Callable[..., Any], *calls: Any, backend: str = "aot_eager", dynamic: bool | None = True) -> int:
    """How many graphs torch.compile makes of a model for these calls; every result is compared."""
    made = []

    def counting(graph: Any, examples: Any) -> Any:
        made.append(graph)
        return lookup_backend(backend)(graph, examples)

    traced = torch.compile(model, backend=counting, dynamic=dynamic, fullgraph=True)
    for call in calls:
        assert_same(traced(*call), model(*call))
    return len(made)


# -- the same results ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Neighbours(Policy):
    """A policy from outside the package: its own block first, and one share a head."""

    shares: tuple[float, ...] = (0.5, 0.75)
    bonus: float = 2.0

    def budget(self, q: Any, kv: Any, heads: int) -> Budget:
        kept = [max(1, round(share * kv.free_blocks)) for share in self.shares]
        return Budget(np.repeat([[n] for n in kept], q.free_blocks, axis=1))

    def prior(self, q: Any, kv: Any) -> np.ndarray:
        return np.where(np.eye(q.blocks, kv.blocks) > 0, self.bonus, 0.0).astype(np.float32)


@pytest.mark.parametrize(
    "settings",
    [
        {"sparsity": 0.3},
        {"sparsity": (0.3, 0.5)},
        {"policy": TopK(0.4, "paper")},
        {"policy": TopP(0.5, floor=0.2)},
        {"policy": Hybrid(0.5, 0.3)},
        {"policy": Neighbours((0.25, 0.5))},
        {"sparsity": 0.3, "return_lse": True, "return_mask": True},
        {"sparsity": 0.3, "return_lse": True, "omitted": "summary", "sink": None, "scale": 0.2},
        {"sink": ("first_frame_keys", "last_frame"), "window": (1, 8, 8), "order": "given", "block": (32, 64)},
        {"grid": None, "parts": [Grid(3, 8, 16, sink=None), rainfusion.Tokens(64), Text(64)], "return_mask": True},
    ],
    ids=str,
)
def test_attention_is_traced_whole(settings: dict[str, Any]) -> None:
    def model(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        return attention(q * 2, k, v, **settings)

    made, expected = compiled(model)(*tensors()), model(*tensors())
    assert_same(made, expected)
    outs = [x[0] if isinstance(x, tuple) else x for x in (made, expected)]
    assert outs[0].stride() == outs[1].stride()


def test_tokens_before_heads() -> None:
    q, k, v = (x.transpose(1, 2).contiguous() for x in tensors())
    arguments = {"sparsity": 0.3, "tensor_layout": "bshd", "return_lse": True, "return_mask": True}
    out, lse, mask = compiled(lambda *x: attention(*x, **arguments))(q, k, v)
    assert_same((out, lse, mask), attention(q, k, v, **arguments))
    assert lse.shape == (1, 2, 512)
    assert out.is_contiguous()


@once
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inductor's own
def test_inductor_compiles_it() -> None:
    def model(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, share: float) -> Any:
        out, mask = attention(q.transpose(2, 3).contiguous().transpose(2, 3), k, v, sparsity=share, return_mask=True)
        return out + 1, mask

    assert graphs(model, *[(*tensors(), share) for share in (0.2, 0.3, 0.4)], backend="inductor") == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_block_means_are_traced(dtype: torch.dtype) -> None:
    def model(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        settings = {"grid": GRID, "block": (32, 64)}
        return tuple(rainfusion.block_means(x, side=side, **settings) for x, side in ((q, "q"), (k, "kv")))

    assert_same(compiled(model)(*tensors(dtype=dtype)), model(*tensors(dtype=dtype)))


@pytest.mark.parametrize(
    "returns", [("%out",), ("%lse",), ("%out", "%lse"), ("%lse", "%mask", "%qb", "%kb", "%score")], ids=str
)
def test_a_lowered_plan_is_traced(returns: tuple[str, ...]) -> None:
    run = executable(*returns)
    assert_same(compiled(run)(*tensors()), run(*tensors()))


def test_lowered_plans_are_told_apart() -> None:
    runs = [executable(policy=TopK(share)) for share in (0.1, 0.3, 0.5)]
    assert graphs(lambda run, *x: run(*x), *[(run, *tensors()) for run in runs]) == 3
    assert graphs(lambda *x: runs[0](*x) - runs[2](*x), tensors()) == 1


def test_operands_are_inputs_of_the_graph() -> None:
    quotas = [torch.full((2, 6), n, dtype=torch.int32) for n in range(1, 6)]
    lengths = [torch.tensor([n]) for n in (512, 520, 540)]
    for run in (lambda q, k, v, n: attention(q, k, v, quotas=n), executable(quotas=True)):
        call = run if not isinstance(run, rainfusion.Executable) else lambda q, k, v, n, run=run: run(q, k, v, quotas=n)
        assert graphs(call, *[(*tensors(), n) for n in quotas]) == 1
        assert graphs(call, *[(*tensors(), n.numpy()) for n in quotas]) == 1

    def padded(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: Any) -> Any:
        return attention(q, k, v, text=28, kv_lengths=lengths, return_lse=True)

    assert graphs(padded, *[(*tensors(540), n) for n in lengths]) == 1
    assert graphs(padded, *[(*tensors(540), n.tolist()) for n in lengths]) == 1


@once
def test_numpy_works_as_it_does_uncompiled() -> None:
    def model(q: Any, k: Any, v: Any, share: Any, text: Any, height: Any) -> Any:
        grid = (4, height, 16)
        return attention(q, k, v, sparsity=share, text=text, grid=grid, return_mask=True)

    calls = [(*tensors(512 + n), np.float64(n / 10), np.int64(n), np.int64(8)) for n in range(3, 6)]
    assert graphs(model, *calls) <= 2
    assert graphs(model, *[(*[x.numpy() for x in call[:3]], *call[3:]) for call in calls]) <= 2
    share, text = calls[0][3:5]
    assert graphs(lambda *x: attention(*x, sparsity=share, text=text), tensors(515)) == 1  # not arguments: constants


# -- few graphs ------------------------------------------------------------------------------------

HEIGHTS = range(2, 14)


def of_height(height: int, text: int = 0) -> Tensors:
    return tensors(4 * height * 16 + text)


@once
def test_resolutions_share_a_graph() -> None:
    def model(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, grid: Any) -> Any:
        return attention(q, k, v, grid=grid, sparsity=0.3, return_lse=True, return_mask=True)

    calls = [(*of_height(height), (4, height, 16)) for height in HEIGHTS]
    assert graphs(model, *calls) <= 2
    assert graphs(model, *calls, dynamic=None) <= 2


@once
def test_lengths_of_text_share_a_graph() -> None:
    def model(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        return attention(q, k, v, text=q.shape[2] - 512, sparsity=0.3)

    calls = [tensors(512 + text) for text in range(12)]
    assert graphs(model, *calls) <= 2
    assert graphs(model, *calls, dynamic=None) <= 2


@once
def test_parts_share_a_graph() -> None:
    def inside(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, height: int) -> Any:
        return attention(q, k, v, grid=None, parts=(Text(height), Grid(4, height, 16)), return_mask=True)

    def outside(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, parts: Any) -> Any:
        return attention(q, k, v, grid=None, parts=parts, return_mask=True)

    assert graphs(inside, *[(*of_height(n, n), n) for n in HEIGHTS]) <= 2
    assert graphs(outside, *[(*of_height(n, n), (Text(n), Grid(4, n, 16))) for n in HEIGHTS]) <= 2


@once
def test_lengths_without_a_grid_share_a_graph() -> None:
    def model(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        return attention(q, k, v, grid=None, sparsity=0.3) + 1

    assert graphs(model, *[tensors(length) for length in (512, 700, 900)]) == 1


@once
@pytest.mark.parametrize("dynamic", [True, None])
def test_sparsities_share_a_graph(dynamic: bool | None) -> None:
    def model(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, share: float) -> Any:
        return attention(q, k, v, sparsity=share, scale=share, sink=None)

    calls = [(*tensors(), 0.05 * n) for n in range(1, 13)]
    assert graphs(model, *calls, dynamic=dynamic) <= 2


@once
def test_policies_share_a_graph() -> None:
    def outside(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, policy: Policy) -> Any:
        return attention(q, k, v, policy=policy, sink=None)

    def inside(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, share: float) -> Any:
        return attention(q, k, v, policy=Hybrid(share, 0.2), sink=None)

    shares = [0.05 * n for n in range(1, 13)]
    assert graphs(outside, *[(*tensors(), TopK(share)) for share in shares]) <= 2
    assert graphs(outside, *[(*tensors(), Neighbours((share, 0.5))) for share in shares]) <= 2
    assert graphs(inside, *[(*tensors(), share) for share in shares]) <= 2


@once
def test_masks_share_a_graph() -> None:
    def model(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, grid: Any, mask: BlockMask) -> Any:
        return attention(q, k, v, grid=grid, mask=mask, return_mask=True)

    calls = [(*of_height(n), (4, n, 16)) for n in HEIGHTS]
    assert graphs(model, *[(*call, select(*call[:2], grid=call[3])) for call in calls]) <= 2
    traced = torch.compile(lambda q, k, grid: select(q, k, grid=grid), backend="eager", dynamic=True, fullgraph=True)
    assert graphs(model, *[(*call, traced(*call[:2], call[3])) for call in calls]) <= 2


# -- masks -----------------------------------------------------------------------------------------


def test_a_given_mask_is_an_input_of_the_graph() -> None:
    _, mask = attention(*tensors(), sparsity=0.3, return_mask=True)
    other = BlockMask.from_bool(torch.ones_like(mask.blocks), 512, 512, (BLOCK, BLOCK))
    empty = BlockMask.from_bool(torch.zeros_like(mask.blocks), 512, 512, (BLOCK, BLOCK))
    traced = compiled(lambda q, k, v, mask: attention(q, k, v, mask=mask))
    for given in (mask, other, empty):
        assert_same(traced(*tensors(), given), attention(*tensors(), mask=given))


def test_a_mask_leaves_the_graph_and_enters_another() -> None:
    mask = compiled(lambda q, k, v: select(q, k, sparsity=0.3))(*tensors())
    expected = select(*tensors()[:2], sparsity=0.3)
    assert_same(mask, expected)
    assert_same(compiled(lambda *x: attention(*x[:3], mask=x[3]))(*tensors(), mask), attention(*tensors(), mask=mask))
    run = executable("%out", policy=rainfusion.Fixed())
    assert_same(compiled(lambda *x: run(*x[:3], mask=x[3]))(*tensors(), mask), run(*tensors(), mask=expected))


@once
def test_a_mask_that_left_a_graph_is_like_any_other(tmp_path: Path) -> None:
    mask = compiled(lambda q, k, v: select(q, k, sparsity=0.3))(*tensors())
    expected = select(*tensors()[:2], sparsity=0.3)
    assert type(mask) is BlockMask
    assert_same(pickle.loads(pickle.dumps(mask)), expected)
    assert_same(mask[:, 0], expected[:, 0])
    assert_same(mask[:, :, 1:3], expected[:, :, 1:3])
    assert_same(BlockMask.where([True, False], mask, expected), expected)
    assert_same(mask.packed().unpacked(), expected)
    assert repr(mask) == repr(expected)
    mask.save(tmp_path / "mask.npz")
    assert BlockMask.load(tmp_path / "mask.npz").layout == expected.layout
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        mask.nothing  # noqa: B018


@once
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")  # of array_api_compat
def test_masks_are_combined_inside_a_graph() -> None:
    def model(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: torch.Tensor) -> Any:
        sparse, dense = select(q, k, sparsity=0.5), select(q, k, sparsity=0.1)
        mask = BlockMask.where(heads, sparse, dense)
        return attention(q, k, v, mask=mask), mask, mask[:, 0]

    assert graphs(model, (*tensors(), torch.tensor([True, False])), dynamic=None) == 1


@once
def test_a_mask_is_a_tree_of_its_parts() -> None:
    mask = select(*tensors()[:2])
    leaves, spec = _pytree.tree_flatten({"mask": mask})
    assert_same(_pytree.tree_unflatten(leaves, spec)["mask"], mask)
    doubled = _pytree.tree_map_only(torch.Tensor, lambda x: ~x, mask)
    assert torch.equal(doubled.blocks, ~mask.blocks)
    _pytree.tree_map(lambda leaf: None, mask)  # anything may stand in for leaves


# -- what is wrong ---------------------------------------------------------------------------------


@once
def test_a_mask_in_another_order_is_refused_in_a_graph_too() -> None:
    _, mask = attention(*tensors(), sparsity=0.3, window=(1, 8, 8), return_mask=True)
    traced = compiled(lambda q, k, v, mask: attention(q, k, v, mask=mask, window=(1, 4, 16)))
    with pytest.raises(MaskError, match="another order"):
        traced(*tensors(), mask)


@once
def test_a_mask_of_another_length_is_refused_in_a_graph_too() -> None:
    mask = BlockMask.from_bool(torch.ones(1, 2, 8, 8, dtype=torch.bool), 512, 512, (64, 64))
    traced = compiled(lambda q, k, v, mask: attention(q, k, v, mask=mask, grid=None, block=128))
    with pytest.raises(MaskError, match="another problem"):
        traced(*tensors(1024), mask)


@once
@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"policy": "topk"}, "not a policy"),
        ({"mask": 7}, "give a BlockMask"),
        ({"block": (64, 7, 64)}, "not a tuple of 2"),
        ({"block": (64, 7, 64), "return_mask": True}, "not a plain whole number or two"),
        ({"sparsity": 1.5}, "out of range"),
        ({"sparsity": np.float64(1.5)}, "out of range"),
        ({"sink": np.zeros(3)}, "is not known"),
        ({"sink": object()}, "sink holds a object; a graph takes numbers"),
        ({"grid": (4, 8, 17)}, "makes 544 tokens"),
        ({"backend": "nothing"}, "nothing"),
        ({"kv_lengths": torch.ones(3, dtype=torch.int32)}, "give integers"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_refused_is_refused_in_a_graph_too(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(Exception, match=said):
        compiled(lambda *x: attention(*x, **wrong))(*tensors())


@once
def test_tensors_of_other_kinds_are_refused_in_a_graph_too() -> None:
    q, k, v = tensors()
    for arguments, said in (((q[0], k, v), "3 axes"), ((q, k, "v"), "v is a str"), ((q, k.double(), v), "one dtype")):
        with pytest.raises(Exception, match=said):
            compiled(attention)(*arguments)
    with pytest.raises(Exception, match="this plan takes"):
        compiled(executable("%out"))(*tensors(256))


@once
def test_derivatives_are_refused_in_a_graph_too() -> None:
    q, k, v = tensors()
    with torch.enable_grad(), pytest.raises(Exception, match="computes no derivatives"):
        compiled(attention)(q.requires_grad_(), k, v)


# -- other tracers and modes -----------------------------------------------------------------------


def test_a_call_while_another_thread_exports_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Export raises torch's flag for the whole process, also for threads that trace nothing."""
    settings = {"sparsity": 0.3, "policy": None, "return_lse": True, "return_mask": True, "sink": ["first_frame"]}
    run, model = executable("%out", "%mask"), lambda: attention(*tensors(), **settings)
    expected, expected_of_run = model(), run(*tensors())
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    made, made_by_run = model(), run(*tensors())
    monkeypatch.undo()
    assert_same(made, expected)
    assert_same(made_by_run, expected_of_run)


def test_fake_tensors_are_refused_and_leave_nothing_behind() -> None:
    rainfusion.cache.clear()
    q, k, v = tensors()
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(x) for x in (q, k, v)]
        for call in (attention, lambda *x: select(*x[:2])):
            with pytest.raises(ProblemError, match=r"torch\.compile and torch\.export"):
                call(*fakes)
    with FakeTensorMode(), pytest.raises(ProblemError, match=r"torch\.compile and torch\.export"):
        attention(q, k, v)
    expected = attention(q.double(), k.double(), v.double()).float()
    assert torch.allclose(attention(q, k, v), expected, atol=1e-5)


def test_other_tracers_are_refused_and_leave_nothing_behind() -> None:
    rainfusion.cache.clear()
    q, k, v = tensors()
    for traced in (
        lambda: make_fx(lambda q: attention(q, k, v))(q),
        lambda: torch.func.functionalize(lambda q: attention(q, k, v))(q),
    ):
        with pytest.raises(ProblemError, match=r"torch\.compile and torch\.export"):
            traced()
    expected = attention(q.double(), k.double(), v.double()).float()
    assert torch.allclose(attention(q, k, v), expected, atol=1e-5)


def test_a_first_call_under_inference_mode_serves_later_ones() -> None:
    rainfusion.cache.clear()
    model = compiled(lambda *x: attention(*x, return_lse=True))
    with torch.inference_mode():
        model(*tensors())
    assert_same(model(*tensors()), attention(*tensors(), return_lse=True))


# -- graphs that outlive what they were made from --------------------------------------------------


def recorded(model: Callable[..., Any], *arguments: Any) -> tuple[Any, ...]:
    """The arguments of the operator in the graph of a model."""
    calls = []

    def keep(graph: torch.fx.GraphModule, examples: Any) -> Any:
        class Watch(torch.fx.Interpreter):
            def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
                if "rainfusion" in str(target):
                    calls.append(args)
                return super().call_function(target, args, kwargs)

        return lambda *x: Watch(graph).run(*x)

    torch.compile(model, backend=keep, fullgraph=True)(*arguments)
    (call,) = calls
    return tuple(call)


def test_the_operator_keeps_torchs_rules() -> None:
    run = executable("%out", "%lse", "%mask")
    calls: list[Callable[..., Any]] = [run, lambda *x: attention(*x, return_mask=True), lambda *x: select(*x[:2])]
    for call in calls:
        torch.library.opcheck(OPERATOR, recorded(call, *tensors()))


def test_results_have_memory_of_their_own() -> None:
    run = executable("%out")
    plan = rainfusion.Plan(run.plan.problem, run.plan.layout, run.plan.ops, ("%q", "%out", "%out"))
    q, k, v = tensors()
    made = compiled(rainfusion.lower(plan, like=q))(q, k, v)
    assert made[0].data_ptr() not in {x.data_ptr() for x in (q, *made[1:])}
    assert torch.equal(made[0], q)


def test_a_graph_may_outlive_its_executable() -> None:
    run = executable("%out")
    call, expected = recorded(run, *tensors()), run(*tensors())
    rainfusion.cache.clear()
    del run
    gc.collect()
    (out,) = OPERATOR(*call)
    assert torch.equal(out, expected)


def test_executables_pickle() -> None:
    run = executable("%out", "%mask", policy=Neighbours())
    again = pickle.loads(pickle.dumps(run))
    assert again is run  # of one process: from its cache
    rainfusion.cache.clear()
    other = pickle.loads(pickle.dumps(run))
    assert other is not run
    assert_same(other(*tensors()), run(*tensors()))
    assert_same(compiled(other)(*tensors()), run(*tensors()))


class Model(torch.nn.Module):
    """Attention over a fixed grid and text of any length, with what else a test asks for."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.project = torch.nn.Linear(32, 32)
        self.settings = settings

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: BlockMask | None = None) -> Any:
        text = q.shape[2] - 512
        layout = {"grid": None, "parts": (Grid(*GRID), Text(text))} if "parts" in self.settings else {"text": text}
        settings = {name: value for name, value in self.settings.items() if name != "parts"}
        return attention(self.project(q), k, v, mask=mask, **layout, **settings)


@once
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(
    "settings",
    [{"sparsity": 0.3, "return_lse": True}, {"parts": True, "return_mask": True}, {"policy": Neighbours()}],
    ids=str,
)
def test_export_with_text_of_any_length(settings: dict[str, Any], strict: bool, tmp_path: Path) -> None:
    model = Model(**settings).eval()
    shape = {0: Dim("batch", max=8), 2: Dim("tokens", min=512, max=4096)}
    with torch.enable_grad():  # as most export: parameters require gradients, and nobody takes them
        program = export(model, tuple(tensors(540, batch=2)), dynamic_shapes=dict.fromkeys("qkv", shape), strict=strict)
    torch.export.save(program, tmp_path / "program.pt2")
    loaded = torch.export.load(tmp_path / "program.pt2").module()
    for length, batch in ((540, 2), (513, 1), (700, 3)):
        given = tensors(length, batch=batch)
        assert_same(loaded(*given), model(*given))


@pytest.mark.parametrize("strict", [False, True])
def test_export_with_a_mask(strict: bool, tmp_path: Path) -> None:
    model, given = Model().eval(), tensors(540)
    mask = select(*given[:2], text=28)
    torch.export.save(export(model, (*given, mask), strict=strict), tmp_path / "program.pt2")
    loaded = torch.export.load(tmp_path / "program.pt2").module()
    for other in (mask, select(*given[:2], text=28, sparsity=0.1)):
        assert_same(loaded(*given, other), model(*given, other))


def test_exported_graphs_compute_the_same_elsewhere(tmp_path: Path) -> None:
    class Both(torch.nn.Module):
        def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
            return run(q, k, v) + 1, attention(q, k, v, return_mask=True, backend=run.backend.name)

    run = executable("%out")
    q, k, v = tensors()
    torch.export.save(export(Both(), (q, k, v)), tmp_path / "graph.pt2")
    made, (out, mask) = Both()(q, k, v)
    torch.save((q, k, v, made, out, mask.blocks, mask.layout.to_dict()), tmp_path / "tensors.pt")
    elsewhere = (
        "import sys, torch, rainfusion, rainfusion.compile\n"
        "q, k, v, *expected, layout = torch.load(sys.argv[2])\n"
        "rainfusion.attention(q, k, v, sparsity=0.0, backend='reference')\n"  # other plans come first there
        "made, (out, mask) = torch.export.load(sys.argv[1]).module()(q, k, v)\n"
        "assert all(map(torch.equal, (made, out, mask.blocks), expected))\n"
        "assert mask.layout == rainfusion.TokenLayout.from_dict(layout)\n"
    )
    files = (str(tmp_path / "graph.pt2"), str(tmp_path / "tensors.pt"))
    subprocess.run([sys.executable, "-W", "ignore", "-c", elsewhere, *files], check=True)


@once
def test_layouts_that_do_not_exist_are_refused_in_a_graph_too() -> None:
    with pytest.raises(LayoutError, match="needs a grid"):
        compiled(lambda *x: attention(*x, grid=None, text=3))(*tensors())
