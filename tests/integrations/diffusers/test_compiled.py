"""rainfusion in models that torch.compile compiles: the same numbers, and no graph a step, layer, budget or size."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from rainfusion.integrations.diffusers import apply_rainfusion, register_adapter
from tests.integrations.diffusers.own import OWN, Own, own_model
from tests.integrations.diffusers.pipelines import LAYERS, happened, inputs, kinds, run, settings, wan, wan_pipeline

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("as_pipelines_run"),
    # Of torch itself, while it compiles.
    pytest.mark.filterwarnings(
        "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:The .grad attribute:UserWarning"
    ),
]


@pytest.fixture(autouse=True)
def fresh():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture
def graphs():
    """A backend that counts the graphs it is given."""
    return CompileCounterWithBackend("aot_eager")


def close(one, other):
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("when", ["before", "after"])
def test_blocks_as_whole_graphs(graphs, when):
    """Steps, layers, budgets, kept masks and dense steps are no part of the graph."""
    config = settings(
        sparsity={0: 0.4, 1: 0.6, 2: 0.7},
        sparsity_from_step={4: 0.5, 5: 0.8},
        dense_steps=(1, 1),
        dense_layers=(2,),
        refresh_every=2,
    )
    eager = wan_pipeline()
    expected = apply_rainfusion(eager, config)
    latents = run(eager, 8)
    pipe = wan_pipeline()
    if when == "after":
        handle = apply_rainfusion(pipe, config)
    pipe.transformer.compile_repeated_blocks(fullgraph=True, backend=graphs)
    if when == "before":
        handle = apply_rainfusion(pipe, config)
    close(run(pipe, 8), latents)
    assert graphs.frame_count == 1
    for layer in range(LAYERS):
        assert happened(handle.report(), layer) == happened(expected.report(), layer)
    assert {*kinds(handle.report())} == {"dense", "sparse", "reused"}
    run(pipe, 8)
    assert graphs.frame_count == 1
    if when == "after":
        handle.remove()
        close(run(pipe, 2), run(wan_pipeline(), 2))


def test_drift_is_read_when_the_graph_runs(graphs):
    config = settings(refresh_every=9, reuse_drift=0.6)
    eager, pipe = wan_pipeline(), wan_pipeline()
    expected, handle = (apply_rainfusion(one, config) for one in (eager, pipe))
    pipe.transformer.compile_repeated_blocks(fullgraph=True, backend=graphs)
    close(run(pipe, 5), run(eager, 5))
    assert graphs.frame_count == 1
    assert [row.reused for row in handle.report().rows] == [row.reused for row in expected.report().rows]
    assert 0 < handle.report().reused < 0.8


def test_sizes_do_not_multiply_graphs(graphs):
    model = wan()
    apply_rainfusion(model, settings())
    model.compile_repeated_blocks(fullgraph=True, dynamic=True, backend=graphs)
    eager = wan()
    apply_rainfusion(eager, settings())
    counts = []
    for frames, height, width, text in [(3, 8, 8, 7), (3, 6, 10, 9), (4, 9, 7, 5)]:
        arguments = inputs(frames, height, width, text)
        close(model(**arguments)[0], eager(**arguments)[0])
        counts.append(graphs.frame_count)
    assert counts[0] <= 2
    assert counts[-1] == counts[0]


def test_a_whole_model_with_graph_breaks(graphs):
    """Compiled before rainfusion is applied, which finds the model inside."""
    model, eager = wan(num_layers=1), wan(num_layers=1)
    apply_rainfusion(eager, settings(dense_steps=(1, 0)))
    whole = torch.compile(model, backend=graphs)
    handle = apply_rainfusion(whole, settings(dense_steps=(1, 0)))
    for step in (900, 600, 300):
        close(whole(**inputs(step=step))[0], eager(**inputs(step=step))[0])
    assert kinds(handle.report()) == ["dense", "sparse", "sparse"]
    first = graphs.frame_count
    assert first > 0
    whole(**inputs(step=100))
    assert graphs.frame_count == first


@pytest.fixture
def own(own_adapters):
    """A model whose processors call torch's own function, and a forward's argument."""
    register_adapter(Own, OWN)
    return own_model(), torch.randn(1, 133, 32, generator=torch.Generator().manual_seed(0))


def test_a_model_compiled_in_place(graphs, own):
    model, tokens = own
    handle = apply_rainfusion(model, settings())
    expected = model(tokens)
    model.compile(backend=graphs)
    close(model(tokens), expected)
    assert graphs.frame_count > 0
    assert kinds(handle.report()) == ["sparse", "sparse"]


def as_whole_graphs(model, backend):
    for block in model.blocks:
        block.compile(fullgraph=True, backend=backend)


def test_processors_that_call_torch(graphs, own):
    model, tokens = own
    handle = apply_rainfusion(model, settings())
    expected = model(tokens)
    as_whole_graphs(model, graphs)
    close(model(tokens), expected)
    assert graphs.frame_count == 1
    assert kinds(handle.report()) == ["sparse", "sparse"]


def test_a_wanted_gradient_is_refused(graphs, own):
    model, tokens = own
    apply_rainfusion(model, settings())
    as_whole_graphs(model, graphs)
    with torch.enable_grad(), pytest.raises(Exception, match="a gradient is wanted, and sparse attention has none"):
        model(tokens).sum().backward()
    model(tokens)


def test_gradients_are_those_of_dense_attention_where_that_is_asked_for(graphs, own):
    gradients = []
    for compiled in (False, True):
        model, tokens = own_model(), own[1]
        if compiled:
            apply_rainfusion(model, settings(on_grad="dense"))
            as_whole_graphs(model, graphs)
        with torch.enable_grad():
            model(tokens).square().mean().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)


def test_an_error_inside_a_graph_leaves_nothing_behind(graphs, own):
    model, tokens = own
    apply_rainfusion(model, settings())
    as_whole_graphs(model, graphs)
    expected = model(tokens)
    with pytest.raises(Exception, match="does not hold the parts"):
        model(tokens[:, :60])
    assert torch.equal(model(tokens), expected)
