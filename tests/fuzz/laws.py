"""The laws that a problem is put through on a backend: cheap ones always, dear ones for one problem in many."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch

import rainfusion
from tests.fuzz.oracle import Expected, Oracle
from tests.fuzz.problems import Part, Problem, array_of, mask_of, quotas_of

_UNIT = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}


_WITHOUT_FLOAT64 = ("openvino", "triton")


class LawBroken(AssertionError):
    """What a backend, or the core, does other than the documentation says."""


@dataclass
class Subject:
    """A problem with its tensors and its oracle; what is right is worked out once for all backends.

    Attributes:
        device: where torch tensors lie, ``"cpu"`` or such as ``"cuda:0"``.
    """

    problem: Problem
    device: str = "cpu"
    oracle: Oracle = field(init=False)

    def __post_init__(self) -> None:
        self.oracle = Oracle(self.problem, dict(self.problem.tensors))
        self._poison()
        self._expected: dict[tuple[bytes, str, bool], Expected] = {}

    def expected(self, mask: np.ndarray, omitted: str, *, given: bool = False) -> Expected:
        """What is right over the blocks of a mask, which a call was given or chose."""
        key = (np.packbits(mask).tobytes(), omitted, given)
        if key not in self._expected:
            self._expected[key] = self.oracle.attend(mask, omitted, given=given, fast_products=self.device != "cpu")
        return self._expected[key]

    @cached_property
    def quotas(self) -> np.ndarray | None:
        oracle = self.oracle
        return quotas_of(self.problem, oracle.q.free, oracle.kv.free) if self.problem.with_quotas else None

    def _poison(self) -> None:
        """NaN into what is padding, or into one token."""
        problem, oracle = self.problem, self.oracle
        tensors = oracle.tensors
        if problem.poison in ("k", "v"):
            token = int(problem.rng(2).integers(problem.kv_len))
            tensors[problem.poison] = tensors[problem.poison].copy()
            tensors[problem.poison][:, :, token] = np.nan
        if problem.poison == "padding":
            for name, side, lengths in (
                ("q", oracle.q, oracle.q_lengths),
                ("k", oracle.kv, oracle.lengths),
                ("v", oracle.kv, oracle.lengths),
            ):
                valid = np.empty((problem.batch, len(side.order)), dtype=bool)
                valid[:, side.order] = side.valid(lengths)
                tensors[name] = np.where(valid[:, None, :, None], tensors[name], np.nan)


class Trial:
    """A subject on one backend: its arrays, its arguments, and what the first call gave."""

    def __init__(self, subject: Subject, backend: str) -> None:
        self.subject, self.backend = subject, backend
        self.problem, self.oracle = subject.problem, subject.oracle
        self.kind = "torch" if backend in ("torch", "triton") else self.problem.kind
        self.arrays = {
            name: array_of(self.problem, name, x, self.kind, subject.device) for name, x in self.oracle.tensors.items()
        }

    @cached_property
    def operands(self) -> dict[str, Any]:
        """Lengths and quotas, as NumPy arrays or on the tensors' side."""
        given = {"kv_lengths": self.problem.lengths, "quotas": self.subject.quotas}
        as_tensors = self.kind == "torch" and self.problem.seed % 2 == 0
        return {name: self.tensor(x) if as_tensors else x for name, x in given.items() if x is not None}

    @cached_property
    def choice(self) -> dict[str, Any]:
        """The arguments that say what to attend, without operands."""
        problem = self.problem
        if problem.choice.kind == "mask":
            grid = mask_of(problem, self.oracle.q.blocks, self.oracle.kv.blocks)
            layout = problem.layout() if problem.seed % 2 else None
            return {
                "mask": self.block_mask(grid, layout),
                **({"policy": rainfusion.Fixed()} if problem.seed % 3 else {}),
            }
        if problem.choice.kind == "quotas":
            return {}
        if problem.choice.kind == "topk" and problem.seed % 3 and not problem.with_quotas:
            return {"sparsity": problem.choice.sparsity}
        return {"policy": problem.choice.policy()}

    def block_mask(self, grid: np.ndarray, layout: Any = None) -> rainfusion.BlockMask:
        problem = self.problem
        blocks = self.tensor(grid) if self.kind == "torch" else grid
        return rainfusion.BlockMask(blocks, problem.q_len, problem.kv_len, problem.block, layout)

    def tensor(self, x: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.array(x)).to(self.subject.device)

    def attention(self, *, lse: bool, mask: bool, **changed: Any) -> tuple[Any, ...]:
        """`rainfusion.attention` as the problem asks for it, its results as a tuple."""
        said = {**self.problem.settings, **self.choice, **self.operands, **changed}
        arrays = self.arrays
        got = rainfusion.attention(
            arrays["q"], arrays["k"], arrays["v"], return_lse=lse, return_mask=mask, backend=self.backend, **said
        )
        return got if isinstance(got, tuple) else (got,)

    def plan(self) -> rainfusion.Plan:
        p, (lse, mask) = self.problem, self.problem.returns
        shape = rainfusion.AttentionProblem(
            p.batch, p.heads, p.q_len, p.kv_len, p.head_dim, p.dtype, p.kv_heads, p.scale, p.tensor_layout
        )
        policy = rainfusion.Fixed() if p.choice.kind == "mask" else p.choice.policy()
        return rainfusion.plan(
            shape,
            p.layout(),
            policy,
            omitted=p.omitted,
            order=p.order,
            returns=("%out", *["%lse"] * lse, *["%mask"] * mask),
            quotas=p.with_quotas,
            kv_lengths=p.lengths is not None,
            **p.precision_settings,
        )


