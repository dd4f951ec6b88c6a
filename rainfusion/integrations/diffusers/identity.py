"""What tells a model apart from others: its class and its configuration; weights take no part."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from torch import nn

_QUANTISED = "quantization_config"  # as diffusers names it


def digest_of(model: nn.Module) -> str:
    """The SHA-256 of a model's configuration as JSON, in hexadecimal.

    Entries that diffusers adds for itself, such as its version and where the model was loaded from, begin with an
    underscore and take no part, and neither does how weights are quantised. A model without a configuration has that
    of an empty one.
    """
    config: Any = getattr(model, "config", None)
    entries = {str(k): v for k, v in config.items()} if isinstance(config, Mapping) else {}
    own = {name: value for name, value in entries.items() if not name.startswith("_") and name != _QUANTISED}
    return hashlib.sha256(json.dumps(own, sort_keys=True, default=str).encode()).hexdigest()
