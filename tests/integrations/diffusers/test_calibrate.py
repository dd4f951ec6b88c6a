"""Calibrating models of diffusers: what is measured, what budgets do, and that models stay as they were."""

from __future__ import annotations

import warnings

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

import rainfusion
from rainfusion.core.errors import RainfusionWarning
from rainfusion.integrations.diffusers import (
    Calibration,
    CalibrationError,
    ConfigError,
    RainFusionConfig,
    apply_rainfusion,
    calibrate,
    register_adapter,
)
from rainfusion.integrations.diffusers.identity import digest_of
from rainfusion.integrations.diffusers.replay import Forward, Spread, copied
from tests.integrations.diffusers.own import OWN, own_model
from tests.integrations.diffusers.pipelines import (
    LAYERS,
    Nameless,
    inputs,
    kinds,
    run,
    settings,
    wan,
    wan_pipeline,
)

pytestmark = pytest.mark.usefixtures("as_pipelines_run")

SHARES = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
QUICK = {"sparsity": 0.5, "shares": SHARES, "every": 1, "probes": 2, "progress": False}
SIZES = {"height": 128, "width": 128, "num_frames": 9, "num_inference_steps": 4, "output_type": "latent"}
BLOCKS = {"window": (1, 4, 4)}


def built():
    """A model whose heads differ: of each layer one attends to few tokens, the other to nearly all."""
    model = wan()
    for block in model.blocks:
        weight = block.attn1.norm_q.weight
        weight[:32], weight[32:] = 12.0, 0.05
        block.attn1.to_out[0].weight.mul_(4)
    return model


def smooth(seed):
    """Arguments of a forward whose latents are nearly alike inside a block."""
    random = torch.Generator().manual_seed(seed)
    coarse = torch.randn(1, 4, 3, 4, 4, generator=random).repeat_interleave(4, 3).repeat_interleave(4, 4)
    return inputs(seed=seed) | {"hidden_states": coarse + 0.05 * torch.randn(coarse.shape, generator=random)}


def loop_of(model, contexts=1):
    """A denoising loop of one's own, for seeds in place of prompts."""

    def loop(seed):
        for t in (900, 600, 300):
            for _ in range(contexts):
                model(**smooth(seed) | {"timestep": torch.full((1,), t)})

    return loop


def embeddings(seed):
    random = torch.Generator().manual_seed(seed)
    prompt, negative = (torch.randn(1, 7, 16, generator=random) for _ in range(2))
    return {"prompt_embeds": prompt, "negative_prompt_embeds": negative}


def hooks(model):
    return [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules()]


# -- what is measured, and what follows ----------------------------------------------------------------


def test_budgets_of_a_bare_model_err_less_than_one_share_and_realise_the_mean():
    model = built()
    before, expected = hooks(model), model(**smooth(0))[0]
    found = calibrate(model, [0, 1], run=loop_of(model), config=settings(**BLOCKS), **QUICK)
    table = found.tables[0]
    assert hooks(model) == before
    assert torch.equal(model(**smooth(0))[0], expected)
    assert (table.name, table.binding.grids, table.calls) == ("WanTransformer3DModel", ("3x8x8",), 2 * 3 * LAYERS)
    assert (found.prompts, found.sparsity, table.checked.forwards) == (2, 0.5, 2)
    assert table.checked.budgets < 0.9 * table.checked.uniform
    assert table.predicted(table.uniform(0.5)) == pytest.approx(table.checked.uniform, rel=0.4)
    heads = found.budget().models[0].shares
    assert all(layer[0] < layer[1] for layer in heads)
    with apply_rainfusion(model, settings(sparsity=found, **BLOCKS)) as handle:
        model(**smooth(0))
    report = handle.report()
    assert report.count(kind="sparse") == LAYERS
    assert report.density == pytest.approx(0.5, abs=0.5 / 12**2)  # exact to half a block pair
    assert Calibration.from_json(found.to_json()) == found


def test_the_weights_are_of_the_output():
    """A layer whose attention reaches the output ten times as much has a weight a hundred times as large."""
    weights = {}
    for factor in (1.0, 0.1):
        model = built()
        model.blocks[-1].attn1.to_out[0].weight.mul_(factor)
        model.blocks[-1].attn1.to_out[0].bias.zero_()
        table = calibrate(model, [0], run=loop_of(model), config=settings(**BLOCKS), **QUICK).tables[0]
        weights[factor] = table.weights
    assert weights[0.1][-1] == pytest.approx(0.01 * weights[1.0][-1], rel=0.5)
    model = built()
    plain = calibrate(model, [0], run=loop_of(model), config=settings(**BLOCKS), sensitivity=False, **QUICK)
    assert plain.tables[0].weights == (1.0,) * LAYERS
    assert plain.tables[0].checked is not None
    none = calibrate(model, [0], run=loop_of(model), config=settings(**BLOCKS), **QUICK | {"probes": 0})
    assert none.tables[0].checked is None
    assert none.tables[0].errors == plain.tables[0].errors


