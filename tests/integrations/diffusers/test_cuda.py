"""The diffusers host on a CUDA device: no wait for it, compiled blocks, schedules under CUDA graphs."""

from __future__ import annotations

import pytest
import torch
from diffusers import HunyuanVideoTransformer3DModel

from rainfusion.integrations.diffusers import RainFusionConfig, apply_rainfusion
from tests.integrations.diffusers.families import assert_close, first, seeded
from tests.integrations.diffusers.test_wan import WAN, inputs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.filterwarnings("ignore::rainfusion.core.errors.RainfusionWarning"),
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype"),
    # torch's own compiler on newer Pythons, where it would like TF32, and where its trees of CUDA graphs begin
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*", "ignore::UserWarning:torch.*"),
]
CONFIG = {"sparsity": 0.6, "min_blocks": 0, "block": 64}


def on_device(model, arguments, dtype=torch.bfloat16):
    moved = {
        name: value.to("cuda", dtype if value.is_floating_point() else None) if torch.is_tensor(value) else value
        for name, value in arguments.items()
    }
    return model.to("cuda", dtype), moved


def wan(frames=5, height=16, width=16):
    return on_device(WAN.made(), seeded(inputs(frames, height, width)))


def hunyuan():
    torch.manual_seed(0)
    model = HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=32,
        num_layers=2,
        num_single_layers=2,
        num_refiner_layers=1,
        patch_size=2,
        text_embed_dim=16,
        pooled_projection_dim=8,
        rope_axes_dim=(8, 12, 12),
    ).eval()
    arguments = {
        "hidden_states": torch.randn(2, 4, 5, 32, 32),
        "timestep": torch.tensor([500, 500]),
        "encoder_hidden_states": torch.randn(2, 13, 16),
        "encoder_attention_mask": torch.arange(13)[None] < torch.tensor([[9], [4]]),
        "pooled_projections": torch.randn(2, 8),
        "guidance": torch.tensor([1000.0, 1000.0]),
    }
    return on_device(model, arguments)


@pytest.mark.parametrize("make", [wan, hunyuan])
def test_a_sparse_forward_does_not_wait_for_the_device(make):
    model, arguments = make()
    calls = []
    with torch.no_grad(), apply_rainfusion(model, **CONFIG) as handle:
        model(**arguments)
        attend = handle._applied[0].engine.attend

        def watched(*args, **kwargs):  # the host's own code around it may wait
            torch.cuda.set_sync_debug_mode("error")
            try:
                return attend(*args, **kwargs)
            finally:
                torch.cuda.set_sync_debug_mode("default")
                calls.append(args[0])

        handle._applied[0].engine.attend = watched
        model(**arguments)
        assert len(calls) == len(handle._applied[0].layers)
        assert handle.report().count(kind="sparse") == 2 * len(calls)


def test_compiled_blocks_are_equal_to_eager():
    model, arguments = wan()
    with torch.no_grad(), apply_rainfusion(model, **CONFIG) as handle:
        eager = first(model(**arguments))
        model.compile_repeated_blocks(fullgraph=True)
        assert_close(first(model(**arguments)), eager, 0.05)
        assert handle.report().count(kind="sparse") == 6


def test_cuda_graphs_do_not_freeze_the_schedule():
    model, arguments = wan()
    config = RainFusionConfig(**CONFIG, dense_steps=(3, 0), num_steps=8)
    with torch.no_grad(), apply_rainfusion(model, config) as handle:
        model.compile_repeated_blocks(fullgraph=True, mode="reduce-overhead")
        for step in range(8):
            torch.compiler.cudagraph_mark_step_begin()
            model(**(arguments | {"timestep": torch.tensor([900 - 100 * step], device="cuda")}))
        kinds = {row.step: row.kind for row in handle.report().rows}
    assert kinds == {step: "dense" if step < 3 else "sparse" for step in range(8)}


def test_times_are_measured_on_the_device():
    model, arguments = wan()
    with torch.no_grad(), apply_rainfusion(model, **CONFIG, timed=True) as handle:
        model(**arguments)
        assert all(row.ms > 0 for row in handle.report().rows)
