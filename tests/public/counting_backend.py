"""A backend that counts how often it is asked for kernels, that is, how often a plan is lowered for it."""

from __future__ import annotations

from rainfusion.backends.reference import ReferenceBackend


class CountingBackend(ReferenceBackend):
    name = "counting"
    lowered: list = []  # noqa: RUF012  # shared on purpose

    def kernels(self, plan, device):
        self.lowered.append(plan)
        return ()


class HeadDim64Only(ReferenceBackend):
    name = "narrow"

    def capabilities(self, device):
        from rainfusion import Capabilities

        return Capabilities(head_dims=frozenset({64}), lse=False)


class BrokenProbe(ReferenceBackend):
    name = "broken"

    def preference(self, plan, device):
        raise OSError("the driver is older than the library")