# -- laws of a problem, whatever the backend -----------------------------------------------------------


def check_layout(subject: Subject) -> None:
    """The block order, its inverse, the protected ranges and the two sides are those of the oracle."""
    problem, oracle = subject.problem, subject.oracle
    layout = problem.layout()
    _need(layout == rainfusion.TokenLayout.from_dict(layout.to_dict()), "a layout comes back from JSON as another")
    twin = pickle.loads(pickle.dumps(layout))
    _need(layout == twin and hash(layout) == hash(twin), "a layout comes back from pickle as another")
    for side, length, own in ((0, problem.q_len, oracle.q), (1, problem.kv_len, oracle.kv)):
        axis = layout.axis(length, side)
        _need((axis.blocks, axis.free_blocks) == (own.blocks, own.free), f"side {side} has other blocks: {axis}")
        _need(np.array_equal(axis.counts, own.counts(None)[0]), f"side {side} has other token counts")
    if layout.order is None:
        return
    order = replace(oracle.problem, order="window")
    right = Oracle(order, oracle.tensors)
    side = right.q if problem.q_len == layout.length else right.kv
    _need(np.array_equal(layout.order, side.order), "the block order is another")
    _need(np.array_equal(layout.inverse, np.argsort(side.order)), "the inverse of the block order is another")
    _need(layout.is_ordered or np.array_equal(layout.order, np.arange(layout.length)), "is_ordered is wrong")
    tokens = np.arange(layout.length)
    _need(np.array_equal(layout.from_blocks(layout.to_blocks(tokens, 0), 0), tokens), "from_blocks undoes to_blocks")
    _check_protected(layout, problem.parts)


def _check_protected(layout: rainfusion.TokenLayout, parts: tuple[Part, ...]) -> None:
    stops = [layout.length, *[r.start for r in reversed(layout.protected)]]
    _need([r.stop for r in reversed(layout.protected)] == stops[:-1], "protected ranges have gaps")
    text = sum(part.count for part in parts if part.kind == "text")
    said = sum(r.stop - r.start for r in layout.protected if r.name.startswith("text"))
    _need(said == text, "the text is not what is protected as text")


# -- laws of a problem on a backend --------------------------------------------------------------------


