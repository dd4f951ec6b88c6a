"""Applying rainfusion and taking it away: what is found, refused, noticed, and told in the report."""

from __future__ import annotations

import copy
import subprocess
import sys
import threading
from unittest import mock

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry, attention_backend
from diffusers.models.transformers import transformer_wan
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import rainfusion
from rainfusion.core.errors import BackendUnavailableError, LayoutError, ProblemError, RainfusionWarning
from rainfusion.integrations.diffusers import (
    REST,
    Adapter,
    ConfigError,
    Grid,
    RainFusionConfig,
    UnknownModelError,
    _version,
    adapter,
    apply_rainfusion,
    register_adapter,
    remove_rainfusion,
)
from tests.integrations.diffusers.own import OWN, Own, own_model
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


# -- what is found -------------------------------------------------------------------------------------


def test_an_own_model_takes_three_lines(own_adapters):
    register_adapter("Own", Adapter(r"blocks\.\d+", lambda model, arguments: (Grid(2, 8, 8), REST), call="sdpa"))
    model, tokens = own_model(), torch.randn(1, 133, 32)
    before = model(tokens)
    with apply_rainfusion(model, settings(sparsity=1e-9)) as handle:
        torch.testing.assert_close(model(tokens), before)
    assert kinds(handle.report()) == ["sparse"]
    with apply_rainfusion(model, settings()):
        assert not torch.allclose(model(tokens), before)
    assert torch.equal(model(tokens), before)


@pytest.mark.filterwarnings("ignore::rainfusion.SpeedWarning")
def test_sparse_attention_is_in_8_bits_where_that_is_asked_for(own_adapters):
    register_adapter("Own", Adapter(r"blocks\.\d+", lambda model, arguments: (Grid(2, 8, 8), REST), call="sdpa"))
    model, tokens = own_model(), torch.randn(1, 133, 32)
    with apply_rainfusion(model, settings()):
        exact = model(tokens)
    for precision, most in (("int8", 0.01), ("fp8", 0.03)):
        with apply_rainfusion(model, settings(precision=precision, rotate=True)) as handle:
            out = model(tokens)
        assert kinds(handle.report()) == ["sparse"]
        assert 0 < (out - exact).norm() < most * exact.norm()


def test_a_subclass_has_its_bases_adapter():
    class Finetuned(WanTransformer3DModel):
        pass

    model = wan()
    model.__class__ = Finetuned
    assert apply_rainfusion(model).report().layers == {"Finetuned": LAYERS}


def test_several_models_can_be_given():
    handle = apply_rainfusion([wan(), wan()], settings())
    assert handle.report().layers == {"WanTransformer3DModel 0": LAYERS, "WanTransformer3DModel 1": LAYERS}


def test_a_model_that_is_named_twice_is_one():
    model = wan()
    assert apply_rainfusion([model, model], settings()).report().layers == {"WanTransformer3DModel 0": LAYERS}
    model(**inputs())


def test_unknown_models_are_refused_with_what_to_do():
    for target in (nn.Linear(2, 2), mock.Mock(components={"transformer": nn.Linear(2, 2)})):
        with pytest.raises(
            UnknownModelError, match=r"Linear is not known; describe it with register_adapter\('Linear', "
        ):
            apply_rainfusion(target)


def test_what_is_no_model_is_refused():
    for target, said in [
        (3, "int is neither a pipeline, a model nor"),
        ("wan", "str is neither"),
        ([], "list is neither"),
        (mock.Mock(components={"vae": nn.Linear(2, 2)}), "has no transformer; give the model itself"),
    ]:
        with pytest.raises(UnknownModelError, match=said):
            apply_rainfusion(target)


def test_a_model_that_is_left_alone_says_why(own_adapters):
    adapter.leave_alone("Own", "its attention is sparse already")
    with pytest.raises(UnknownModelError, match="Own is left as it is: its attention is sparse already"):
        apply_rainfusion(own_model())


