"""What the kit cannot know of the OpenVINO backend: memory, threads, failures, precision, what a batch holds."""

from __future__ import annotations

import math
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import rainfusion
from rainfusion.backends.interop import numpy_dtype
from rainfusion.core.backend import ORACLE, PORTABLE, Device
from rainfusion.core.errors import BackendUnavailableError, ProblemError
from rainfusion.core.layout import BlockedAxis
from rainfusion.core.lower import lower
from rainfusion.core.semantics import select as semantics_select
from rainfusion.plugins.conformance import ConformanceSuite

ov = pytest.importorskip("openvino")

from openvino import opset13 as op  # noqa: E402

from rainfusion.backends.openvino import (  # noqa: E402
    attend,
    copies,
    memory,
    runtime,
    schedule,
    select_blocks,
    tensors,
)
from rainfusion.backends.openvino.backend import OpenVinoBackend  # noqa: E402

BACKEND = OpenVinoBackend()
CPU = BACKEND.devices()[0]
SOME = rainfusion.TopK(0.3)


class TestOpenVino(ConformanceSuite):
    backend = "openvino"
    device = "cpu"


def lowered(problem: rainfusion.AttentionProblem, layout=None, policy=SOME, **settings):
    return lower(rainfusion.plan(problem, layout, policy, **settings), BACKEND, CPU, strict=True)


