"""The OpenVINO backend: Intel CPUs, and by the same graphs Intel GPUs and NPUs (docs/openvino.md)."""

from rainfusion.core.backend import BackendSpec
from rainfusion.plugins import hookimpl


@hookimpl
def rainfusion_backends() -> list[BackendSpec]:
    """Announce the OpenVINO backend without importing openvino."""
    return [
        BackendSpec(
            "openvino",
            "rainfusion.backends.openvino.backend:OpenVinoBackend",
            requires=("openvino", "ml_dtypes"),
            install="pip install 'rainfusion[openvino]'",
            arrays=("numpy", "torch:cpu"),
            revision=3,
        )
    ]
