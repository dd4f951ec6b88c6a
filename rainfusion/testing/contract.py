"""The contract: what a backend must be, before any number is looked at."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest

from rainfusion.core.arrays import dtype_name
from rainfusion.core.backend import Capabilities, Device
from rainfusion.core.choice import candidates, choose
from rainfusion.core.errors import MaskError, NoBackendError, ProblemError, RainfusionError
from rainfusion.core.executable import Executable
from rainfusion.core.mask import BlockMask
from rainfusion.core.policies import Fixed, TopK
from rainfusion.core.problem import DTYPES, TENSOR_LAYOUTS
from rainfusion.plugins.manager import host
from rainfusion.testing.cases import Case, claimed_case, every_case
from rainfusion.testing.level import Level, fail_if
from rainfusion.testing.numbers import rounded, worst_error
from rainfusion.testing.observation import Observation, verdict
from rainfusion.testing.observe import with_output
from rainfusion.testing.oracle import expected_value
from rainfusion.testing.target import Target


class Contract(Level):
    """Announcement, devices, claims, arrays, results, threads, refusals."""

    def test_contract_announcement(self, target: Target) -> None:
        """One plugin announces the backend, with requirements that are here."""
        spec = host().announced(target.backend.name).spec
        missing = [name for name in spec.requires if find_spec(name) is None]
        fail_if([f"it requires {name}, which cannot be imported" for name in missing], spec)

    def test_contract_devices(self, target: Target) -> None:
        """Devices are `Device`s with addresses of their own, listed alike twice."""
        devices = list(target.backend.devices())
        addresses = [str(d) for d in devices]
        assert all(isinstance(d, Device) and d.type for d in devices), devices
        assert len({*addresses}) == len(addresses), f"two devices have one address: {addresses}"
        assert list(target.backend.devices()) == devices, "devices() answers differently when asked again"

    def test_contract_claims(self, target: Target) -> None:
        """Capabilities use known names, and claim something."""
        claims = target.capabilities
        assert isinstance(claims, Capabilities), claims
        assert claims.dtypes, "it claims no dtype"
        assert claims.dtypes <= {*DTYPES}, f"unknown dtypes: {sorted(claims.dtypes - {*DTYPES})}"
        assert claims.tensor_layouts, "it claims no tensor layout"
        assert claims.tensor_layouts <= {*TENSOR_LAYOUTS}, f"unknown layouts: {sorted(claims.tensor_layouts)}"
        assert all(len(block) == 2 and min(block) > 0 for block in claims.blocks or ()), claims.blocks
        preference = target.backend.preference(_case(target).plan(), target.device)
        assert isinstance(preference, int), f"preference is {preference!r}"

    def test_contract_foreign_objects_are_not_its_arrays(self, target: Target) -> None:
        """`device_of` answers None for what is no array, instead of raising."""
        for thing in (None, object(), 1.0, [[1.0]], "cuda:0"):
            assert target.backend.device_of(thing) is None, f"device_of({thing!r}) is not None"

    def test_contract_arrays(self, target: Target, dtype: str) -> None:
        """Values travel to the device and back unchanged, in every claimed dtype."""
        _skip_unless_in(target, dtype)
        values = rounded(np.linspace(-3, 3, 2 * 3 * 5 * 7).reshape(2, 3, 5, 7), dtype)
        array = target.backend.from_host(values.astype(_wide(dtype)), target.device, dtype)
        _check_kind(array, array, dtype, values.shape, target)
        assert worst_error(target.to_float64(array), values) == 0, "the values changed on the way"

    @pytest.mark.parametrize("constant", [np.arange(6), np.arange(6) % 2 == 0], ids=["int64", "bool"])
    def test_contract_constants(self, target: Target, constant: np.ndarray) -> None:
        """Index vectors and masks travel as they are where no dtype is named."""
        array = target.backend.from_host(constant, target.device)
        assert dtype_name(array) == constant.dtype.name
        assert np.array_equal(target.backend.to_host(array), constant)

    def test_contract_results(self, target: Target, dtype: str) -> None:
        """Results are like q in kind, dtype, device and shape; the log-sum-exp is float32 (or float64)."""
        _skip_unless_in(target, dtype)
        returns = ("%out", "%lse", "%mask") if target.capabilities.lse else ("%out", "%mask")
        for tensor_layout in sorted(target.capabilities.tensor_layouts):
            case = _case(target, dtype=dtype, tensor_layout=tensor_layout, returns=returns)
            tensors = target.tensors(case)
            results = dict(zip(returns, target.lower(case.plan())(*tensors), strict=True))
            _check_kind(results["%out"], tensors[0], dtype, case.problem.q_shape, target)
            if "%lse" in results:
                shape = (case.problem.batch, case.problem.heads, case.problem.q_len)
                _check_kind(results["%lse"], tensors[0], _wide(dtype), shape, target)
            assert isinstance(results["%mask"], BlockMask)
            assert str(target.backend.device_of(results["%mask"].blocks)) == str(target.device)

    def test_contract_same_answer_again(self, target: Target) -> None:
        """The same inputs give the same bits, from one executable twice and from another."""
        case = _case(target)
        tensors, executable = target.tensors(case), target.lower(case.plan())
        first, again = (_out(executable, tensors, target) for _ in range(2))
        other = _out(target.lower(case.plan()), tensors, target)
        assert worst_error(again, first) == 0, "a second call gives other bits"
        assert worst_error(other, first) == 0, "lowering again gives other bits"

    def test_contract_two_threads(self, target: Target) -> None:
        """One executable, called from two threads at once, gives what it gives to one."""
        case = _case(target)
        executable = target.lower(case.plan())
        inputs = [target.tensors(replace(case, seed=seed)) for seed in (1, 2)]
        alone = [_out(executable, tensors, target) for tensors in inputs]
        with ThreadPoolExecutor(max_workers=2) as pool:
            together = list(pool.map(lambda i: _out(executable, inputs[i % 2], target), range(8)))
        assert all(worst_error(out, alone[i % 2]) == 0 for i, out in enumerate(together)), "threads disturb each other"

    def test_contract_inputs_are_left_alone(self, target: Target, dtype: str) -> None:
        """A call changes neither tensors nor mask."""
        _skip_unless_in(target, dtype)
        case = _case(target, policy=Fixed(), dtype=dtype)
        tensors, mask = target.tensors(case), target.mask(case.mask())
        before = [np.array(target.backend.to_host(x)) for x in (*tensors, mask.blocks)]
        target.lower(case.plan())(*tensors, mask=mask)
        after = [target.backend.to_host(x) for x in (*tensors, mask.blocks)]
        assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True)), "an input was written to"

    def test_contract_other_tensors_are_refused(self, target: Target) -> None:
        """Other shapes and dtypes than were planned, and things that are no arrays, raise a ProblemError."""
        case = _case(target)
        q, k, v = target.tensors(case)
        executable = target.lower(case.plan())
        _refused(ProblemError, lambda: executable(q, k[:, :, :-1], v[:, :, :-1]), "keys of another shape")
        _refused(ProblemError, lambda: executable([[0.0]], k, v), "a list")
        for dtype in target.capabilities.dtypes - {case.problem.dtype}:
            other = target.tensors(_case(target, dtype=dtype))
            _refused(ProblemError, lambda other=other: executable(*other), f"tensors in {dtype}")  # type: ignore[misc]

    def test_contract_other_masks_are_refused(self, target: Target) -> None:
        """A mask that is missing, not due, or of another problem raises a MaskError."""
        case = _case(target, policy=Fixed())
        tensors, mask = target.tensors(case), target.mask(case.mask())
        given, selects = (target.lower(case.plan(policy=policy)) for policy in (Fixed(), TopK(0.5)))
        rows, columns = case.layout.block
        foreign = BlockMask(mask.blocks, mask.blocks.shape[2] * 2 * rows, mask.kv_len, (2 * rows, columns))
        _refused(MaskError, lambda: given(*tensors), "no mask")
        _refused(MaskError, lambda: selects(*tensors, mask=mask), "a mask for a policy that selects one")
        _refused(MaskError, lambda: given(*tensors, mask=foreign), "a mask of another problem")

    def test_contract_means_and_scores(self, target: Target, dtype: str) -> None:
        """Block means and scores are returned on request: float32 (or float64), in the oracle's tolerance."""
        _skip_unless_in(target, dtype)
        case = _case(target, dtype=dtype, returns=("%qb", "%kb", "%score"))
        results = target.lower(case.plan())(*target.tensors(case))
        for name, value in zip(case.returns, results, strict=True):
            right, limit = expected_value(case, name)
            assert (dtype_name(value), tuple(value.shape)) == (_wide(dtype), right.shape), name
            error = worst_error(target.to_float64(value), right)
            assert error <= limit, f"{name} is off by {error:.3g} (at most {limit:.3g})"

    def test_contract_gradients_are_refused(self, target: Target) -> None:
        """A tensor that requires a gradient raises a ProblemError where gradients are on: there is no backward."""
        case = _case(target)
        executable, (q, k, v) = target.lower(case.plan()), target.tensors(case)
        _torch_of(q, target)
        _refused(ProblemError, lambda: executable(q.requires_grad_(), k, v), "q that requires a gradient")

    def test_contract_autocast_does_not_reach_the_kernels(self, target: Target) -> None:
        """Under the caller's autocast a call gives the same bits."""
        case = _case(target, **{"dtype": "float32"} if "float32" in target.capabilities.dtypes else {})
        executable, tensors = target.lower(case.plan()), target.tensors(case)
        torch = _torch_of(tensors[0], target)
        alone = _out(executable, tensors, target)
        with torch.autocast(target.device.type, torch.bfloat16):
            assert worst_error(_out(executable, tensors, target), alone) == 0, "autocast changes the output"

    def test_contract_what_is_not_claimed_is_refused(self, target: Target) -> None:
        """Choosing the backend for a case beyond its claims is refused, with the capability in the table."""
        beyond = [case for case in every_case() if target.objections(case)]
        if not beyond:
            pytest.skip(f"{target} claims every case")
        for case in beyond:
            able, refusals = candidates(case.plan(), [target.backend], device=str(target.device))
            with pytest.raises(NoBackendError) as refusal:
                choose(case.plan(), able, refusals, target.backend.name, lambda plan, able: None)
            assert target.objections(case) in str(refusal.value)

    def test_contract_every_claimed_shape(self, target: Target) -> None:
        """Every head dim and block shape that is claimed by name computes the right thing."""
        claims = target.capabilities
        shapes: list[dict[str, Any]] = [{"head_dim": dim} for dim in sorted(claims.head_dims or ())]
        shapes += [{"block": block} for block in sorted(claims.blocks or ())]
        if not shapes:
            pytest.skip(f"{target} claims any head dim and any block; the cases cover both")
        for shape in shapes:
            case = _case(target, **shape)
            got = target.under(case, case.mask(), lse=claims.lse)
            fail_if(verdict(with_output(Observation("attend", str(shape)), case, case.mask(), got)), shape)


