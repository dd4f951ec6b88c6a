"""How many kernels oneDNN keeps, inside OpenVINO's CPU plugin, for all models of a process together.

oneDNN compiles a kernel for every new shape and keeps 1024, about 0.3 MB each: memory grows by 300 MB over the first
200 shapes. It reads the limit from the environment, once, when it first compiles one. So a small model runs while the
variable is set, and other users of oneDNN in the process (torch has its own) never see it.
"""

from __future__ import annotations

import os

import numpy as np

from rainfusion.backends.openvino.vendor import op, ov

KEPT = 640  # a plan takes about five, and 128 plans are kept lowered
_VARIABLE = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"
_NAMES = (_VARIABLE, "DNNL_PRIMITIVE_CACHE_CAPACITY")  # the older one is read, too


def limit(core: ov.Core) -> None:
    """Have oneDNN keep `KEPT` kernels, unless the user says how many, or OpenVINO has run a model before."""
    if any(name in os.environ for name in _NAMES):
        return
    os.environ[_VARIABLE] = str(KEPT)
    try:
        _compile_a_kernel(core)
    finally:
        os.environ.pop(_VARIABLE, None)


def _compile_a_kernel(core: ov.Core) -> None:
    a, b = (op.parameter([-1, -1], np.float32) for _ in range(2))
    model = core.compile_model(ov.Model([op.matmul(a, b, False, False)], [a, b]), "CPU", {"NUM_STREAMS": 1})
    model([np.ones((2, 2), np.float32), np.ones((2, 2), np.float32)])