def check(trial: Trial) -> None:
    """Every law that this problem is due.

    Raises:
        LawBroken: one does not hold.
    """
    problem, rng = trial.problem, trial.problem.rng(5)
    before = {name: _bits(x) for name, x in trial.arrays.items()}
    lse, mask = problem.returns
    results = trial.attention(lse=lse, mask=mask)
    grid = check_mask(trial, results[-1] if mask else None)
    check_numbers(trial, results, grid)
    again = trial.attention(lse=lse, mask=mask)
    _need(all(_bits(a) == _bits(b) for a, b in zip(results, again, strict=True)), "the same call gives other bits")
    check_plan(trial, grid)
    for chance, law in _SELDOM:
        if rng.random() < chance:
            law(trial, results, grid)
    _need(all(_bits(x) == before[name] for name, x in trial.arrays.items()), "an input was written to")


def check_mask(trial: Trial, returned: Any) -> np.ndarray:
    """The mask that was used is one that the problem allows: bool ``[batch, heads, q blocks, key blocks]``."""
    problem = trial.problem
    if problem.choice.kind == "mask":
        given = trial.choice["mask"]
        _need(returned is None or returned is given, "another mask is returned than was given")
        return _host(given.blocks).astype(bool)
    selected = returned
    if returned is None or problem.precision is not None or problem.rng(8).random() < 0.2:
        said = {**problem.settings, **trial.choice, **trial.operands}
        said = {name: x for name, x in said.items() if name not in problem.precision_settings}  # it selects nothing
        selected = rainfusion.select(trial.arrays["q"], trial.arrays["k"], backend=trial.backend, **said)
    grid = _host(selected.blocks).astype(bool)
    _need(returned is None or np.array_equal(_host(returned.blocks), grid), "select gives another mask than attention")
    shape = (problem.batch, problem.heads, trial.oracle.q.blocks, trial.oracle.kv.blocks)
    _need(grid.shape == shape, f"a mask of {grid.shape} where {shape} is due")
    _need(selected.layout == problem.layout(), "the mask names another layout")
    _need(selected.density == grid.mean(), "the mask's density is not the share of its pairs")
    objections = trial.oracle.objections(grid, trial.subject.quotas)
    _need(not objections, "; ".join(objections))
    return grid


def check_numbers(trial: Trial, results: tuple[Any, ...], grid: np.ndarray) -> None:
    """Output and log-sum-exp are those of the oracle under that mask, in the caller's kind, dtype and shape."""
    problem = trial.problem
    right = trial.subject.expected(grid, problem.omitted)
    out, q = results[0], trial.arrays["q"]
    _need(type(out) is type(q) and out.dtype == q.dtype, f"the output is {type(out).__name__} {out.dtype}")
    _need(tuple(out.shape) == tuple(q.shape), f"the output has shape {tuple(out.shape)}")
    _compare("the output", _heads_first(trial, out), right.out, right.out_limit)
    if problem.returns[0]:
        lse = results[1]
        dtype = "float64" if problem.dtype == "float64" else "float32"
        _need(str(lse.dtype).endswith(dtype), f"the log-sum-exp is {lse.dtype}")
        _compare("the log-sum-exp", _host(lse), right.lse, right.lse_limit)


def check_plan(trial: Trial, grid: np.ndarray) -> None:
    """The plan comes back from JSON and pickle as it was, and its density is that of the mask."""
    plan = trial.plan()
    read = rainfusion.Plan.from_json(plan.to_json())
    _need(read == plan and read.key == plan.key and str(read) == str(plan), "a plan comes back from JSON as another")
    _need(pickle.loads(pickle.dumps(plan)) == plan, "a plan comes back from pickle as another")
    if plan.row_counts is None:
        return
    counts = grid.sum(axis=-1)
    _need((counts == plan.row_counts).all(), "rows keep other numbers of blocks than the plan says")
    _need(abs(plan.density - grid.mean()) < 1e-12, f"the plan says density {plan.density}, the mask {grid.mean()}")