def _memory(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    return rng.standard_normal(shape).astype(numpy_dtype(dtype))


def qkv(rng: np.random.Generator, *shape: int, dtype: str = "float32") -> tuple[np.ndarray, ...]:
    return tuple(_memory(rng, shape, dtype) for _ in range(3))


class TestEveryPlanIsCovered:
    """Strict lowering succeeds for whatever is claimed: no operation falls to the semantics."""

    @pytest.mark.parametrize("policy", [rainfusion.TopK(0.5), rainfusion.TopP(0.5), rainfusion.Fixed()])
    @pytest.mark.parametrize("omitted", ["drop", "summary"])
    @pytest.mark.parametrize("returns", [("%out",), ("%out", "%lse", "%mask")])
    def test_no_gap(self, policy, omitted, returns):
        problem = rainfusion.AttentionProblem(1, 4, 700, 600, 64, "bfloat16", 2)
        run = lowered(problem, None, policy, omitted=omitted, returns=returns)
        assert {step.by for step in run.steps} == {"openvino"}


class TestMemoryIsShared:
    @pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
    @pytest.mark.parametrize("axes", [(0, 1, 2, 3), (0, 2, 1, 3), (1, 2, 0, 3)])
    def test_rows_are_the_same_memory_whatever_the_order_of_axes(self, rng, dtype, axes):
        x = qkv(rng, 2, 3, 5, 8, dtype=dtype)[0].transpose(axes)
        rows = tensors.rows_of(x)
        assert np.shares_memory(rows.table, x)
        places = np.indices(x.shape[:3]).reshape(3, -1)
        numbers = sum(place * stride for place, stride in zip(places, rows.strides, strict=True))
        np.testing.assert_array_equal(rows.table[numbers], x.reshape(-1, x.shape[-1]))

    def test_q_k_v_packed_into_one_tensor_are_not_copied(self, rng):
        packed = rng.standard_normal((1, 300, 3, 2, 16)).astype(np.float32)
        views = [packed[:, :, i].transpose(0, 2, 1, 3) for i in range(3)]
        assert all(np.shares_memory(tensors.rows_of(x).table, packed) for x in views)
        problem = rainfusion.AttentionProblem(1, 2, 300, 300, 16)
        out = lowered(problem)(*views)
        np.testing.assert_array_equal(out, lowered(problem)(*(x.copy() for x in views)))

    def test_channels_that_are_apart_are_copied(self, rng):
        x = rng.standard_normal((1, 2, 30, 32)).astype(np.float32)[..., ::2]
        rows = tensors.rows_of(x)
        assert not np.shares_memory(rows.table, x)
        np.testing.assert_array_equal(rows.table, x.reshape(-1, 16))

    def test_inputs_that_may_not_be_written_are_read(self, rng):
        arrays = qkv(rng, 1, 2, 300, 64)
        problem = rainfusion.AttentionProblem(1, 2, 300, 300, 64)
        expected = lowered(problem)(*arrays)
        for x in arrays:
            x.flags.writeable = False
        np.testing.assert_array_equal(lowered(problem)(*arrays), expected)

    def test_no_call_writes_into_the_result_of_another(self, rng):
        run = lowered(rainfusion.AttentionProblem(1, 2, 300, 300, 64))
        first = run(*qkv(rng, 1, 2, 300, 64))
        kept = first.copy()
        run(*qkv(rng, 1, 2, 300, 64))
        np.testing.assert_array_equal(first, kept)

    def test_a_view_of_a_result_outlives_it(self, rng):
        run = lowered(rainfusion.AttentionProblem(1, 2, 300, 300, 64))
        view = run(*qkv(rng, 1, 2, 300, 64))[0, 1, 5:7]
        kept = view.copy()
        for _ in range(3):
            run(*qkv(rng, 1, 2, 300, 64))
        np.testing.assert_array_equal(view, kept)

    def test_a_torch_result_outlives_its_array(self):
        torch = pytest.importorskip("torch")
        run = lowered(rainfusion.AttentionProblem(1, 2, 300, 300, 64, "bfloat16"))
        q = torch.randn(1, 2, 300, 64, dtype=torch.bfloat16)
        first = run(q, q, q)[:, 1]
        kept = first.clone()
        for _ in range(3):
            run(q * 2, q, q)
        assert torch.equal(first, kept)


class TestPool:
    """Memory goes to the next call only when nobody has it any more."""

    F32 = np.dtype(np.float32)

    def test_memory_of_what_is_gone_is_used_again(self):
        pool = memory.Pool()
        first = pool.array((4, 8), self.F32)
        address = first.ctypes.data
        del first
        assert pool.array((8, 4), self.F32).ctypes.data == address

    @pytest.mark.parametrize("view", [lambda x: x, lambda x: x[1:].T, lambda x: x.view(np.uint8)[0], np.asarray])
    def test_memory_of_what_is_there_is_not(self, view):
        pool = memory.Pool()
        held = view(pool.array((4, 8), self.F32))
        held[...] = 1
        pool.array((4, 8), self.F32)[...] = 2
        assert (held == 1).all()

    def test_no_more_waits_than_the_limit(self):
        pool = memory.Pool(limit=300)
        many = [pool.array((25,), self.F32) for _ in range(5)]
        del many
        assert pool.unused() <= 300
        pool.array((1000,), self.F32)
        assert pool.unused() <= 300

    def test_other_sizes_make_room(self):
        pool = memory.Pool(limit=1000)
        for size in (100, 250, 60):
            pool.array((size,), self.F32)
            assert 4 * size <= pool.unused() <= 1000

    def test_the_smallest_block_that_fits_is_taken(self):
        pool = memory.Pool()
        several = [pool.array((size,), self.F32) for size in (190, 120, 150)]
        address = several[1].ctypes.data
        del several
        assert pool.array((100,), self.F32).ctypes.data == address

    def test_empty_arrays(self):
        assert memory.Pool().array((0, 8), self.F32).shape == (0, 8)

    def test_threads_do_not_share(self):
        pool = memory.Pool()

        def keeps_its_own(number: int) -> bool:
            for _ in range(200):
                mine = pool.array((64,), self.F32)
                mine[:] = number
                if not (mine == number).all():
                    return False
            return True

        with ThreadPoolExecutor(8) as threads:
            assert all(threads.map(keeps_its_own, range(8)))


class TestPrecision:
    """The plugin's own default would run float32 in bfloat16 where the CPU has it."""

    def test_float32_stays_float32(self, rng, naive):
        q, k, v = qkv(rng, 1, 2, 512, 128)
        out = lowered(rainfusion.AttentionProblem(1, 2, 512, 512, 128), None, rainfusion.TopK(0.0))(q, k, v)
        expected, _ = naive(q, k, v, True)
        assert np.linalg.norm(out - expected) <= 2e-6 * np.linalg.norm(expected)

    @pytest.mark.parametrize(("dtype", "limit"), [("bfloat16", 6e-3), ("float16", 6e-4)])
    def test_16_bit_products_are_summed_up_in_float32(self, rng, naive, dtype, limit):
        q, k, v = qkv(rng, 1, 2, 2048, 128, dtype=dtype)
        out = lowered(rainfusion.AttentionProblem(1, 2, 2048, 2048, 128, dtype), None, rainfusion.TopK(0.0))(q, k, v)
        expected, _ = naive(q, k, v, True)
        assert out.dtype == numpy_dtype(dtype)
        assert np.linalg.norm(out.astype(np.float64) - expected) <= limit * np.linalg.norm(expected)

    def test_log_sum_exp_of_bfloat16_is_float32(self, rng, naive):
        q, k, v = qkv(rng, 1, 2, 300, 128, dtype="bfloat16")
        problem = rainfusion.AttentionProblem(1, 2, 300, 300, 128, "bfloat16")
        _, lse = lowered(problem, None, rainfusion.TopK(0.0), returns=("%out", "%lse"))(q, k, v)
        np.testing.assert_allclose(lse, naive(q, k, v, True)[1], atol=2e-5)


class TestThreads:
    def test_two_threads_in_one_executable_get_their_own_answers(self, rng):
        run = lowered(rainfusion.AttentionProblem(1, 2, 640, 640, 64), rainfusion.TokenLayout((5, 8, 16)))
        inputs = [qkv(rng, 1, 2, 640, 64) for _ in range(8)]
        alone = [run(*x) for x in inputs]
        with ThreadPoolExecutor(4) as pool:
            together = list(pool.map(lambda x: run(*x), inputs * 3))
        for at, out in enumerate(together):
            np.testing.assert_array_equal(out, alone[at % len(alone)])

    def test_a_failing_request_leaves_nothing_behind(self):
        requests = _doubling_requests()
        good, out = np.ones((1, 4), np.float32), np.empty((1, 4), np.float32)
        with pytest.raises(RuntimeError):
            requests.run((), [((good,), (out,)), ((np.ones((1, 5), np.float32),), (out,))])
        requests.run((), [((good,), (out,))] * 5)
        np.testing.assert_array_equal(out, 2 * good)

    def test_a_request_that_fails_half_way_leaves_nothing_behind(self):
        x, y = (op.parameter([-1, -1], ov.Type.f32) for _ in range(2))
        doubled = op.matmul(op.relu(x), op.relu(y), False, False)
        requests = runtime.Requests(ov.Model([doubled], [x, y], "product"), CPU, ov.Type.f32, 2)
        good, long, out = np.eye(3, dtype=np.float32), np.ones((5, 3), np.float32), np.empty((3, 3), np.float32)
        requests.run((), [((good, good), (out,))] * 5)
        with pytest.raises(RuntimeError, match="incompatible"):
            requests.run((), [((good, long), (out,))] * 5)
        for _ in range(3):
            out[:] = 0
            requests.run((), [((good, good), (out,))] * 5)
            np.testing.assert_array_equal(out, good)

    def test_an_interrupted_call_leaves_nothing_behind(self):
        requests = _doubling_requests()
        good, out = np.ones((1, 4), np.float32), np.empty((1, 4), np.float32)

        def interrupted():
            yield (good,), (out,)
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            requests.run((), interrupted())
        thread = threading.Thread(target=requests.run, args=((), [((good,), (out,))]))
        thread.start()
        thread.join(timeout=30)
        assert not thread.is_alive()
        np.testing.assert_array_equal(out, 2 * good)


def _doubling_requests() -> runtime.Requests:
    x = op.parameter([1, 4], ov.Type.f32)
    model = ov.Model([op.add(x, x)], [x], "doubling")
    return runtime.Requests(model, CPU, ov.Type.f32, 2)


class TestDevices:
    def test_every_device_of_openvino_is_offered_by_its_name(self):
        named = {runtime.plugin_name(d): d.name for d in BACKEND.devices()}
        core = ov.Core()
        assert named == {name: core.get_property(name, "FULL_DEVICE_NAME") for name in core.available_devices}

    @pytest.mark.parametrize("name", ["CPU", "GPU.1", "NPU"])
    def test_addresses_lead_back_to_openvinos_names(self, name):
        kind, _, index = name.lower().partition(".")
        assert runtime.plugin_name(Device(kind, int(index) if index else None)) == name

    def test_host_tensors_live_where_the_user_says(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setenv(runtime.HOME, "cpu")
        assert BACKEND.device_of(np.zeros(3)) == CPU
        monkeypatch.setenv(runtime.HOME, "npu:3")
        with pytest.raises(BackendUnavailableError, match=r"DEVICE='npu:3' .* choose one of: cpu"):
            BACKEND.device_of(np.zeros(3))

    def test_a_device_that_cannot_hold_a_model_says_why(self):
        x = op.parameter([1], ov.Type.f32)
        model = ov.Model([op.add(x, x)], [x], "doubling")
        with pytest.raises(BackendUnavailableError, match="openvino on npu:7 does not compile doubling: "):
            runtime.compiled(model, Device("npu", 7), ov.Type.f16, 1)

    @pytest.mark.parametrize(
        ("cpu", "length", "dtype", "policy", "preferred"),
        [
            ("Intel(R) Xeon(R) Processor", 8192, "float32", SOME, True),
            ("Intel(R) Xeon(R) Processor", 8192, "bfloat16", rainfusion.Fixed(), True),
            ("Intel(R) Xeon(R) Processor", 8192, "float16", SOME, False),
            ("Intel(R) Xeon(R) Processor", 8192, "float32", rainfusion.TopK(0.0), False),
            ("Intel(R) Xeon(R) Processor", 4096, "float32", SOME, False),
            ("AMD EPYC", 1024, "float16", rainfusion.TopK(0.0), True),
            ("AMD EPYC", 512, "float32", SOME, False),
        ],
    )
    def test_it_is_preferred_to_the_portable_backend_where_it_was_faster(self, cpu, length, dtype, policy, preferred):
        plan = rainfusion.plan(rainfusion.AttentionProblem(1, 4, length, length, 64, dtype), None, policy)
        device = Device("cpu", None, cpu)
        assert (BACKEND.preference(plan, device) > PORTABLE) is preferred
        assert BACKEND.preference(plan, device) > ORACLE

    def test_float64_is_refused_by_name(self):
        plan = rainfusion.plan(rainfusion.AttentionProblem(1, 1, 1280, 1280, 64, "float64"))
        assert BACKEND.capabilities(CPU).objections(plan) == ["no dtype float64 (it has bfloat16, float16, float32)"]

    def test_gradients_are_refused(self):
        torch = pytest.importorskip("torch")
        x = torch.ones(1, 1, 256, 16, requires_grad=True)
        with pytest.raises(ProblemError, match="gradient"):
            lowered(rainfusion.AttentionProblem(1, 1, 256, 256, 16))(x, x, x)

    def test_compiled_models_are_kept_in_the_users_folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setenv(runtime.CACHE_FOLDER, str(tmp_path))
        core = runtime.core.__wrapped__()
        x = op.parameter([1], ov.Type.f32)
        core.compile_model(ov.Model([op.add(x, x)], [x], "doubling"), "CPU")
        assert list(tmp_path.iterdir())


class TestBatches:
    Q, KV = BlockedAxis(700, 128, False, 700), BlockedAxis(1000, 128, False, 1000)

    @pytest.mark.parametrize("keys", [1, 2000, 10**9])
    def test_every_row_is_in_one_batch_with_its_own_blocks(self, rng, keys):
        mask = rng.random((2, 3, self.Q.blocks, self.KV.blocks)) < 0.5
        mask[0, 0] = True
        mask[1, 2, 3] = False
        made = schedule.batches(mask, self.Q, self.KV, keys=keys, logits=2**20, summary=True)
        seen = np.zeros((6, self.Q.blocks, self.KV.blocks), dtype=bool)
        rows = np.zeros((6, self.Q.blocks), dtype=int)
        for batch in made:
            for head, query, kept, skipped in zip(batch.heads, batch.query, batch.kept, batch.skipped, strict=True):
                rows[head, query] += 1
                seen[np.ix_([head], query, kept)] = True
                assert sorted([*kept, *skipped]) == list(range(self.KV.blocks))
        assert (rows == 1).all()
        np.testing.assert_array_equal(seen.reshape(mask.shape), mask)

    def test_rows_that_keep_nothing_are_in_no_batch_unless_asked_for(self):
        mask = np.zeros((1, 1, self.Q.blocks, self.KV.blocks), dtype=bool)
        assert schedule.batches(mask, self.Q, self.KV, keys=1, logits=1) == []

    def test_the_longest_come_first(self, rng):
        mask = rng.random((1, 2, self.Q.blocks, self.KV.blocks)) < 0.5
        made = schedule.batches(mask, self.Q, self.KV, keys=1, logits=1)
        work = [int(self.Q.counts[b.query[0]].sum() * self.KV.counts[b.kept[0]].sum()) for b in made]
        assert work == sorted(work, reverse=True)

    def test_rows_that_keep_everything_are_tall_and_share_their_keys(self):
        mask = np.zeros((1, 3, self.Q.blocks, self.KV.blocks), dtype=bool)
        mask[:, :, 1:4] = True
        made = schedule.batches(mask, self.Q, self.KV, keys=1, logits=2 * self.Q.block * self.KV.length)
        assert [batch.query.tolist() for batch in made] == [[[1, 2]] * 3, [[3]] * 3]
        assert all(batch.at_once == 1 and batch.kept.shape == (3, self.KV.blocks) for batch in made)


class TestTokenOrder:
    """Keys and values are gathered in place where the order has long runs, else copied; both say the same."""

    @pytest.mark.parametrize("grid", [(5, 16, 16), (5, 15, 20), (3, 7, 11)])
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_in_place_and_copied_agree(self, rng, monkeypatch: pytest.MonkeyPatch, grid, dtype):
        tokens = int(np.prod(grid))
        run = lowered(rainfusion.AttentionProblem(1, 2, tokens, tokens, 64, dtype), rainfusion.TokenLayout(grid))
        x = qkv(rng, 1, 2, tokens, 64, dtype=dtype)
        results = []
        for reads in (0, 10**9):
            monkeypatch.setattr(attend, "_READS", reads)
            monkeypatch.setattr(attend, "_RUN_BYTES", 1)
            results.append(run(*x))
        np.testing.assert_array_equal(*results)

    @pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
    @pytest.mark.parametrize("tokens", [1500, 1536, 509])
    @pytest.mark.parametrize("padded", [0, 32])
    def test_keys_and_values_may_be_laid_out_differently(self, rng, dtype, tokens, padded):
        q, k, v = qkv(rng, 1, 2, tokens, 64, dtype=dtype)
        memory = np.zeros((1, tokens, 2, 64 + padded), v.dtype)
        apart = memory[..., :64].transpose(0, 2, 1, 3)
        apart[...] = v
        layouts = [None, rainfusion.TokenLayout((tokens // 300, 15, 20))] if tokens == 1500 else [None]
        for layout in layouts:
            problem = rainfusion.AttentionProblem(1, 2, tokens, tokens, 64, dtype)
            for returns in (("%out",), ("%out", "%lse")):
                run = lowered(problem, layout, returns=returns)
                np.testing.assert_equal(run(q, k, apart), run(q, k, v))

    def test_an_axis_of_one_may_have_any_stride(self, rng):
        x = qkv(rng, 1, 2, 300, 64)[0]
        odd = np.lib.stride_tricks.as_strided(x, x.shape, (2**60, *x.strides[1:]))
        assert tensors.rows_of(odd).strides == (0, 300, 1)
        assert np.shares_memory(tensors.rows_of(odd).table, x)

    @settings(max_examples=200, deadline=None)
    @given(data=st.data())
    def test_memory_layouts_do_not_matter(self, data):
        batch, (heads, kv_heads) = data.draw(st.integers(1, 2)), data.draw(st.sampled_from([(2, 2), (4, 2), (3, 1)]))
        grid = data.draw(st.sampled_from([None, None, (5, 16, 16), (5, 15, 20)]))
        tokens = int(np.prod(grid)) if grid else data.draw(st.sampled_from([256, 509]))
        dtype, lse = data.draw(st.sampled_from(["float32", "float16", "bfloat16"])), data.draw(st.booleans())
        problem = rainfusion.AttentionProblem(batch, heads, tokens, tokens, 32, dtype, kv_heads)
        run = lowered(
            problem, rainfusion.TokenLayout(grid) if grid else None, returns=("%out", "%lse") if lse else ("%out",)
        )
        names, rng = st.sampled_from(sorted(LAYOUTS)), np.random.default_rng(data.draw(st.integers(0, 9)))
        shapes = [problem.q_shape, problem.kv_shape, problem.kv_shape]
        views = [LAYOUTS[data.draw(names)](rng, *shape, dtype) for shape in shapes]
        with pytest.MonkeyPatch.context() as patch:
            if data.draw(st.booleans()):  # gather in place wherever that can be
                patch.setattr(attend, "_RUN_BYTES", 1)
                patch.setattr(attend, "_READS", 10**9)
            np.testing.assert_equal(run(*views), run(*(x.copy() for x in views)))

    @given(data=st.data())
    def test_the_longest_run_lies_in_one_block_and_one_row(self, data):
        unit, count = data.draw(st.integers(1, 8)), data.draw(st.integers(1, 12))
        units = np.array(data.draw(st.permutations(range(count))))
        order = (units[:, None] * unit + np.arange(unit)).ravel()
        axis = BlockedAxis(len(order), data.draw(st.integers(1, 40)), True, len(order))
        run = tensors.longest_run(axis, order)
        assert axis.block % run == 0
        assert axis.length % run == 0
        rows = order.reshape(-1, run)
        assert (rows == rows[:, :1] + np.arange(run)).all()
        assert (rows[:, 0] % run == 0).all()
        assert run % math.gcd(unit, axis.block) == 0


# Arrays [B, H, tokens, D] on memory that is laid out in some way.
LAYOUTS = {
    "plain": lambda rng, b, h, n, d, dtype: _memory(rng, (b, h, n, d), dtype),
    "tokens before heads": lambda rng, b, h, n, d, dtype: _memory(rng, (b, n, h, d), dtype).transpose(0, 2, 1, 3),
    "heads first": lambda rng, b, h, n, d, dtype: _memory(rng, (h, b, n, d), dtype).transpose(1, 0, 2, 3),
    "packed": lambda rng, b, h, n, d, dtype: _memory(rng, (b, n, 3, h, d), dtype)[:, :, 1].transpose(0, 2, 1, 3),
    "padded": lambda rng, b, h, n, d, dtype: _memory(rng, (b, n, h, d + 8), dtype)[..., :d].transpose(0, 2, 1, 3),
    "part of a cache": lambda rng, b, h, n, d, dtype: _memory(rng, (b, h, n + 7, d), dtype)[:, :, 7:],
    "channels apart": lambda rng, b, h, n, d, dtype: _memory(rng, (b, h, d, n), dtype).transpose(0, 1, 3, 2),
    "one for all heads": lambda rng, b, h, n, d, dtype: np.broadcast_to(
        _memory(rng, (b, 1, n, d), dtype), (b, h, n, d)
    ),
    "backwards": lambda rng, b, h, n, d, dtype: _memory(rng, (b, h, n, d), dtype)[:, :, ::-1],
}


def test_rows_that_keep_nothing_give_zero_and_minus_infinity(rng):
    problem = rainfusion.AttentionProblem(1, 2, 300, 300, 64)
    blocks = np.ones((1, 2, 3, 3), dtype=bool)
    blocks[0, 1, 1] = False
    (step,) = lowered(problem, None, rainfusion.Fixed(), returns=("%out", "%lse")).steps
    out, lse = step.run(*qkv(rng, 1, 2, 300, 64), blocks)  # the executable refuses such a mask
    assert (out[0, 1, 128:256] == 0).all()
    assert (lse[0, 1, 128:256] == -np.inf).all()
    assert np.isfinite(lse[0, 1, :128]).all()


@pytest.mark.parametrize("policy", [rainfusion.TopK(0.6), rainfusion.TopP(0.5), rainfusion.TopP(0.0, 0.4)])
def test_selection_is_that_of_the_semantics_on_ties_nan_and_infinity(rng, policy):
    plan = rainfusion.plan(
        rainfusion.AttentionProblem(2, 2, 1280, 1280, 16), rainfusion.TokenLayout((5, 16, 16)), policy
    )
    score = rng.integers(0, 4, (2, 2, plan.q_axis.blocks, plan.kv_axis.blocks)).astype(np.float32)
    score[0, 0, 1, 2:4] = np.nan
    score[0, 1, 2, 1] = -np.inf
    score[1, 0, 3] = -np.inf
    x = op.parameter(list(score.shape), ov.Type.f32)
    model = ov.Model([select_blocks.select(x, plan)], [x], "select")
    mask = np.empty(score.shape, dtype=bool)
    runtime.Requests(model, CPU, ov.Type.f32, 1).run((), [((score,), (mask,))])
    expected = semantics_select(score, policy=policy, q=plan.q_axis, kv=plan.kv_axis)
    np.testing.assert_array_equal(mask, expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("count", [0, 1, 70])
def test_reorder_takes_rows(rng, monkeypatch, dtype, count):
    monkeypatch.setattr(copies, "_SHARE_BYTES", 64)
    table = rng.standard_normal((50, 16)).astype(numpy_dtype(dtype))
    numbers = rng.integers(0, 50, count).astype(np.int32)
    out = np.empty((count, 16), table.dtype)
    copies.reorder(table, numbers, out, CPU)
    np.testing.assert_array_equal(out, table[numbers])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_conversion_keeps_the_layout(rng, monkeypatch, dtype):
    monkeypatch.setattr(copies, "_SHARE_BYTES", 64)
    x = qkv(rng, 2, 30, 3, 8, dtype=dtype)[0].transpose(0, 2, 1, 3)
    made = copies.converted(x, np.dtype(np.float32), CPU)
    np.testing.assert_array_equal(made, x.astype(np.float32))
    assert [s // made.itemsize for s in made.strides] == [s // x.itemsize for s in x.strides]
    assert copies.converted(made, made.dtype, CPU) is made
