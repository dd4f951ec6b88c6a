"""The portable backend: plain torch operations on whatever device torch has (CPU, CUDA, ROCm, MPS, XPU)."""

from rainfusion.core.backend import BackendSpec
from rainfusion.plugins import hookimpl


@hookimpl
def rainfusion_backends() -> list[BackendSpec]:
    """Announce the torch backend without importing torch."""
    return [
        BackendSpec(
            "torch",
            "rainfusion.backends.torch.backend:TorchBackend",
            requires=("torch",),
            install="pip install 'rainfusion[torch]'",
            arrays=("torch", "numpy"),
            revision=2,
        )
    ]