def test_an_adapter_that_finds_nothing_is_refused(own_adapters):
    register_adapter(Own, Adapter(r"layers\.\d+", lambda model, arguments: (REST,)))
    with pytest.raises(
        UnknownModelError, match=r"no module of Own has a name that matches 'layers.*correct its Adapter"
    ):
        apply_rainfusion(own_model())


def test_other_parts_of_a_pipeline_are_left_alone():
    pipe = wan_pipeline(experts=2, vae=None)
    handle = apply_rainfusion(pipe, settings())
    assert handle.report().layers == {"transformer": LAYERS, "transformer_2": LAYERS}
    with pytest.raises(UnknownModelError, match="AutoencoderKL is not known"):
        apply_rainfusion(AutoencoderKL())


# -- what is refused -----------------------------------------------------------------------------------


def test_applying_twice_is_refused_and_changes_nothing():
    pipe = wan_pipeline(experts=2)
    handle = apply_rainfusion(pipe.transformer_2, settings())
    with pytest.raises(ConfigError, match="rainfusion is applied already; call remove"):
        apply_rainfusion(pipe)
    handle.remove()
    apply_rainfusion(pipe).remove()


def test_a_configuration_and_its_arguments_together_are_refused():
    with pytest.raises(ConfigError, match="not both"):
        apply_rainfusion(wan(), RainFusionConfig(), sparsity=0.5)
    assert apply_rainfusion(wan(), sparsity=0.5).config == RainFusionConfig(sparsity=0.5)


def test_last_steps_need_their_number():
    with pytest.raises(ConfigError, match="needs the number of denoising steps; give the pipeline, or num_steps"):
        apply_rainfusion(wan(), dense_steps=(0, 1))
    apply_rainfusion(wan(), dense_steps=(0, 1), num_steps=8)


def test_layers_that_the_model_does_not_have_are_refused_before_anything_is_changed():
    model = wan()
    before = [module.processor for module in model.modules() if hasattr(module, "processor")]
    with pytest.raises(ConfigError, match="the model has 3"):
        apply_rainfusion(model, dense_layers=(9,))
    assert [module.processor for module in model.modules() if hasattr(module, "processor")] == before
    assert not model._forward_pre_hooks


def test_the_attention_backend_set_by_hand_is_refused():
    model = wan()
    model.set_attention_backend("rainfusion")
    for act in (lambda: model(**inputs()), lambda: apply_rainfusion(model)):
        with pytest.raises(ProblemError, match="use apply_rainfusion\\(pipe\\) instead of setting it by name"):
            act()
    applied = wan()
    apply_rainfusion(applied, settings())
    for act in (lambda: applied.set_attention_backend("rainfusion"), lambda: None):
        act()
        with attention_backend("rainfusion"), pytest.raises(ProblemError, match="use apply_rainfusion"):
            applied(**inputs())


def test_dense_attention_never_leads_to_rainfusion_again():
    model = wan()
    apply_rainfusion(model, settings(sparsity=0))
    with attention_backend("rainfusion"), pytest.raises(ProblemError, match="use apply_rainfusion"):
        model(**inputs())


def test_a_ring_of_devices_is_refused():
    """Before and after; test_split.py has what is not."""
    from diffusers import ContextParallelConfig, ParallelConfig

    ring = ParallelConfig(context_parallel_config=ContextParallelConfig(ring_degree=2))
    model = wan()
    for module in model.modules():
        if hasattr(module, "processor"):
            module.processor._parallel_config = ring
    with pytest.raises(ProblemError, match="by heads alone"):
        apply_rainfusion(model)
    later = wan()
    apply_rainfusion(later, settings())
    later.blocks[0].attn1.processor._parallel_config = ring
    with pytest.raises(ProblemError, match="by heads alone"):
        later(**inputs())
    assert _AttentionBackendRegistry._is_context_parallel_available(AttentionBackendName("rainfusion"))


