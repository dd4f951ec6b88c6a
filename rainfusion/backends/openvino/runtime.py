"""OpenVINO itself: its devices, how models are compiled for them, and requests that share the work.

Every model is compiled with an explicit precision: the CPU plugin's own default runs float32 models in
bfloat16 where the CPU has it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import numpy as np

from rainfusion.backends.openvino import primitives
from rainfusion.backends.openvino.processes import per_process
from rainfusion.backends.openvino.tensors import tensor_on
from rainfusion.backends.openvino.vendor import ov
from rainfusion.core.backend import Device
from rainfusion.core.errors import BackendUnavailableError
from rainfusion.core.locks import ProcessLock

CACHE_FOLDER = "RAINFUSION_OPENVINO_CACHE"
HOME = "RAINFUSION_OPENVINO_DEVICE"

Arrays = Sequence[np.ndarray]

# Kernels that the CPU plugin keeps for shapes it has seen, a stream of a model. It keeps 5000 unless told otherwise,
# which grow to gigabytes as resolutions change.
_KERNELS_KEPT = 64


@per_process
def core() -> ov.Core:
    """The OpenVINO core of this process; compiled models are kept on disk where the user names a folder."""
    made = ov.Core()
    folder = os.environ.get(CACHE_FOLDER)
    if folder:
        made.set_property({"CACHE_DIR": folder})
    return made


@per_process
def found_devices() -> tuple[Device, ...]:
    """Every device OpenVINO names, in its order, with its full name."""
    return tuple(_device(name) for name in core().available_devices)


def home() -> Device:
    """The device that computes on tensors in host memory: the CPU, or the one the user names in ``HOME``.

    Raises:
        BackendUnavailableError: OpenVINO finds no such device.
    """
    address = (os.environ.get(HOME) or "cpu").lower()
    for device in found_devices():
        if address in (str(device), device.type):
            return device
    found = ", ".join(map(str, found_devices())) or "none"
    raise BackendUnavailableError(f"{HOME}={address!r} is no device that OpenVINO finds here; choose one of: {found}")


def _device(name: str) -> Device:
    kind, _, index = name.partition(".")
    full_name = str(core().get_property(name, "FULL_DEVICE_NAME"))
    return Device(kind.lower(), int(index) if index.isdigit() else None, full_name)


def plugin_name(device: Device) -> str:
    """What OpenVINO calls a device: ``CPU``, ``GPU.0``."""
    kind = device.type.upper()
    return kind if device.index is None else f"{kind}.{device.index}"


@per_process
def abilities(device: Device) -> frozenset[str]:
    """What the device says it computes in natively: ``FP32``, ``BF16``, ``FP16``, ..."""
    return frozenset(core().get_property(plugin_name(device), "OPTIMIZATION_CAPABILITIES"))


def computes_in(dtype: str, device: Device) -> str:
    """The dtype in which tensors of `dtype` are multiplied on `device`; float32 where it cannot keep their precision.

    float16 on a CPU is widened: there its products are summed up, and its softmax taken, in 16 bits.
    """
    ability = {"bfloat16": "BF16", "float16": "" if device.type == "cpu" else "FP16"}.get(dtype)
    return dtype if ability in abilities(device) else "float32"


@per_process
def parallel_streams(device: Device) -> int:
    """How many requests the device runs at once when each has one core (CPU) or queue (GPU)."""
    return int(core().get_property(plugin_name(device), "RANGE_FOR_STREAMS")[1])


@per_process
def _limit_primitives() -> None:
    primitives.limit(core())


def compiled(model: ov.Model, device: Device, precision: ov.Type, streams: int) -> ov.CompiledModel:
    """Compile `model` in exactly `precision`, for `streams` requests at a time.

    Raises:
        BackendUnavailableError: the device does not take the model; the message is its own.
    """
    settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": precision, "NUM_STREAMS": streams}
    if device.type == "cpu":
        _limit_primitives()
        settings["INFERENCE_NUM_THREADS"] = parallel_streams(device)
        settings["CPU_RUNTIME_CACHE_CAPACITY"] = _KERNELS_KEPT
    try:
        return core().compile_model(model, plugin_name(device), settings)
    except RuntimeError as error:
        said = str(error).strip().splitlines()[-1]
        raise BackendUnavailableError(f"openvino on {device} does not compile {model.friendly_name}: {said}") from error


class Requests:
    """The infer requests of one model, two a stream so that none waits for its next piece of work.

    Calls are taken one after the other: each keeps every stream busy, so nothing is lost, and two threads
    never write into one request. After a failure the model is compiled again: a request that fails half way leaves the
    shapes it had in the plugin's graph, and the next would find them there.

    Args:
        model, device, precision, streams: as `compiled`.
    """

    def __init__(self, model: ov.Model, device: Device, precision: ov.Type, streams: int) -> None:
        self._compile = partial(compiled, model, device, precision, streams)
        self._count = 2 * streams if streams > 1 else 1
        self._lock = ProcessLock()
        self._requests = self._made()

    def _made(self) -> list[ov.InferRequest]:
        model = self._compile()
        return [model.create_infer_request() for _ in range(self._count)]

    def run(self, common: Arrays, pieces: Iterable[tuple[Arrays, Arrays]]) -> None:
        """Run the model once a piece.

        Args:
            common: the first inputs, the same for every piece.
            pieces: (the other inputs, the arrays that receive the outputs); made while others run.

        Raises:
            RuntimeError: what OpenVINO says where a request fails. No request is running afterwards.
        """
        with self._lock:
            try:
                self._run(common, pieces)
            except BaseException:
                self._stop()
                self._requests = []
                raise

    def _run(self, common: Arrays, pieces: Iterable[tuple[Arrays, Arrays]]) -> None:
        self._requests = self._requests or self._made()
        shared = [tensor_on(array) for array in common]
        for request in self._requests:
            for at, tensor in enumerate(shared):
                request.set_input_tensor(at, tensor)
        alive: dict[int, Any] = {}  # tensors do not keep the arrays below them
        for number, (inputs, outputs) in enumerate(pieces):
            turn = number % len(self._requests)
            request = self._requests[turn]
            if turn in alive:
                request.wait()
            alive[turn] = (inputs, outputs)
            for at, array in enumerate(inputs):
                request.set_input_tensor(len(shared) + at, tensor_on(array))
            for at, array in enumerate(outputs):
                request.set_output_tensor(at, tensor_on(array))
            request.start_async()
        for turn in alive:
            self._requests[turn].wait()

    def _stop(self) -> None:
        for request in self._requests:
            request.cancel()
        for request in self._requests:
            try:
                request.wait()
            except RuntimeError:  # it failed or was cancelled; the first reason is on its way up
                continue