def test_experts_of_a_pipeline_have_a_table_each():
    pipe = wan_pipeline(2)
    config = settings(dense_steps=(1, 0))
    prompts = [embeddings(0), embeddings(1)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RainfusionWarning)  # of models with random weights, budgets may do no better
        found = calibrate(pipe, prompts, config=config, **SIZES, **QUICK)
    assert [(table.name, table.calls) for table in found.tables] == [
        ("transformer", 2 * 1 * 2 * LAYERS),  # prompts, steps, contexts; the first step is dense
        ("transformer_2", 2 * 2 * 2 * LAYERS),
    ]
    with apply_rainfusion(pipe, settings(sparsity=found)) as handle:
        run(pipe)
    assert {*kinds(handle.report())} == {"sparse"}
    with pytest.raises(
        ConfigError, match="budgets of transformer, transformer_2, and none is of 'WanTransformer3DModel'"
    ):
        apply_rainfusion(pipe.transformer, settings(sparsity=found))


@pytest.mark.parametrize("contexts", [1, 2])
def test_every_so_many_steps_are_measured_with_all_their_contexts(contexts):
    model = wan()
    found = calibrate(model, [0], run=loop_of(model, contexts), config=settings(), **QUICK | {"every": 2, "probes": 0})
    assert found.tables[0].calls == 2 * contexts * LAYERS  # steps 0 and 2


def test_layers_that_are_dense_by_configuration_have_no_errors():
    model = built()
    config = settings(dense_layers=(0,), **BLOCKS)
    found = calibrate(model, [0], run=loop_of(model), config=config, **QUICK)
    assert found.tables[0].errors[0] is None
    budgets = found.budget().models[0]
    assert budgets.shares[0] == (0.0, 0.0)
    assert budgets.sparsity == pytest.approx(0.5 * (LAYERS - 1) / LAYERS)


def test_text_prompts_are_given_to_the_pipeline():
    class Pipeline(Nameless):
        def __call__(self, prompt, steps):
            prompts.append(prompt)
            return super().__call__(steps, seed=len(prompt))

    prompts, pipe = [], Pipeline(FlowMatchEulerDiscreteScheduler())
    calibrate(
        pipe, iter(["a cat", {"prompt": "a dog", "steps": 3}]), config=settings(), steps=2, **QUICK | {"probes": 0}
    )
    assert prompts == ["a cat", "a dog"]


def test_own_models_with_padded_text(own_adapters):
    register_adapter("Own", OWN)
    model = own_model()
    tokens = torch.randn(2, 133, 32)
    mask = torch.ones(2, 1, 1, 133, dtype=torch.bool)
    mask[1, :, :, 130:] = False

    def loop(scale):
        model(scale * tokens, mask)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RainfusionWarning)  # of random weights, budgets may do no better
        found = calibrate(model, [1, 2], run=loop, config=settings(), **QUICK | {"shares": (0.3, 0.5, 0.7)})
    assert found.tables[0].calls == 2 * 2
    with apply_rainfusion(model, settings(sparsity=found)) as handle:
        loop(1)
    assert kinds(handle.report()) == ["sparse"]


def test_shares_beyond_reach_are_left_out_with_a_warning():
    model = built()
    with pytest.warns(RainfusionWarning, match=r"shares of 0\.95 cannot be reached beside what every row keeps"):
        found = calibrate(
            model, [0], run=loop_of(model), config=settings(**BLOCKS), **QUICK | {"shares": (0.3, 0.5, 0.7, 0.95)}
        )
    assert found.tables[0].shares == (0.3, 0.5, 0.7)


def test_budgets_that_do_no_better_are_said(monkeypatch):
    model = built()
    monkeypatch.setattr(
        rainfusion.integrations.calibration,
        "shares_of_heads",
        lambda e, *_: 0.5 + 0.3 * torch.tensor([1, -1]).expand(len(e), 2).numpy(),
    )
    with pytest.warns(RainfusionWarning, match="keep one share, or calibrate with more prompts"):
        calibrate(model, [0], run=loop_of(model), config=settings(**BLOCKS), **QUICK)


# -- where budgets do not fit --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def calibration():
    with torch.no_grad():
        model = built()
        return calibrate(model, [0], run=loop_of(model), config=settings(**BLOCKS), **QUICK)