@pytest.mark.parametrize("found", ["0.35.2", "0.9", "0.36.0.dev0", "0.42.1", "1.0"])
def test_diffusers_that_is_too_old_is_refused(monkeypatch, found):
    monkeypatch.setattr(_version, "version", lambda _: found)
    if found in ("0.35.2", "0.9"):
        with pytest.raises(BackendUnavailableError, match=f"diffusers {found} has no registry.*'diffusers>=0.36'"):
            _version.check_version()
    else:
        _version.check_version()


def test_diffusers_that_is_missing_is_refused(monkeypatch):
    def missing(name):
        raise _version.PackageNotFoundError(name)

    monkeypatch.setattr(_version, "version", missing)
    with pytest.raises(BackendUnavailableError, match="diffusers is not installed; pip install"):
        _version.check_version()


def test_hosts_are_imported_only_by_who_uses_them():
    code = "import sys, rainfusion, rainfusion.integrations.config, rainfusion.integrations.report; "
    code += "print(sorted({'torch', 'diffusers', 'rich', 'matplotlib'} & {*sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# -- removal -------------------------------------------------------------------------------------------


def test_removal_leaves_nothing_and_a_second_one_is_harmless():
    model = wan()
    processors = {name: module.processor for name, module in model.named_modules() if hasattr(module, "processor")}
    handle = apply_rainfusion(model, settings())
    handle.remove()
    handle.remove()
    remove_rainfusion(model)
    assert processors == {name: m.processor for name, m in model.named_modules() if hasattr(m, "processor")}
    assert not model._forward_hooks
    assert not model._forward_pre_hooks
    assert not any(m._forward_hooks for m in model.modules())
    assert not any(getattr(m, "_diffusers_hook", mock.Mock(hooks=())).hooks for m in model.modules())


def test_the_context_manager_removes_even_after_an_error():
    model = wan()
    with pytest.raises(ZeroDivisionError), apply_rainfusion(model, settings()):
        _ = 1 / 0
    assert not model._forward_pre_hooks


def test_remove_rainfusion_takes_pipelines_and_models():
    pipe = wan_pipeline(experts=2)
    apply_rainfusion(pipe, settings())
    remove_rainfusion(pipe.transformer)
    remove_rainfusion(pipe)
    assert not pipe.transformer_2._forward_pre_hooks
    apply_rainfusion(pipe, settings())


def test_a_processor_that_was_set_since_is_kept_at_removal():
    from diffusers.models.transformers.transformer_wan import WanAttnProcessor

    model, other = wan(), WanAttnProcessor()
    handle = apply_rainfusion(model, settings())
    model.blocks[0].attn1.processor = other
    handle.remove()
    assert model.blocks[0].attn1.processor is other


def test_a_deep_copy_has_its_own_state():
    pipe = wan_pipeline(experts=2)
    handle = apply_rainfusion(pipe, settings(refresh_every=2))
    run(pipe)
    rows = len(handle.report().rows)
    twin = copy.deepcopy(pipe.transformer)
    expected = pipe.transformer(**inputs())[0]
    assert torch.equal(twin(**inputs())[0], expected)
    assert len(handle.report().rows) == rows + LAYERS
    remove_rainfusion(twin)
    assert torch.equal(twin(**inputs())[0], wan()(**inputs())[0])
    assert torch.equal(pipe.transformer(**inputs())[0], expected)
    handle.remove()
    assert not pipe.transformer._forward_pre_hooks


def test_two_deep_copies_run_one_after_the_other_as_the_originals_do():
    pipe = wan_pipeline()
    apply_rainfusion(pipe, settings(dense_steps=(1, 1)))
    other = wan_pipeline(transformer=copy.deepcopy(pipe.transformer))
    assert torch.equal(run(other), run(pipe))