def _skip_unless_in(target: Target, dtype: str) -> None:
    if dtype not in target.capabilities.dtypes:
        pytest.skip(f"{target} does not claim dtype {dtype}")


def _case(target: Target, **settings: Any) -> Case:
    return claimed_case(target.capabilities, **settings)


def _wide(dtype: str) -> str:
    return "float64" if dtype == "float64" else "float32"


def _torch_of(array: Any, target: Target) -> Any:
    """The torch module, where a backend's arrays are its tensors."""
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(array, torch.Tensor):
        pytest.skip(f"the arrays of {target} are not torch tensors")
    return torch


def _out(executable: Executable, tensors: Iterable[Any], target: Target) -> np.ndarray:
    return target.results(executable.plan, executable(*tensors))["%out"]


def _check_kind(array: Any, q: Any, dtype: str, shape: tuple[int, ...], target: Target) -> None:
    home = target.backend.device_of(array)
    given = (type(array), dtype_name(array), tuple(array.shape), str(home))
    assert given == (type(q), dtype, shape, str(target.device)), f"a result is {given}"


def _refused(error: type[RainfusionError], call: Callable[[], Any], what: str) -> None:
    try:
        call()
    except error:
        return
    except Exception as other:
        raise AssertionError(f"{what}: refused with {type(other).__name__}, not {error.__name__}: {other}") from other
    raise AssertionError(f"{what}: not refused")
