"""The processes that the tests of this folder share."""

from tests.distributed.workers import workers

__all__ = ["workers"]