def test_saving_and_loading_knows_nothing_of_rainfusion(tmp_path):
    model = wan()
    keys, before = {*model.state_dict()}, model(**inputs())[0]
    apply_rainfusion(model, settings())
    assert {*model.state_dict()} == keys
    model.save_pretrained(tmp_path)
    loaded = WanTransformer3DModel.from_pretrained(tmp_path)
    assert torch.equal(loaded(**inputs())[0], before)
    with apply_rainfusion(loaded, settings()):
        assert torch.equal(loaded(**inputs())[0], model(**inputs())[0])


# -- when it is ----------------------------------------------------------------------------------------


def test_two_experts_on_one_clock_over_two_runs_of_two_resolutions():
    pipe = wan_pipeline(experts=2)
    handle = apply_rainfusion(pipe, settings(dense_steps=(2, 2)))
    latents = [run(pipe, 8), run(pipe, 8, height=96, width=160)]
    assert all(x.isfinite().all() for x in latents)
    expected = [
        ("transformer" if step < 4 else "transformer_2", n, step, context, "sparse" if 2 <= step < 6 else "dense")
        for n in range(2)
        for step in range(8)
        for context in ("cond", "uncond")
    ]
    for layer in range(LAYERS):
        assert happened(handle.report(), layer) == expected
    whys = {(row.step, row.why) for row in handle.report().rows if row.kind == "dense"}
    assert whys == {(0, "first steps"), (1, "first steps"), (6, "last steps"), (7, "last steps")}
    handle.remove()
    assert torch.equal(run(pipe, 8), run(wan_pipeline(experts=2), 8))


def test_masks_are_kept_within_a_context_of_an_expert_and_a_run():
    pipe = wan_pipeline(experts=2)
    handle = apply_rainfusion(pipe, settings(refresh_every=3))
    run(pipe, 8)
    run(pipe, 8, height=96, width=160)
    for n in range(2):
        for context in ("cond", "uncond"):
            for model in ("transformer", "transformer_2"):
                rows = kinds(handle.report(), run=n, context=context, model=model)
                assert rows == ["sparse", "reused", "reused", "sparse"]


def test_a_run_is_the_same_as_a_new_pipelines():
    """Nothing of the first run is left in the second."""
    pipe = wan_pipeline(experts=2)
    apply_rainfusion(pipe, settings(refresh_every=3, share_masks=True, dense_steps=(1, 1)))
    first = run(pipe, 6)
    run(pipe, 5, height=96, width=160)
    assert torch.equal(run(pipe, 6), first)


def test_a_pipeline_without_contexts_is_followed_by_its_scheduler():
    pipe = Nameless(FlowMatchEulerDiscreteScheduler())
    handle = apply_rainfusion(pipe, settings(dense_steps=(1, 1)))
    pipe(4)
    pipe(3, height=6)
    assert kinds(handle.report(), run=0) == ["dense", "sparse", "sparse", "dense"]
    assert kinds(handle.report(), run=1) == ["dense", "sparse", "dense"]


def test_steps_count_from_where_an_image_run_begins():
    pipe = Nameless(FlowMatchEulerDiscreteScheduler())
    handle = apply_rainfusion(pipe, settings(dense_steps=(1, 2)))
    pipe(8, start=3)
    assert [row[2:] for row in happened(handle.report())] == [
        (0, "", "dense"),
        (1, "", "sparse"),
        (2, "", "sparse"),
        (3, "", "dense"),
        (4, "", "dense"),
    ]


def test_a_scheduler_that_counts_nothing_leaves_the_timesteps():
    pipe = Nameless(DDIMScheduler())
    handle = apply_rainfusion(pipe, settings(dense_steps=(1, 1)))
    pipe(4)
    pipe(5, start=2)
    assert kinds(handle.report(), run=0) == ["dense", "sparse", "sparse", "dense"]
    assert kinds(handle.report(), run=1) == ["dense", "sparse", "dense"]


