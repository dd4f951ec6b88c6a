"""The Triton backend: the whole plan as kernels for CUDA devices, on Hopper with a path of its own."""

from rainfusion.core.backend import BackendSpec
from rainfusion.plugins import hookimpl


@hookimpl
def rainfusion_backends() -> list[BackendSpec]:
    """Announce the Triton backend without importing torch or triton."""
    return [
        BackendSpec(
            "triton",
            "rainfusion.backends.triton.backend:TritonBackend",
            requires=("torch", "triton"),
            install="pip install 'rainfusion[triton]'",
        )
    ]
