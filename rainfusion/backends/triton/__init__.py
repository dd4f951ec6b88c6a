"""The Triton backend: the whole plan as kernels for CUDA devices, with a kernel of its own for Hopper."""

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
            arrays=("torch:cuda",),
            revision=2,
        )
    ]