def test_a_bare_model_in_an_own_loop_is_followed_by_its_timesteps():
    """Conditional and unconditional forwards one after the other, by position, and masks of their own."""
    model = wan()
    handle = apply_rainfusion(model, settings(dense_steps=(1, 1), num_steps=4, refresh_every=2))
    for _ in range(2):
        for step in (900, 600, 300, 100):
            for seed in range(2):
                arguments = inputs(step=step, seed=seed)
                model(*(arguments[name] for name in ("hidden_states", "timestep", "encoder_hidden_states")))
    for n in range(2):
        for context in ("", "#2"):
            rows = kinds(handle.report(), run=n, context=context)
            assert rows == ["dense", "sparse", "reused", "dense"]


# -- errors in the middle ------------------------------------------------------------------------------


def failing_once(module):
    """The module's forward fails the next time."""

    def fail(*_):
        hook.remove()
        raise RuntimeError("no memory")

    hook = module.register_forward_pre_hook(fail)


@pytest.mark.parametrize("where", ["blocks.1.attn1.to_q", "blocks.2.ffn", "proj_out", "patch_embedding"])
def test_the_forward_after_an_error_is_right(where):
    model = wan()
    apply_rainfusion(model, settings())
    expected = model(**inputs())[0]
    failing_once(model.get_submodule(where))
    with pytest.raises(RuntimeError, match="no memory"):
        model(**inputs(height=6))
    assert torch.equal(model(**inputs())[0], expected)


@pytest.mark.parametrize("step", [0, 1, 3])
def test_the_run_after_an_error_is_right(step):
    pipe = wan_pipeline(experts=2)
    handle = apply_rainfusion(pipe, settings(dense_steps=(1, 1), refresh_every=9, share_masks=True))
    expected = run(pipe)

    def fail(pipe, i, t, arguments):
        if i == step:
            failing_once((pipe.transformer if step < 1 else pipe.transformer_2).blocks[1].attn1.to_q)
            if step == 3:
                raise RuntimeError("no memory")
        return {}

    with pytest.raises(RuntimeError, match="no memory"):
        run(pipe, height=96, width=160, callback_on_step_end=fail)
    for model in (pipe.transformer, pipe.transformer_2):
        for hooks in (module._forward_pre_hooks for module in model.modules() if isinstance(module, nn.Linear)):
            hooks.clear()
    assert torch.equal(run(pipe), expected)
    last = handle.report().rows[-1].run
    assert kinds(handle.report(), run=last, context="cond") == ["dense", "sparse", "sparse", "dense"]


def test_a_call_of_a_block_outside_of_its_model_is_refused():
    model = wan()
    apply_rainfusion(model, settings())
    tokens = torch.randn(1, 192, 64)
    with pytest.raises(LayoutError, match="layer 1 of WanTransformer3DModel was called outside of a forward"):
        model.blocks[1].attn1(tokens)


# -- what replaces processors --------------------------------------------------------------------------


def replaced_by_processor(model):
    from diffusers.models.transformers.transformer_wan import WanAttnProcessor

    for module in model.modules():
        if hasattr(module, "set_processor"):
            module.set_processor(WanAttnProcessor())


@pytest.mark.parametrize("replace", [replaced_by_processor, lambda model: model.set_attention_backend("native")])
def test_replaced_processors_are_noticed_once(replace):
    model = wan()
    handle = apply_rainfusion(model, settings())
    replace(model)
    with pytest.warns(RainfusionWarning, match="3 of 3 layers .* no longer call rainfusion and are dense"):
        out = model(**inputs())[0]
    model(**inputs())
    torch.testing.assert_close(out, wan()(**inputs())[0])
    assert {(row.kind, row.why) for row in handle.report().rows} == {("dense", "another attention was set")}
    handle.remove()
    with apply_rainfusion(model, settings()) as again:
        model(**inputs())
    assert kinds(again.report()) == ["sparse"]


def test_an_attention_backend_that_was_set_since_stays_at_removal():
    model = wan()
    handle = apply_rainfusion(model, settings())
    model.set_attention_backend("native")
    handle.remove()
    assert model.blocks[0].attn1.processor._attention_backend is AttentionBackendName.NATIVE


