"""What skipping blocks costs, measured while a model runs dense: probes of the engine, for any host.

A probe stands in for the engine's sparse attention. Sums stay on the device in float32; nothing waits for it before
they are read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from array_api_compat import device as device_of

from rainfusion.core.arrays import namespace
from rainfusion.core.errors import LayoutError
from rainfusion.core.parts import Grid
from rainfusion.integrations.call import Call
from rainfusion.integrations.head_budgets import CalibrationError

Array = Any
_MOST_VALUES = 2**25  # that are widened to float32 at once: 128 MB
HeadShares = Sequence[Sequence[float]]


class HeadErrors:
    """A probe that compares sparse attention with the host's, head by head, and lets the model go on with the host's.

    Args:
        shares: of block pairs to skip, each of which is tried.
        needed: the share that must be reached.
        ranks: devices that share the heads out between them.
        every: denoising steps from one that is measured to the next.

    Attributes:
        calls: how many were measured.
        heads: of the model; 0 before a call.
        grids: of the sequences that were measured, such as ``"21x45x80"``.
        unreached: shares that cannot be reached beside what every row keeps; they were not measured everywhere.
    """

    def __init__(self, shares: Sequence[float], needed: float, ranks: int = 1, every: int = 1) -> None:
        self._shares, self._needed, self._ranks, self._every = shares, needed, ranks, every
        self._errors: dict[tuple[int, float], Array] = {}
        self._norms: dict[int, Array] = {}
        self.calls, self.heads = 0, 0
        self.grids: dict[str, None] = {}
        self.unreached: set[float] = set()

    def __call__(self, call: Call) -> Array:
        """The host's own attention, measured or not.

        Raises:
            CalibrationError: the share that is needed cannot be reached, or the ranks do not divide the heads.
        """
        dense = call.dense()
        if call.moment.step % self._every == 0:
            self._measure(call, dense)
        return dense

    def _measure(self, call: Call, dense: Array) -> None:
        if not call.is_reached(self._needed):
            raise CalibrationError(
                f"sparsity={self._needed:g} cannot be reached on {call.layout}: what every row keeps takes more than "
                "that leaves; ask for less, use smaller blocks, or set sink='first_frame_keys' or None"
            )
        if call.heads % self._ranks:
            raise CalibrationError(f"ranks={self._ranks} does not divide the {call.heads} heads of this model")
        self.calls, self.heads = self.calls + 1, call.heads
        self.grids.update(dict.fromkeys(grids_of(call.layout.parts)))
        valid = valid_tokens(call, dense.shape[1])
        norm = squares(dense, None, valid)
        self._norms[call.layer] = self._norms.get(call.layer, 0.0) + norm
        for share in self._shares:
            if not call.is_reached(share):
                self.unreached.add(share)
                continue
            error = squares(call.sparse(share), dense, valid)
            self._errors[call.layer, share] = self._errors.get((call.layer, share), 0.0) + error

    def read(self, layers: int, shares: Sequence[float]) -> list[list[list[float]] | None]:
        """The errors, ``[layers][heads][shares]`` as in `ErrorTable`; None for layers that were not measured.

        Args:
            shares: some of those that were tried, none of them unreached.

        Raises:
            CalibrationError: attention gave numbers that are not finite.
        """
        return [self._read(layer, shares) if layer in self._norms else None for layer in range(layers)]

    def _read(self, layer: int, shares: Sequence[float]) -> list[list[float]]:
        norm = sum(self._norms[layer].tolist())
        by_share = [[error / norm if norm else 0.0 for error in self._errors[layer, s].tolist()] for s in shares]
        if not all(error < float("inf") for errors in by_share for error in errors):
            raise CalibrationError(f"the attention of layer {layer} gave numbers that are not finite; check the model")
        return [list(errors) for errors in zip(*by_share, strict=True)]


class OneLayer:
    """A probe that makes one layer sparse, and sums the relative squared error of its output.

    Args:
        share: of block pairs to skip.
    """

    def __init__(self, layer: int, share: float) -> None:
        self.layer, self._share = layer, share
        self._error: Array = 0.0
        self._norm: Array = 0.0

    def __call__(self, call: Call) -> Array:
        """Sparse attention in that layer, the host's in others."""
        dense = call.dense()
        if call.layer != self.layer:
            return dense
        sparse, valid = call.sparse(self._share), valid_tokens(call, dense.shape[1])
        self._error = self._error + squares(sparse, dense, valid)
        self._norm = self._norm + squares(dense, None, valid)
        return sparse

    def read(self) -> float:
        """The squared error of the layer's output over its squared norm; 0 where it was not called."""
        if isinstance(self._norm, float):
            return 0.0
        norm = sum(self._norm.tolist())
        return float(sum(self._error.tolist()) / norm) if norm else 0.0


class Budgeted:
    """A probe that makes every layer sparse by shares a head.

    Args:
        shares: ``[layers][heads]``; a layer of zeros is dense.
    """

    def __init__(self, shares: HeadShares) -> None:
        self._shares = shares

    def __call__(self, call: Call) -> Array:
        """Sparse attention."""
        shares = tuple(self._shares[call.layer])
        return call.sparse(shares) if any(shares) else call.dense()


def squares(x: Array, less: Array | None, valid: Array | None) -> Array:
    """The sum of the squares of ``x - less`` for every head, float32 ``[heads]``.

    Args:
        x: ``[batch, tokens, heads, head_dim]``, with tokens in front that `less` does not have left out.
        less: the same; None for 0.
        valid: bool ``[batch, tokens]``, the tokens to sum over; None for all.
    """
    xp = namespace(x)
    tokens = x.shape[1] if less is None else less.shape[1]
    x = x[:, x.shape[1] - tokens :]
    step = max(1, _MOST_VALUES * tokens // max(1, x.shape[0] * tokens * x.shape[2] * x.shape[3]))
    total: Array = 0.0
    for start in range(0, tokens, step):
        piece = xp.astype(x[:, start : start + step], xp.float32)
        if less is not None:
            piece = piece - xp.astype(less[:, start : start + step], xp.float32)
        if valid is not None:
            piece = xp.where(valid[:, start : start + step, None, None], piece, xp.zeros_like(piece))
        total = total + xp.sum(piece * piece, axis=(0, 1, 3))
    return total


def valid_tokens(call: Call, tokens: int) -> Array | None:
    """Which of the last `tokens` tokens of a sequence are no padding, bool ``[batch, tokens]``; None for all."""
    lengths = call.kv_lengths
    if lengths is None:
        return None
    xp, length = namespace(lengths), call.layout.length
    if length is None:
        raise LayoutError(f"{call.layout} has no length")
    valid = xp.arange(length, device=device_of(lengths))[None, :] < lengths[:, None]
    valid = valid if call.order == "given" else call.layout.from_blocks(valid, axis=1)
    return valid[:, length - tokens :]


def grids_of(parts: Sequence[Any]) -> list[str]:
    """The grids among the parts of a sequence, such as ``"21x45x80"``."""
    return [f"{part.frames}x{part.height}x{part.width}" for part in parts if isinstance(part, Grid)]
