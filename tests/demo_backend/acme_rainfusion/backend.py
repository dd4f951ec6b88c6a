"""The backend: arrays that live on the accelerator, and a kernel for `Attend`; all else runs by its definition."""

import numpy as np
from rainfusion import Backend, Capabilities, Device, Kernel, Stages, ops


class AcmeArray(np.ndarray):
    """An array in the accelerator's memory."""


class AcmeBackend(Backend):
    name = "acme"
    # Without stand_in once it is the real one.
    device = Device("acme", 0, name="Acme", stand_in="NumPy")

    def devices(self):
        return [self.device]

    def device_of(self, array):
        return self.device if isinstance(array, AcmeArray) else None

    def capabilities(self, device):
        return Capabilities(dtypes=frozenset({"float16", "float32"}), max_length=65536)

    def kernels(self, plan, device):
        return [Kernel(frozenset({ops.Attend}), build_attend)]

    def to_native(self, array):
        return array.view(np.ndarray)

    def from_native(self, array, like, dtype):
        return array.astype(dtype).view(AcmeArray)

    def from_host(self, array, device, dtype=None):
        return np.array(array, dtype).view(AcmeArray)


def build_attend(segment, plan, device):
    op = Stages.of(segment).attend

    def run(values):
        results = attend(op, **{field: values[name] for field, name in op.operands.items()})
        return dict(zip(op.makes, results, strict=False))  # without the log-sum-exp where it is not needed

    return run


@np.errstate(invalid="ignore")  # NaN among attended tokens spreads, as in dense attention
def attend(op, q, k, v, order=None, inverse=None, kv_order=None, mask=None, lengths=None):
    """The kernel: one query block of one head at a time, over the tokens of the blocks it keeps."""
    order, kv_order = (np.arange(x.shape[2]) if o is None else o for o, x in ((order, q), (kv_order, k)))
    blocks = (-(-x.shape[2] // size) for x, size in zip((q, k), op.block, strict=True))
    mask = np.ones((*q.shape[:2], *blocks), bool) if mask is None else mask
    out, lse = np.zeros(q.shape, np.float32), np.full(q.shape[:3], -np.inf, np.float32)
    for b, h, i in np.ndindex(mask.shape[:3]):
        valid = k.shape[2] if lengths is None else min(max(lengths[b], 0), k.shape[2])
        rows = order[: valid if op.lengths_on_queries else None][i * op.block[0] : (i + 1) * op.block[0]]
        kept = kv_order[np.flatnonzero(np.repeat(mask[b, h, i], op.block[1])[:valid])]
        if kept.size:
            keys, values = (x[b, h * k.shape[1] // q.shape[1], kept].astype(np.float32) for x in (k, v))
            logits = q[b, h, rows].astype(np.float32) @ keys.T * np.float32(op.scale)
            peak = logits.max(axis=-1, keepdims=True)
            weights = np.exp(logits - peak)
            out[b, h, rows] = weights @ values / weights.sum(axis=-1, keepdims=True)
            lse[b, h, rows] = peak[:, 0] + np.log(weights.sum(axis=-1))
    return out, lse