def test_dense_steps_call_the_attention_backend_that_was_set():
    calls = []
    native = _AttentionBackendRegistry._backends[AttentionBackendName.NATIVE]

    def math(query, key, value, **call):
        calls.append(query.shape[1])
        return native(query, key, value, **call)

    pipe = wan_pipeline()
    pipe.transformer.set_attention_backend("_native_math")
    handle = apply_rainfusion(pipe, settings(dense_steps=(1, 0), dense_layers=(2,)))
    with mock.patch.dict(_AttentionBackendRegistry._backends, {AttentionBackendName._NATIVE_MATH: math}):
        run(pipe, 2, guidance_scale=1.0)
    cross = 2 * LAYERS
    assert len(calls) == cross + handle.report().count(kind="dense") == cross + LAYERS + 1


def test_the_attention_backend_of_a_context_manager_is_followed_too():
    calls = []
    native = _AttentionBackendRegistry._backends[AttentionBackendName.NATIVE]
    spy = mock.Mock(side_effect=lambda *args, **call: calls.append(1) or native(*args, **call))
    model = wan()
    apply_rainfusion(model, settings(sparsity=0))
    backends = {AttentionBackendName._NATIVE_MATH: spy}
    with mock.patch.dict(_AttentionBackendRegistry._backends, backends), attention_backend("_native_math"):
        model(**inputs())
    assert len(calls) == 2 * LAYERS


# -- gradients -----------------------------------------------------------------------------------------


def test_a_wanted_gradient_is_refused():
    model = wan().train()
    apply_rainfusion(model, settings())
    with (
        torch.enable_grad(),
        pytest.raises(ProblemError, match=r"run under torch.no_grad\(\), or configure on_grad='de"),
    ):
        model(**inputs())
    model(**inputs())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_dense_attention_where_that_is_asked_for(checkpointing):
    """Also of tokens that are reordered, and after a run in inference mode has filled what is kept of orders."""
    gradients = []
    for on in (False, True):
        model = wan().train()
        if checkpointing:
            model.enable_gradient_checkpointing()
        if on:
            handle = apply_rainfusion(model, settings(on_grad="dense"))
            with torch.inference_mode():
                model(**inputs())
        with torch.enable_grad():
            model(**inputs())[0].square().mean().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert [kinds(handle.report()), handle.report().rows[-1].why] == [["sparse", "dense"], "gradient"]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)


def test_dropout_is_the_hosts(own_adapters):
    """Where the host asks for it, its attention runs; sparse attention has none."""
    register_adapter(Own, OWN)
    model, tokens = own_model(), torch.randn(1, 133, 32)
    for block in model.blocks:
        block.processor.dropout = 0.5
    handle = apply_rainfusion(model, settings())
    torch.manual_seed(3)
    out = model(tokens)
    handle.remove()
    torch.manual_seed(3)
    assert torch.equal(out, model(tokens))
    model = wan()
    apply_rainfusion(model, settings())
    dispatch = transformer_wan.dispatch_attention_fn
    with (
        mock.patch.object(
            transformer_wan, "dispatch_attention_fn", lambda *args, **call: dispatch(*args, **call | {"dropout_p": 0.5})
        ),
        pytest.raises(ProblemError, match="sparse attention has no dropout"),
    ):
        model(**inputs())


def test_training_mode_without_gradients_is_sparse():
    model = wan().train()
    handle = apply_rainfusion(model, settings())
    assert torch.equal(model(**inputs())[0], model.eval()(**inputs())[0])
    assert kinds(handle.report()) == ["sparse", "sparse"]


# -- threads, devices, waiting -------------------------------------------------------------------------