def check_merge(trial: Trial, results: tuple[Any, ...], grid: np.ndarray) -> None:
    """Attention over two halves of the kept blocks, merged, is attention over all of them."""
    problem = trial.problem
    if problem.omitted != "drop":
        return
    half = problem.rng(6).random(grid.shape) < 0.5
    settings = {name: x for name, x in trial.operands.items() if name == "kv_lengths"}
    halves = []
    for part in (grid & half, grid & ~half):
        arrays = trial.arrays
        out, lse = rainfusion.attention(
            arrays["q"],
            arrays["k"],
            arrays["v"],
            mask=trial.block_mask(part),
            return_lse=True,
            backend=trial.backend,
            **settings,
            **problem.settings,
        )
        halves += [out, lse]
    out, lse = rainfusion.merge(*halves, tensor_layout=problem.tensor_layout)
    right = trial.subject.expected(grid, "drop", given=True)
    largest = np.max(np.abs(trial.oracle.tensors["v"]), initial=0.0, where=np.isfinite(trial.oracle.tensors["v"]))
    rounding = 4 * _UNIT[problem.dtype] * largest
    _compare("merged output", _heads_first(trial, out), right.out, 4 * right.out_limit + right.weights_limit + rounding)
    _compare("merged log-sum-exp", _host(lse), right.lse, 4 * right.lse_limit)


def check_lowered(trial: Trial, results: tuple[Any, ...], grid: np.ndarray) -> None:
    """A plan read from JSON and lowered gives the bits of `attention`."""
    plan = rainfusion.Plan.from_json(trial.plan().to_json())
    run = rainfusion.lower(plan, like=trial.arrays["q"], backend=trial.backend)
    given = {name: x for name, x in trial.operands.items() if plan.takes(f"%{name}")}
    given |= {"mask": trial.choice["mask"]} if plan.takes("%mask") else {}
    got = run(*trial.arrays.values(), **given)
    got = got if isinstance(got, tuple) else (got,)
    _need(all(_bits(a) == _bits(b) for a, b in zip(got, results, strict=True)), "a lowered plan gives other bits")


def check_means(trial: Trial, results: tuple[Any, ...], grid: np.ndarray) -> None:
    """`block_means` are the oracle's."""
    problem, oracle = trial.problem, trial.oracle
    if problem.layout().length not in (None, problem.kv_len):
        return  # the keys are no sequence of this layout
    lengths = {name: x for name, x in trial.operands.items() if name == "kv_lengths"}
    settings = {name: x for name, x in problem.settings.items() if name not in ("omitted", "scale")}
    for name, side in (("k", oracle.kv), *([("q", oracle.q)] if problem.q_len == problem.kv_len else [])):
        got = rainfusion.block_means(
            trial.arrays[name], side="q" if name == "q" else "kv", backend=trial.backend, **lengths, **settings
        )
        x = oracle.tensors[name][:, :, side.order]
        x = np.where(side.valid(oracle.lengths)[:, None, :, None], x, 0.0)
        right = oracle.means(x, side, oracle.lengths)
        largest = float(np.max(np.abs(x), initial=0.0, where=np.isfinite(x)))
        wide = "float64" if problem.dtype == "float64" else "float32"
        _compare(f"means of {name}", _host(got), right, side.block * _UNIT[wide] * largest + 2.0**-300)


def check_mask_forms(trial: Trial, results: tuple[Any, ...], grid: np.ndarray) -> None:
    """A mask in another form and back is the same mask, and given again it changes nothing."""
    problem = trial.problem
    mask = trial.block_mask(grid, problem.layout())
    counts, indices = mask.to_kv_indices()
    sizes = (problem.q_len, problem.kv_len, problem.block)
    for name, other in (
        ("packed", mask.packed().unpacked()),
        ("kv_indices", rainfusion.BlockMask.from_kv_indices(counts, indices, *sizes)),
        ("bits", rainfusion.BlockMask.from_bits(mask.to_bits(), *sizes)),
    ):
        _need(np.array_equal(_host(other.blocks), grid), f"a mask comes back from {name} as another")
    arrays, lengths = trial.arrays, {n: x for n, x in trial.operands.items() if n == "kv_lengths"}
    got = rainfusion.attention(
        arrays["q"], arrays["k"], arrays["v"], mask=mask, backend=trial.backend, **lengths, **problem.settings
    )
    right = trial.subject.expected(grid, problem.omitted, given=True)
    _compare("the output under the mask given again", _heads_first(trial, got), right.out, right.out_limit)


