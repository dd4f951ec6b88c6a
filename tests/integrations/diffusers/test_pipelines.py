"""Pipelines that share, swap and lose what they are made of, and what cannot be known of a model."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import nn

from rainfusion.core.errors import RainfusionWarning, UnknownBackendError
from rainfusion.integrations.diffusers import ConfigError, UnknownModelError, apply_rainfusion, register_adapter
from rainfusion.integrations.diffusers.models._sizes import _kept, hides_end_only, once
from tests.integrations.diffusers.own import OWN, own_model
from tests.integrations.diffusers.pipelines import (
    LAYERS,
    Nameless,
    happened,
    inputs,
    kinds,
    run,
    settings,
    wan,
    wan_pipeline,
)

pytestmark = pytest.mark.usefixtures("as_pipelines_run")


@pytest.fixture
def pipe():
    return Nameless(FlowMatchEulerDiscreteScheduler())


def test_a_model_of_two_pipelines_follows_the_one_that_runs(pipe):
    other = Nameless(FlowMatchEulerDiscreteScheduler())
    other.components["transformer"] = other.transformer = pipe.transformer
    handle = apply_rainfusion(pipe, settings(dense_steps=(2, 0)))
    for runs in (other, pipe, other):
        runs(4)
    assert kinds(handle.report()) == ["dense", "dense", "sparse", "sparse"] * 3


def test_masks_of_an_interrupted_run_are_not_those_of_the_next(pipe):
    handle = apply_rainfusion(pipe, settings(refresh_every=4))
    pipe(4, stop=1)
    out = pipe(4, seed=7)
    assert [row[1:] for row in happened(handle.report())][1:] == [
        (1, 0, "", "sparse"),
        (1, 1, "", "reused"),
        (1, 2, "", "reused"),
        (1, 3, "", "reused"),
    ]
    fresh = Nameless(FlowMatchEulerDiscreteScheduler())
    apply_rainfusion(fresh, settings(refresh_every=4))
    assert torch.equal(out, fresh(4, seed=7))


def test_an_own_loop_can_say_that_its_run_is_over():
    model = wan()
    handle = apply_rainfusion(model, settings(dense_steps=(1, 0)))
    model(**inputs(step=900))
    handle.reset()
    for step in (600, 300):
        model(**inputs(step=step))
    assert [row[1:] for row in happened(handle.report())] == [
        (0, 0, "", "dense"),
        (1, 0, "", "dense"),
        (1, 1, "", "sparse"),
    ]


def test_the_number_of_steps_is_the_hosts_where_it_says_one():
    pipe = wan_pipeline()
    handle = apply_rainfusion(pipe, settings(dense_steps=(0, 1), num_steps=50))
    run(pipe, steps=4)
    assert kinds(handle.report(), context="cond") == ["sparse", "sparse", "sparse", "dense"]


def test_a_noise_level_by_another_name(own_adapters):
    model, x = own_model(), torch.randn(1, 140, 32)
    register_adapter("Own", replace(OWN, timestep="sigma"))
    with pytest.raises(ConfigError, match="does not tell; give the pipeline, or name the argument"):
        apply_rainfusion(model, settings(dense_steps=(1, 0)))
    register_adapter("Own", OWN)
    handle = apply_rainfusion(model, settings(dense_steps=(1, 0)))
    for level in (0.9, 0.9, 0.4):
        model(x, timestep=torch.tensor([level]))
    assert [row[2:] for row in happened(handle.report())] == [(0, "", "dense"), (0, "#2", "dense"), (1, "", "sparse")]


def test_a_denoiser_that_is_not_known_is_named():
    pipe = wan_pipeline()
    components = {**pipe.components, "transformer_2": nn.Sequential(nn.Linear(2, 2))}
    several = type("Several", (), {"components": components, "scheduler": pipe.scheduler})()
    with pytest.warns(RainfusionWarning, match="transformer_2 of the pipeline stays dense: Sequential is not known"):
        apply_rainfusion(several, settings())


def test_a_model_under_two_names_of_a_pipeline_is_one():
    model = wan()
    pipe = type("Twice", (), {"components": {"transformer": model, "transformer_2": model}, "scheduler": None})()
    handle = apply_rainfusion(pipe, settings())
    model(**inputs())
    assert handle.report().layers == {"transformer": LAYERS}
    assert len(handle.report().rows) == LAYERS


def test_a_refusal_for_one_model_leaves_the_others_as_they_are(own_adapters):
    register_adapter("Own", replace(OWN, timestep="sigma"))
    model = wan()
    with pytest.raises(ConfigError, match="does not tell"):
        apply_rainfusion([model, own_model()], settings(dense_steps=(1, 0)))
    assert not model._forward_pre_hooks
    apply_rainfusion(model, settings())


def test_a_list_of_models_holds_models_only():
    with pytest.raises(UnknownModelError, match="list of WanPipeline, WanTransformer3DModel is neither"):
        apply_rainfusion([wan(), wan_pipeline()], settings())


def test_a_model_that_was_swapped_is_noticed_by_the_report():
    pipe = wan_pipeline()
    handle = apply_rainfusion(pipe, settings())
    pipe.transformer = wan(5)
    with pytest.warns(RainfusionWarning, match="transformer of the pipeline is another model"):
        handle.report()


def test_a_shared_mask_is_one_a_length_of_text():
    pipe = wan_pipeline()
    handle = apply_rainfusion(pipe, settings(refresh_every=4, share_masks=True))
    run(pipe)
    assert kinds(handle.report()) == ["sparse", *["reused"] * 7]


def test_a_copied_pipeline_is_followed_by_its_own_scheduler(pipe):
    apply_rainfusion(pipe, settings(dense_steps=(1, 1)))
    twin = copy.deepcopy(pipe)
    assert twin(4).isfinite().all()


def test_what_a_pickle_cannot_hold_is_said():
    model = wan()
    with apply_rainfusion(model, settings()) as handle:
        for what in (model, handle):
            with pytest.raises(TypeError, match="call remove\\(\\) of its handle first"):
                pickle.dumps(what)
    pickle.dumps(model)


def test_what_a_run_would_refuse_late_is_refused_at_once():
    model = wan()
    with pytest.raises(UnknownBackendError):
        apply_rainfusion(model, settings(backend="nothing", dense_steps=(3, 0)))
    apply_rainfusion(model, settings(sparsity_from_step={9: {2: (0.5,) * 3}}))
    with pytest.raises(
        ConfigError, match=r"sparsity_from_step\[9\]\[2\] has 3 shares, one a head, and the model has 2"
    ):
        model(**inputs())


@pytest.mark.parametrize("config", [{"sparsity": 0.5}, 0.5])
def test_what_is_no_configuration_is_refused(config):
    with pytest.raises(ConfigError, match="give a RainFusionConfig, or its arguments by name"):
        apply_rainfusion(wan(), config)


def test_a_misspelt_argument_is_refused():
    with pytest.raises(ConfigError, match="'sparsty' is no argument of a configuration; choose from sparsity"):
        apply_rainfusion(wan(), sparsty=0.5)


def test_a_pipeline_without_its_scheduler_says_so():
    pipe = type("Modular", (), {"components": {"transformer": wan()}, "scheduler": None})()
    with pytest.raises(ConfigError, match="load the scheduler of the pipeline first"):
        apply_rainfusion(pipe, settings(dense_steps=(1, 1)))


def test_dense_calls_of_torchs_function_stay_torchs(own_adapters):
    register_adapter("Own", OWN)
    model, x = own_model(), torch.randn(1, 140, 32)
    expected = model(x)
    other = wan()
    try:
        other.set_attention_backend("_native_math")  # which is also the default of the process from then on
        with apply_rainfusion(model, settings(sparsity=0.0)):
            assert torch.equal(model(x), expected)
    finally:
        other.reset_attention_backend()


def test_what_is_read_of_a_tensor_is_read_again_when_it_changed():
    mask = torch.ones(1, 8, dtype=torch.bool)
    assert hides_end_only(mask)
    mask[0, 2] = False
    assert not hides_end_only(mask)
    for i in range(100):
        mask[0, i % 8] = True
        hides_end_only(mask)
    assert len(_kept[mask][1]) == 1
    with torch.inference_mode():
        made = torch.ones(1, 8, dtype=torch.bool)
        assert hides_end_only(made)
        made[0, 2] = False
        assert not hides_end_only(made)


def test_a_tensor_is_read_once():
    reads = []
    tensor = torch.ones(2)
    for _ in range(3):
        once(tensor, "sum", lambda x: reads.append(1) or x.sum().item())
    assert reads == [1]
