"""Announces the backend acme; imports nothing of the accelerator's own."""

from rainfusion import BackendSpec, hookimpl


@hookimpl
def rainfusion_backends() -> list[BackendSpec]:
    return [
        BackendSpec(
            name="acme",
            target="acme_rainfusion.backend:AcmeBackend",
            install="pip install acme-rainfusion",
            api=1,
        )
    ]