def check_compiled(trial: Trial, results: tuple[Any, ...], grid: np.ndarray) -> None:
    """Under `torch.compile` a call gives the bits that it gives by itself."""
    if trial.kind != "torch" or trial.problem.choice.kind == "mask":
        return
    operands = {name: torch.as_tensor(x, device=trial.subject.device) for name, x in trial.operands.items()}
    lse, mask = trial.problem.returns
    said = {**trial.problem.settings, **trial.choice, **operands, "return_lse": lse, "return_mask": mask}
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda q, k, v: rainfusion.attention(q, k, v, backend=trial.backend, **said),
        backend="aot_eager",
        fullgraph=True,
    )
    with torch.no_grad():
        got = compiled(*trial.arrays.values())
    got = got if isinstance(got, tuple) else (got,)
    torch._dynamo.reset()
    _need(all(_bits(a) == _bits(b) for a, b in zip(got, results, strict=True)), "a compiled call gives other bits")


_Law = Callable[[Trial, tuple[Any, ...], np.ndarray], None]
_SELDOM: tuple[tuple[float, _Law], ...] = (
    (0.25, check_merge),
    (0.2, check_lowered),
    (0.2, check_means),
    (0.2, check_mask_forms),
    (0.003, check_compiled),
)


def _need(holds: Any, message: str) -> None:
    if not holds:
        raise LawBroken(message)


def _compare(name: str, got: np.ndarray, right: np.ndarray, limit: float) -> None:
    _need(got.shape == right.shape, f"{name} has shape {got.shape} where {right.shape} is due")
    wrong = np.isnan(got) != np.isnan(right)
    if wrong.any():
        raise LawBroken(
            f"{name} has NaN in another place: {int(wrong.sum())}, the first at {_at(np.argwhere(wrong)[0])}"
        )
    with np.errstate(invalid="ignore"):
        error = np.where((got == right) | np.isnan(right), 0.0, np.abs(got - right))
    worst = np.unravel_index(np.argmax(error), error.shape)
    _need(error[worst] <= limit, f"{name} is {got[worst]} for {right[worst]} at {_at(worst)}, allowed {limit:.3g}")


def _at(index: Any) -> str:
    return str(tuple(int(i) for i in index))


def _host(x: Any) -> np.ndarray:
    """An array of either kind in float64."""
    return x.to(torch.float64).cpu().numpy() if isinstance(x, torch.Tensor) else np.asarray(x).astype(np.float64)


def _heads_first(trial: Trial, x: Any) -> np.ndarray:
    return _host(x) if trial.problem.tensor_layout == "bhsd" else _host(x).swapaxes(1, 2)


def _bits(x: Any) -> bytes:
    if isinstance(x, rainfusion.BlockMask):
        x = x.blocks
    if isinstance(x, torch.Tensor):
        x = x.contiguous().view(torch.uint8 if x.ndim else x.dtype).cpu().numpy()
    return bytes(np.ascontiguousarray(x).tobytes())


def broken_laws(subject: Subject, backends: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """Backends and messages of what does not hold; an error that is no law broken counts as well."""
    able = [b for b in backends if subject.problem.dtype != "float64" or b not in _WITHOUT_FLOAT64]
    for backend, law in (("", lambda: check_layout(subject)), *((b, _on(subject, b)) for b in able)):
        try:
            law()
        except LawBroken as error:
            yield backend, str(error)
        except Exception as error:
            yield backend, f"{type(error).__name__}: {error}"


def _on(subject: Subject, backend: str) -> Callable[[], None]:
    return lambda: check(Trial(subject, backend))