def test_two_models_on_two_threads():
    models = [wan(seed) for seed in range(2)]
    shapes = [inputs(seed=3), inputs(height=6, seed=4)]
    for model in models:
        apply_rainfusion(model, settings())
    expected = [model(**given)[0] for model, given in zip(models, shapes, strict=True)]
    wrong = []

    @torch.no_grad()
    def work(i):
        for _ in range(8):
            if not torch.equal(models[i](**shapes[i])[0], expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_the_place_of_a_layer_is_on_the_host_whatever_the_default_device_is():
    model = wan()
    with torch.device("meta"):
        apply_rainfusion(model, settings())
    model(**inputs())


class Waits(TorchDispatchMode):
    """Counts what would wait for a device: values that are read, except in a backend, and a layer's place, on the host.

    The backend for CPUs reads values there.
    """

    def __init__(self, monkeypatch):
        super().__init__()
        self.seen, attention = [], rainfusion.attention

        def backend(*args, **call):
            with _disable_current_modes():
                return attention(*args, **call)

        monkeypatch.setattr(rainfusion, "attention", backend)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        is_place = args and isinstance(args[0], torch.Tensor) and args[0].dtype == torch.int64 and args[0].ndim == 0
        reads = (
            torch.ops.aten._local_scalar_dense.default,
            torch.ops.aten.nonzero.default,
            torch.ops.aten.equal.default,
        )
        if func in reads and not is_place:
            self.seen.append(func)
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("other", [{}, {"refresh_every": 2, "share_masks": True}, {"dense_layers": (1,)}], ids=str)
def test_padded_text_is_sparse_and_nothing_waits_for_the_device(own_adapters, monkeypatch, other):
    register_adapter(Own, OWN)
    model, tokens = own_model(), torch.randn(2, 138, 32)
    mask = torch.arange(138) < torch.tensor([133, 129])[:, None]
    handle = apply_rainfusion(model, settings(**other))
    model(tokens, mask[:, None, None])
    with Waits(monkeypatch) as waits:
        model(tokens, mask[:, None, None])
        torch.ones(2).any().item()
    assert waits.seen == [torch.ops.aten._local_scalar_dense.default], "the last one is the test's own"
    assert set(kinds(handle.report())) <= {"sparse", "reused"}


def test_a_mask_of_padded_text_hides_its_keys(own_adapters):
    register_adapter(Own, OWN)
    model, tokens = own_model(), torch.randn(2, 138, 32)
    mask = torch.arange(138) < torch.tensor([133, 129])[:, None]
    before = model(tokens, mask[:, None, None])
    with apply_rainfusion(model, settings(sparsity=1e-9)):
        after = model(tokens, mask[:, None, None])
    for sample, length in enumerate((133, 129)):
        torch.testing.assert_close(after[sample, :length], before[sample, :length])


@pytest.mark.parametrize(
    "mask",
    [
        torch.zeros(1, 1, 138, 138),
        torch.ones(138, 138, dtype=torch.bool),
        torch.zeros(1, 1, 1, 138),
        torch.ones(2, 1, 138, dtype=torch.bool),
        torch.ones(1, 2, 1, 138, dtype=torch.bool),
    ],
    ids=["of pairs, added", "of pairs", "of keys, added", "a head", "a sample and head"],
)
def test_other_masks_stay_dense(own_adapters, mask):
    register_adapter(Own, OWN)
    model, tokens = own_model(), torch.randn(1, 138, 32)
    before = model(tokens, mask)
    handle = apply_rainfusion(model, settings())
    torch.testing.assert_close(model(tokens, mask), before)
    assert [(row.kind, row.why) for row in handle.report().rows] == [("dense", "mask")] * 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("blocks.(", len), "layers='blocks.(' is no regular expression"),
        ((3, len), "layers=3 is a int; give a str"),
        (("blocks", (Grid(2, 8, 8), REST)), "is no function; give one of the model"),
        (("blocks", len, "flash"), "call='flash' is not known; choose one of 'dispatch', 'sdpa'"),
    ],
)
def test_adapters_that_describe_nothing_are_refused(arguments, said):
    with pytest.raises(UnknownModelError) as refusal:
        Adapter(*arguments)
    assert said in str(refusal.value)
