"""The Ascend backend: NPU tensors of torch_npu, attention by the block-sparse operators there (docs/ascend.md)."""

from rainfusion.core.backend import BackendSpec
from rainfusion.plugins import hookimpl


@hookimpl
def rainfusion_backends() -> list[BackendSpec]:
    """Announce the Ascend backend without importing torch or torch_npu."""
    return [
        BackendSpec(
            "torch_npu",
            "rainfusion.backends.torch_npu.backend:TorchNpuBackend",
            requires=("torch", "torch_npu"),
            install="pip install 'rainfusion[ascend]', install CANN and source its set_env.sh; to use torch without "
            "an NPU instead, set TORCH_DEVICE_BACKEND_AUTOLOAD=0",
            isolate=True,
            arrays=("torch:npu",),
            revision=3,
        )
    ]