def test_another_model_is_refused_and_stays_as_it_was(calibration):
    model = wan(ffn_dim=32)
    before = hooks(model)
    with pytest.raises(ConfigError, match="for a WanTransformer3DModel of another configuration"):
        apply_rainfusion(model, settings(sparsity=calibration, **BLOCKS))
    with pytest.raises(ConfigError, match=r"block=\(16, 16\), not \(8, 8\)"):
        apply_rainfusion(wan(), settings(sparsity=calibration, **BLOCKS | {"block": 8}))
    assert hooks(model) == before


def test_budgets_of_one_model_do_not_serve_two(calibration):
    pipe = wan_pipeline(experts=2)
    with pytest.raises(ConfigError, match="are of one model, and these are 2: transformer, transformer_2; calibrate"):
        apply_rainfusion(pipe, settings(sparsity=calibration, **BLOCKS))
    apply_rainfusion(pipe.transformer_2, settings(sparsity=calibration, **BLOCKS)).remove()


def test_earlier_budgets_in_the_configuration_are_not_read(calibration):
    config = settings(sparsity=calibration, sparsity_from_step={1: calibration.budget(0.7)}, block=32, sink="auto")
    model = built()
    found = calibrate(model, [0], run=loop_of(model), config=config, **QUICK | {"probes": 0})
    assert (found.tables[0].binding.block, found.tables[0].calls) == ((32, 32), 3 * LAYERS)


def test_another_grid_is_said_once_and_used(calibration):
    model = built()
    with apply_rainfusion(model, settings(sparsity=calibration, **BLOCKS)) as handle:
        with pytest.warns(RainfusionWarning, match="measured on 3x8x8, and this is 4x8x8; they are used as they are"):
            model(**inputs(4))
        model(**inputs(4))
    assert kinds(handle.report()) == ["sparse"] * 2


def test_other_omitted_blocks_are_said(calibration):
    with pytest.warns(RainfusionWarning, match="measured with omitted='drop' and are used with omitted='summary'"):
        apply_rainfusion(built(), settings(sparsity=calibration, omitted="summary", **BLOCKS))


def test_a_digest_is_of_the_models_own_configuration():
    one, other = wan(0), wan(1)
    assert digest_of(one) == digest_of(other)
    one.register_to_config(_name_or_path="/somewhere", _diffusers_version="9", quantization_config={"bits": 8})
    assert digest_of(one) == digest_of(other)
    assert digest_of(one) != digest_of(wan(ffn_dim=32))
    assert digest_of(torch.nn.Linear(1, 1)) == digest_of(torch.nn.ReLU())


# -- what goes wrong -----------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("forwards", [2, 9])
def test_a_failure_leaves_the_pipeline_as_it_was(error, forwards):
    """In the run, and in the forwards after it."""
    pipe = wan_pipeline()
    pipe.set_progress_bar_config(desc="mine", disable=True)
    before, expected, count = hooks(pipe.transformer), run(pipe), 0

    def fail(*_):
        nonlocal count
        count += 1
        if count == forwards:
            raise error("stop")

    hook = pipe.transformer.proj_out.register_forward_pre_hook(fail)
    with pytest.raises(error, match="stop"):
        calibrate(pipe, [embeddings(0)], config=settings(), **SIZES, **QUICK | {"progress": True})
    hook.remove()
    assert hooks(pipe.transformer) == before
    assert pipe._progress_bar_config == {"desc": "mine", "disable": True}
    assert torch.equal(run(pipe), expected)
    apply_rainfusion(pipe, settings()).remove()


