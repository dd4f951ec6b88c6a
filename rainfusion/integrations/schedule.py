"""The schedule: which attention calls of a run are sparse, how much, and why the others are dense."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from rainfusion.integrations.calibration import Calibration
from rainfusion.integrations.config import ConfigError, LayerShares, RainFusionConfig, Share, Shares
from rainfusion.integrations.head_budgets import HeadBudgets


@dataclass(frozen=True)
class Decision:
    """What a call is to be.

    Attributes:
        share: of block pairs to skip, one or one a head; None for a dense call.
        why: in words, for a dense call.
    """

    share: Share | None
    why: str = ""


class Schedule:
    """The schedule of one model.

    Args:
        layers: how many self-attention layers the model has.

    Raises:
        ConfigError: layers are named that the model does not have, or head budgets were not resolved.
    """

    def __init__(self, config: RainFusionConfig, layers: int) -> None:
        self._config, self._layers = config, layers
        self._heads: int | None = None
        self._dense_layers = frozenset(layer + layers if layer < 0 else layer for layer in config.dense_layers)
        self._sparsity = _by_layer(config.sparsity)
        self._from_step = {step: _by_layer(shares) for step, shares in config.sparsity_from_step.items()}
        named = [self._sparsity, *self._from_step.values()]
        by_layer = {layer for shares in named if isinstance(shares, Mapping) for layer in shares}
        if wrong := sorted(layer for layer in self._dense_layers | by_layer if not 0 <= layer < layers):
            raise ConfigError(f"layers {', '.join(map(str, wrong))} are named, and the model has {layers}, from 0 on")

    def check_heads(self, heads: int) -> None:
        """Refuse shares for another number of heads, before a step that needs them comes.

        Raises:
            ConfigError: it says which shares, and how many heads there are.
        """
        if self._heads == heads:
            return
        for name, shares in {"sparsity": self._sparsity, **_named(self._from_step)}.items():
            by_layer = shares if isinstance(shares, Mapping) else {"": shares}
            for layer, share in by_layer.items():
                if isinstance(share, tuple) and len(share) != heads:
                    where = f"{name}[{layer}]" if layer != "" else name
                    raise ConfigError(f"{where} has {len(share)} shares, one a head, and the model has {heads} heads")
        self._heads = heads

    @property
    def needs_step(self) -> bool:
        """Whether the denoising step matters."""
        config = self._config
        keeps_masks = config.refresh_every > 1 or config.share_masks
        return bool(any(config.dense_steps) or config.sparsity_from_step or keeps_masks)

    @property
    def needs_steps(self) -> bool:
        """Whether the number of denoising steps matters."""
        return self._config.dense_steps[1] > 0

    def decide(self, step: int, steps: int | None, layer: int) -> Decision:
        """The decision for a layer at a denoising step, both counted from 0.

        Raises:
            ConfigError: the number of steps matters and is not known.
        """
        first, last = self._config.dense_steps
        if step < first:
            return Decision(None, "first steps")
        if last and steps is None:
            raise ConfigError(
                f"dense_steps={self._config.dense_steps} needs the number of denoising steps, and the host does not "
                "say it; give num_steps"
            )
        if steps is not None and last and step >= steps - last:
            return Decision(None, "last steps")
        if layer in self._dense_layers:
            return Decision(None, "layer")
        share = self._share(step, layer)
        return Decision(share) if _skips(share) else Decision(None, "sparsity 0")

    def _share(self, step: int, layer: int) -> Share:
        shares = self._sparsity
        for start, other in self._from_step.items():
            if step >= start:
                shares = other
        return shares.get(layer, 0.0) if isinstance(shares, Mapping) else shares


def _skips(share: Share) -> bool:
    return any(share) if isinstance(share, tuple) else share > 0


def _by_layer(shares: Shares) -> LayerShares:
    """Shares that are a model's own."""
    if isinstance(shares, HeadBudgets | Calibration):
        raise ConfigError("head budgets are bound to a model; give the engine what config.for_model(...) returns")
    return shares


def _named(by_step: Mapping[int, LayerShares]) -> dict[str, LayerShares]:
    return {f"sparsity_from_step[{step}]": shares for step, shares in by_step.items()}