def test_calls_that_were_all_dense_are_told_with_the_reason():
    model = wan()
    with pytest.raises(
        CalibrationError, match="nothing was measured of WanTransformer3DModel: its calls were dense: small"
    ):
        calibrate(model, [0], run=loop_of(model), config=settings(min_blocks=99), **QUICK)
    with pytest.raises(CalibrationError, match="it was not called"):
        calibrate(model, [0], run=lambda seed: None, config=settings(), **QUICK)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"prompts": "a cat"}, r"prompts='a cat' is not a list of prompts; give \['a cat'\]"),
        ({"prompts": 3}, "prompts=3 is not a list"),
        ({"prompts": []}, "prompts is empty"),
        ({"prompts": [3]}, "the prompt 3 is neither a text nor a mapping of arguments; give run=function"),
        ({"sparsity": 0}, "sparsity=0 skips nothing"),
        ({"sparsity": 1}, "sparsity=1 is out of range"),
        ({"shares": (0.9, 0.5)}, "do not ascend"),
        ({"shares": ()}, "shares has 0 items"),
        ({"every": 0}, "every=0 is not allowed"),
        ({"probes": -1}, "probes=-1 is not allowed"),
        ({"ranks": 3}, "ranks=3 does not divide the 2 heads"),
        ({"progress": "yes"}, "progress='yes' is not a truth value"),
        ({"run": 3}, "run=3 is not a function of a prompt"),
        ({"run": print}, "num_inference_steps, output_type: arguments of a pipeline, which run takes the place of"),
        ({"config": {"block": 16}}, "config={'block': 16} is a dict; give a RainFusionConfig"),
        ({"config": settings(sink="first_frame"), "sparsity": 0.9}, r"sparsity=0\.9 cannot be reached"),
    ],
)
def test_what_does_not_fit_is_refused(arguments, said):
    pipe = wan_pipeline()
    given = {"prompts": [embeddings(0)], "config": settings()} | SIZES | QUICK | arguments
    if given.get("run") not in (None, print):
        given.pop("num_inference_steps")
    with pytest.raises((ConfigError, CalibrationError), match=said):
        calibrate(pipe, **given)
    apply_rainfusion(pipe, settings()).remove()


def test_a_bare_model_needs_a_function_that_runs_it():
    for target in (wan(), [wan()]):
        with pytest.raises(ConfigError, match="is no pipeline that can be called with a prompt; give run=function"):
            calibrate(target, ["a cat"])


# -- forwards run again --------------------------------------------------------------------------------


@pytest.mark.parametrize("forwards", [1, 2, 5, 6, 7, 40, 101])
def test_kept_forwards_are_few_and_spread(forwards):
    spread, most = Spread(3), 0
    for number in range(forwards):
        spread.add(number if spread.wants_next else None)
        most = max(most, len(spread._kept))
    chosen = spread.chosen()
    assert most < 9
    assert len(chosen) == min(3, forwards)
    assert chosen == sorted({*chosen})
    assert chosen[0] == 0
    if forwards >= 3:
        assert chosen[-1] >= 0.5 * forwards - 2
        assert [number % 2 for number in chosen] == [0, 1, 0]  # contexts that take turns
    assert not Spread(0).wants_next


def test_arguments_are_copied_and_autocast_is_kept():
    model, seen = torch.nn.Linear(2, 2), []
    x = torch.zeros(1, 2)
    with torch.autocast("cpu", torch.bfloat16):
        forward = Forward.of(model, (x,), {}, None)
    x += 1
    assert forward.run(model).dtype == torch.bfloat16
    assert torch.equal(forward.run(model).float(), model.bias.bfloat16().float()[None])
    nested = {"a": [x, (x,)], "b": "text"}
    twin = copied(nested)
    assert twin["b"] == "text"
    assert torch.equal(twin["a"][1][0], x)
    assert twin["a"][0] is not x
    model.register_forward_pre_hook(lambda _, args: seen.append(args[0].data_ptr()))
    forward.run(model)
    assert seen[0] != forward.args[0].data_ptr()  # a model may write into its arguments


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:The .grad attribute:UserWarning"
)
def test_a_compiled_model_gives_the_same_and_budgets_are_no_part_of_the_graph():
    from torch._dynamo.testing import CompileCounterWithBackend

    torch.compiler.reset()
    graphs, model, eager = CompileCounterWithBackend("aot_eager"), built(), built()
    model.compile_repeated_blocks(fullgraph=True, backend=graphs)
    given = {"config": settings(**BLOCKS)} | QUICK
    found, expected = (calibrate(m, [0], run=loop_of(m), **given) for m in (model, eager))
    torch.testing.assert_close(
        torch.tensor(found.tables[0].errors), torch.tensor(expected.tables[0].errors), rtol=1e-3, atol=1e-7
    )
    with (
        apply_rainfusion(model, settings(sparsity=expected, **BLOCKS)),
        apply_rainfusion(eager, settings(sparsity=expected, **BLOCKS)),
    ):
        torch.testing.assert_close(model(**smooth(0))[0], eager(**smooth(0))[0], rtol=1e-4, atol=1e-5)
    assert graphs.frame_count <= 2  # one for the processors of calibration, one for those after it
    torch.compiler.reset()


def test_a_configuration_with_budgets_is_in_the_report(calibration):
    model = built()
    with apply_rainfusion(model, settings(sparsity=calibration, **BLOCKS)) as handle:
        model(**smooth(0))
    report = type(handle.report()).from_json(handle.report().to_json())
    assert report.config.sparsity == calibration.budget()
    assert RainFusionConfig.from_json(handle.config.to_json()) == handle.config
