"""What the kit cannot know of the OpenVINO backend: memory, threads, failures, precision, what a batch holds."""

from __future__ import annotations

import dataclasses
import math
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import rainfusion
from rainfusion.backends.host_arrays import numpy_dtype
from rainfusion.core import ops
from rainfusion.core.axis import BlockedAxis
from rainfusion.core.backend import ORACLE, PORTABLE, Device, Segment
from rainfusion.core.errors import BackendUnavailableError, ProblemError
from rainfusion.core.lowering import lower
from rainfusion.core.plan import Plan
from rainfusion.testing import ConformanceSuite

ov = pytest.importorskip("openvino")

from openvino import opset13 as op  # noqa: E402

from rainfusion.backends.openvino import (  # noqa: E402
    attend,
    block_means,
    block_scores,
    copies,
    lengths,
    mask_chain,
    memory,
    processes,
    runtime,
    schedule,
    selection,
    tensors,
)
from rainfusion.backends.openvino.backend import OpenVinoBackend  # noqa: E402
from rainfusion.backends.reference import ReferenceBackend  # noqa: E402

BACKEND = OpenVinoBackend()
CPU = BACKEND.devices()[0]
SOME = rainfusion.TopK(0.3)
POLICIES = [
    rainfusion.TopK(0.5),
    rainfusion.TopK((0.2, 0.3, 0.1, 0.0)),
    rainfusion.TopP(0.5),
    rainfusion.Hybrid(0.6, 0.4),
    rainfusion.TopK(0.5, counting="paper"),
]


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
    """Strict lowering succeeds for whatever is claimed: no operation runs by its definition."""

    @pytest.mark.parametrize("policy", [*POLICIES, rainfusion.Fixed()])
    @pytest.mark.parametrize("omitted", ["drop", "summary"])
    @pytest.mark.parametrize("returns", [("%out",), ("%out", "%lse", "%mask"), ("%out", "%qb", "%kb", "%score")])
    def test_no_gap(self, policy, omitted, returns):
        problem = rainfusion.AttentionProblem(1, 4, 700, 600, 64, "bfloat16", 2)
        run = lowered(problem, None, policy, omitted=omitted, returns=returns)
        assert {step.by for step in run.steps} == {"openvino"}

    @pytest.mark.parametrize("omitted", ["drop", "summary"])
    def test_no_gap_with_quotas_and_lengths_at_call_time(self, omitted):
        problem = rainfusion.AttentionProblem(2, 4, 700, 700, 64, "bfloat16", 2)
        run = lowered(problem, None, SOME, omitted=omitted, quotas=True, kv_lengths=True)
        assert {step.by for step in run.steps} == {"openvino"}


class TestMemoryIsShared:
    @pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
    @pytest.mark.parametrize("axes", [(0, 1, 2, 3), (0, 2, 1, 3), (1, 2, 0, 3)])
    def test_tables_are_the_same_memory_whatever_the_order_of_axes(self, rng, dtype, axes):
        x = qkv(rng, 2, 3, 5, 8, dtype=dtype)[0].transpose(axes)
        table = tensors.token_table(x)
        assert np.shares_memory(table.memory, x)
        places = np.indices(x.shape[:3]).reshape(3, -1)
        numbers = sum(place * stride for place, stride in zip(places, table.strides, strict=True))
        np.testing.assert_array_equal(table.memory[numbers], x.reshape(-1, x.shape[-1]))

    def test_q_k_v_packed_into_one_tensor_are_not_copied(self, rng):
        packed = rng.standard_normal((1, 300, 3, 2, 16)).astype(np.float32)
        views = [packed[:, :, i].transpose(0, 2, 1, 3) for i in range(3)]
        assert all(np.shares_memory(tensors.token_table(x).memory, packed) for x in views)
        problem = rainfusion.AttentionProblem(1, 2, 300, 300, 16)
        out = lowered(problem)(*views)
        np.testing.assert_array_equal(out, lowered(problem)(*(x.copy() for x in views)))

    def test_channels_that_are_apart_are_copied(self, rng):
        x = rng.standard_normal((1, 2, 30, 32)).astype(np.float32)[..., ::2]
        table = tensors.token_table(x)
        assert not np.shares_memory(table.memory, x)
        np.testing.assert_array_equal(table.memory, x.reshape(-1, 16))

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
        for address in ("cpu", ""):
            monkeypatch.setenv(runtime.HOME, address)
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

    def batches(self, mask, q_lengths=None, kv_lengths=None, **settings):
        counts = (lengths.counted(self.Q, q_lengths), lengths.counted(self.KV, kv_lengths))
        return schedule.batches(mask, *counts, **settings)

    @pytest.mark.parametrize("keys", [1, 2000, 10**9])
    def test_every_row_is_in_one_batch_with_its_own_blocks(self, rng, keys):
        mask = rng.random((2, 3, self.Q.blocks, self.KV.blocks)) < 0.5
        mask[0, 0] = True
        mask[1, 2, 3] = False
        made = self.batches(mask, keys=keys, logits=2**20, summary=True)
        seen = np.zeros((6, self.Q.blocks, self.KV.blocks), dtype=bool)
        rows = np.zeros((6, self.Q.blocks), dtype=int)
        for batch in made:
            for head, query, kept, omitted in zip(batch.heads, batch.query, batch.kept, batch.omitted, strict=True):
                rows[head, query] += 1
                seen[np.ix_([head], query, kept)] = True
                assert sorted([*kept, *omitted]) == list(range(self.KV.blocks))
                assert batch.q_tokens == self.Q.counts[query].sum()
                assert batch.kv_tokens == self.KV.counts[kept].sum()
        assert (rows == 1).all()
        np.testing.assert_array_equal(seen.reshape(mask.shape), mask)

    def test_rows_that_keep_nothing_are_in_no_batch_unless_asked_for(self):
        mask = np.zeros((1, 1, self.Q.blocks, self.KV.blocks), dtype=bool)
        assert self.batches(mask, keys=1, logits=1) == []

    @pytest.mark.parametrize("summary", [False, True])
    def test_padding_is_in_no_batch(self, rng, summary):
        mask = rng.random((4, 2, self.Q.blocks, self.KV.blocks)) < 0.5
        mask[3] = True
        q_lengths, kv_lengths = np.array([700, 1, 256, 300]), np.array([300, 1000, 256, 513])
        counts = lengths.counted(self.Q, q_lengths), lengths.counted(self.KV, kv_lengths)
        work = np.zeros((4, 2))
        for batch in self.batches(mask, q_lengths, kv_lengths, keys=2000, logits=2**20, summary=summary):
            for head, query, kept, omitted in zip(batch.heads, batch.query, batch.kept, batch.omitted, strict=True):
                b, h = divmod(head, 2)
                assert batch.q_tokens == counts[0][b, query].sum()
                assert batch.kv_tokens == counts[1][b, kept].sum()
                assert (counts[1][b, [*kept, *omitted]] > 0).all()
                work[b, h] += batch.q_tokens * (batch.kv_tokens + 10**6 * len(omitted))
        pairs = np.einsum("bi,bhij,bj->bh", counts[0], mask, counts[1])
        omitted_pairs = np.einsum("bi,bhij,bj->bh", counts[0], ~mask, counts[1] > 0)
        np.testing.assert_array_equal(work, pairs + (10**6 * omitted_pairs if summary else 0))

    def test_the_longest_come_first(self, rng):
        mask = rng.random((1, 2, self.Q.blocks, self.KV.blocks)) < 0.5
        made = self.batches(mask, keys=1, logits=1)
        work = [int(self.Q.counts[b.query[0]].sum() * self.KV.counts[b.kept[0]].sum()) for b in made]
        assert work == sorted(work, reverse=True)

    def test_rows_that_keep_everything_are_tall_and_share_their_keys(self):
        mask = np.zeros((1, 3, self.Q.blocks, self.KV.blocks), dtype=bool)
        mask[:, :, 1:4] = True
        made = self.batches(mask, keys=1, logits=2 * self.Q.block * self.KV.length)
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
        assert tensors.token_table(odd).strides == (0, 300, 1)
        assert np.shares_memory(tensors.token_table(odd).memory, x)

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


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("returns", [("%out",), ("%out", "%lse")])
def test_rows_that_keep_nothing_give_zero_and_minus_infinity(rng, dtype, returns):
    problem = rainfusion.AttentionProblem(1, 2, 300, 300, 64, dtype)
    blocks = np.ones((1, 2, 3, 3), dtype=bool)
    blocks[0, 1, 1] = False
    mask = rainfusion.BlockMask(blocks, 300, 300, (128, 128))
    run = lowered(problem, None, rainfusion.Fixed(), returns=returns)
    result = run(*qkv(rng, 1, 2, 300, 64, dtype=dtype), mask=mask)
    out, lse = result if len(returns) > 1 else (result, None)
    assert (out[0, 1, 128:256] == 0).all()
    assert np.isfinite(out.astype(np.float32)).all()
    if lse is not None:
        assert (lse[0, 1, 128:256] == -np.inf).all()
        assert np.isfinite(lse[0, 1, :128]).all()


def test_logits_that_are_all_minus_infinity_give_zero_and_minus_infinity(rng):
    q, k, v = (np.ones((1, 1, 256, 16), np.float32) for _ in range(3))
    k[0, 0] = -np.inf
    run = lowered(rainfusion.AttentionProblem(1, 1, 256, 256, 16), None, rainfusion.TopK(0.0), returns=("%out", "%lse"))
    out, lse = run(q, k, v)
    assert (out == 0).all()
    assert (lse == -np.inf).all()


def _selected(op_: ops.Select, score: np.ndarray, quotas: np.ndarray, valid: np.ndarray | None) -> np.ndarray:
    """The mask that the kernel makes of a score."""
    values = {"%score": score, "%quotas": quotas, "%kv_lengths": valid}
    given = [(op_.score, score.shape, "float32")]
    plan = type("Types", (), {"types": {name: ops.ValueType(shape, dtype) for name, shape, dtype in given}})
    run = mask_chain.build_mask_chain(Segment((op_,), op_.reads, op_.makes), plan, CPU)
    return run(values)["%mask"]


class TestSelection:
    @pytest.mark.parametrize("policy", [*POLICIES, rainfusion.TopP(0.0, 0.4)])
    def test_it_is_that_of_the_definition_on_ties_nan_and_infinity(self, rng, policy):
        problem = rainfusion.AttentionProblem(2, 4, 1280, 1280, 16)
        plan = rainfusion.plan(problem, rainfusion.TokenLayout((5, 16, 16)), policy)
        score = rng.integers(0, 4, plan.types["%score"].shape).astype(np.float32)
        score[0, 0, 1, 2:4] = np.nan
        score[0, 1, 2, 1] = -np.inf
        score[1, 0, 3] = -np.inf
        chosen = plan.find(ops.Select)
        quotas = plan.constant(chosen.quotas)
        np.testing.assert_array_equal(_selected(chosen, score, quotas, None), chosen.meaning(score, quotas, None))

    @settings(max_examples=200, deadline=None)
    @given(data=st.data())
    def test_it_is_that_of_the_definition_on_any_sides_quotas_and_lengths(self, data):
        sizes, rng = st.integers(1, 40), np.random.default_rng(data.draw(st.integers(0, 99)))
        q, kv = (
            BlockedAxis(length, data.draw(st.integers(1, 5)), True, data.draw(st.integers(0, length)))
            for length in (data.draw(sizes), data.draw(sizes))
        )
        batch, heads = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 3))
        score = rng.integers(0, 5, (batch, heads, q.blocks, kv.blocks)).astype(np.float32)
        score[rng.random(score.shape) < 0.1] = data.draw(st.sampled_from([0, np.nan, -np.inf, np.inf]))
        quotas = rng.integers(-2, kv.blocks + 3, (data.draw(st.sampled_from([1, heads])), q.free_blocks))
        valid = data.draw(st.sampled_from([None, rng.integers(0, kv.length + 1, batch).astype(np.int32)]))
        way = {
            "mass": data.draw(st.sampled_from([None, 0.0, 0.41, 0.93])),
            "over": data.draw(st.sampled_from(("free", "all"))),
        }
        reads = {"score": "%score", "quotas": "%quotas", "lengths": None if valid is None else "%kv_lengths"}
        chosen = ops.Select(**reads, mask="%mask", q=q, kv=kv, **way)
        with np.errstate(invalid="ignore", divide="ignore"):
            expected = chosen.meaning(score, quotas.astype(np.int32), valid)
        np.testing.assert_array_equal(_selected(chosen, score, quotas.astype(np.int32), valid), expected)

    @pytest.mark.parametrize("way", [{}, {"over": "all"}, {"mass": 0.7}, {"mass": 0.7, "over": "all"}])
    @pytest.mark.parametrize("quota", ["one", "by head", "by row", "none", "more than there are"])
    @pytest.mark.parametrize("at_once", [1, 700, selection._AT_ONCE])
    def test_rows_in_pieces_are_those_of_the_definition_to_the_bit(self, rng, monkeypatch, way, quota, at_once):
        monkeypatch.setattr(selection, "_AT_ONCE", at_once)
        monkeypatch.setattr(copies, "_SHARE_BYTES", 64)
        monkeypatch.setattr(copies, "parallel_streams", lambda device: 3)
        q, kv = BlockedAxis(37 * 16, 16, True, 33 * 16), BlockedAxis(53 * 16 - 5, 16, True, 50 * 16)
        score = rng.standard_normal((3, 4, q.blocks, kv.blocks)).astype(np.float32)
        score[:, :, 5:9] = score[:, :, 5:9].round()  # ties, also between 0 and -0
        score[rng.random(score.shape) < 0.02] = np.nan
        score[0, 1, 2], score[1, 2, 3], score[:, 3, 7, ::2] = np.nan, np.inf, -np.inf
        shape = (1 if quota == "one" else 4, q.free_blocks)
        made = {
            "one": np.full(shape, 11),
            "by head": np.repeat([[3], [50], [0], [17]], q.free_blocks, axis=1),
            "by row": rng.integers(-1, 60, shape),
            "none": np.zeros(shape),
            "more than there are": np.full(shape, 99),
        }
        quotas = made[quota].astype(np.int32)
        for valid in (None, np.array([kv.length, 20 * 16 + 3, 0], np.int32)):
            reads = {"score": "%score", "quotas": "%quotas", "lengths": None if valid is None else "%kv_lengths"}
            chosen = ops.Select(**reads, mask="%mask", q=q, kv=kv, **way)
            values, before = {"%score": score, "%quotas": quotas, "%kv_lengths": valid}, score.copy()
            found = _selected(chosen, score, quotas, valid)
            np.testing.assert_array_equal(found, chosen.evaluate(values)["%mask"])
            np.testing.assert_array_equal(score, before)

    @pytest.mark.parametrize("columns", [1, 300, 3000])
    def test_quotas_that_differ_from_row_to_row(self, rng, columns):
        q, kv = (BlockedAxis(length, 1, True, length) for length in (50, columns))
        score = rng.standard_normal((1, 2, 50, columns)).astype(np.float32)
        quotas = rng.integers(0, columns + 1, (2, 50)).astype(np.int32)
        chosen = ops.Select(score="%score", quotas="%quotas", mask="%mask", q=q, kv=kv)
        mask = _selected(chosen, score, quotas, None)
        np.testing.assert_array_equal(mask, chosen.meaning(score, quotas, None))
        np.testing.assert_array_equal(mask.sum(axis=-1)[0], quotas)

    @pytest.mark.parametrize("mass", [None, 0.6])
    def test_scores_may_lie_anywhere_in_memory(self, rng, mass):
        q, kv = BlockedAxis(9, 1, True, 8), BlockedAxis(11, 1, True, 9)
        score = rng.standard_normal((2, 9, 3, 22)).astype(np.float32).transpose(0, 2, 1, 3)[..., ::2]
        quotas = rng.integers(0, 9, (3, 8)).astype(np.int32)
        chosen = ops.Select(score="%score", quotas="%quotas", mask="%mask", q=q, kv=kv, mass=mass)
        expected = chosen.meaning(np.ascontiguousarray(score), quotas, None)
        np.testing.assert_array_equal(_selected(chosen, score, quotas, None), expected)

    @pytest.mark.parametrize("valid", [-(2**31), -20, 0, 1, 16, 17, 2**31 - 1])
    def test_columns_without_tokens_are_taken_last(self, rng, valid):
        axis = BlockedAxis(10 * 16, 16, True, 10 * 16)
        score = rng.standard_normal((1, 2, 10, 10)).astype(np.float32)
        reads = {"score": "%score", "quotas": "%quotas", "lengths": "%kv_lengths"}
        chosen = ops.Select(**reads, mask="%mask", q=axis, kv=axis)
        quotas, lengths_ = np.full((1, 10), 3, np.int32), np.array([valid], np.int32)
        mask = _selected(chosen, score, quotas, lengths_)
        np.testing.assert_array_equal(mask, chosen.meaning(score, quotas, lengths_))
        there = min(-(-max(valid, 0) // 16), 10)
        assert (mask[..., :there].sum(axis=-1) == min(there, 3)).all()
        assert (mask.sum(axis=-1) == 3).all()

    @pytest.mark.parametrize("per_head", [False, True])
    def test_quotas_at_call_time_are_those_of_a_plan_that_has_them(self, rng, per_head):
        problem, layout = rainfusion.AttentionProblem(1, 4, 1280, 1280, 16), rainfusion.TokenLayout((5, 16, 16))
        given = lowered(problem, layout, SOME, quotas=True, returns=("%out", "%mask"))
        q, k, v = qkv(rng, 1, 4, 1280, 16)
        for share in (0.2, 0.3):
            policy = rainfusion.TopK((share, 0.3, 0.1, 0.25) if per_head else share)
            planned = lowered(problem, layout, policy, returns=("%out", "%mask"))
            out, mask = given(q, k, v, quotas=given.plan.quotas(policy))
            expected_out, expected = planned(q, k, v)
            np.testing.assert_array_equal(mask.blocks, expected.blocks)
            np.testing.assert_array_equal(out, expected_out)

    def test_an_operation_between_score_and_selection_leaves_both_on_their_kernels(self, rng):
        problem = rainfusion.AttentionProblem(1, 2, 640, 640, 16)
        plan = rainfusion.plan(problem, None, SOME, returns=("%mask", "%score"))
        score, chosen = plan.find(ops.BlockScore), plan.find(ops.Select)
        swapped = [Negate(x="%score", y="%turned"), *(_reading(op_, chosen, "%turned") for op_ in plan.ops[3:])]
        assert score in plan.ops[:3]
        changed = Plan(problem, plan.layout, (*plan.ops[:3], *swapped), plan.returns)
        run = lower(changed, BACKEND, CPU)
        assert [step.by for step in run.steps] == ["openvino", "definition", "openvino"]
        mask, scores = run(*qkv(rng, 1, 2, 640, 16)[:2])
        expected = chosen.meaning(-scores, plan.constant(chosen.quotas), None)
        np.testing.assert_array_equal(mask.blocks, expected)

    @pytest.mark.parametrize("per_head", [False, True])
    def test_a_prior_is_added_to_the_score(self, rng, per_head):
        qb, kb = (rng.standard_normal((2, heads, 6, 16)).astype(np.float32) for heads in (4, 2))
        prior = rng.standard_normal((4, 6, 6) if per_head else (6, 6)).astype(np.float32)
        values = {"%qb": qb, "%kb": kb, "%prior": prior}
        score = ops.BlockScore(qb="%qb", kb="%kb", prior="%prior", score="%score", scale=0.25)
        plan = type("Types", (), {"types": {"%score": ops.ValueType((2, 4, 6, 6), "float32")}})
        run = mask_chain.build_mask_chain(Segment((score,), score.reads, score.makes), plan, CPU)
        np.testing.assert_allclose(run(values)["%score"], score.meaning(qb, kb, prior), atol=1e-6)

    def test_plans_of_all_shapes_share_one_graph(self, rng):
        block_scores.score_requests.clear()
        for length in (256, 300, 640, 900):
            lowered(rainfusion.AttentionProblem(1, 2, length, length, 16))(*qkv(rng, 1, 2, length, 16))
        assert block_scores.score_requests.size() == 1


def _reading(op_: ops.Op, chosen: ops.Select, score: str) -> ops.Op:
    return dataclasses.replace(op_, score=score) if op_ == chosen else op_


@dataclasses.dataclass(frozen=True, kw_only=True)
class Negate(ops.Op):
    """An operation that no backend knows."""

    name: ClassVar[str] = "negate_in_test_openvino"
    x: str = ops.operand()
    y: str = ops.result()

    def meaning(self, x):
        return -x

    def infer(self, types):
        return {"y": types["x"]}


class TestBlockMeans:
    @settings(max_examples=60, deadline=None)
    @given(data=st.data())
    def test_only_valid_tokens_count(self, data):
        length, block = data.draw(st.integers(1, 300)), data.draw(st.integers(1, 70))
        rng = np.random.default_rng(length)
        order = data.draw(st.sampled_from([None, np.arange(length), rng.permutation(length)]))
        valid = data.draw(st.sampled_from([None, rng.integers(-1, length + 2, 2).astype(np.int32)]))
        x = rng.standard_normal((2, 3, length, 8)).astype(np.float32)
        in_blocks = x if order is None else x[:, :, order]
        ends = [length, length] if valid is None else np.clip(valid, 0, length)
        expected = np.zeros((2, 3, -(-length // block), 8))
        for b, end in enumerate(ends):
            in_blocks[b, :, end:] = np.nan
            for start in range(0, end, block):
                tokens = in_blocks[b, :, start : min(start + block, end)].astype(np.float64)
                expected[b, :, start // block] = tokens.mean(axis=1)
        x = in_blocks if order is None else in_blocks[:, :, np.argsort(order)]
        means = block_means.BlockMeans(BlockedAxis(length, block, False, length), order, CPU)
        np.testing.assert_allclose(means(x, valid), expected, atol=2e-6)


class TestLengths:
    """Against a masked softmax in float64; what lies beyond a length is NaN."""

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    @pytest.mark.parametrize("layout", [None, rainfusion.TokenLayout((5, 12, 11), text=200)])
    @pytest.mark.parametrize("policy", [rainfusion.TopK(0.0), rainfusion.Fixed()])
    @pytest.mark.parametrize("returns", [("%out",), ("%out", "%lse")])
    @pytest.mark.parametrize("reads", [0, 10**9])
    def test_padding_takes_no_part(self, rng, monkeypatch, naive, dtype, layout, policy, returns, reads):
        monkeypatch.setattr(attend, "_READS", reads)
        monkeypatch.setattr(attend, "_RUN_BYTES", 1)
        tokens, valid = 860, np.array([860, 777, 660], np.int32)
        problem = rainfusion.AttentionProblem(3, 4, tokens, tokens, 32, dtype, 2)
        run = lowered(problem, layout, policy, returns=returns, kv_lengths=True)
        plan = run.plan
        q = _memory(rng, problem.q_shape, dtype)
        k, v = (_memory(rng, problem.kv_shape, dtype) for _ in range(2))
        blocks = rng.random((3, 4, plan.q_axis.blocks, plan.kv_axis.blocks)) < 0.6
        blocks[..., 0], blocks[:, 1] = True, True
        given_mask = rainfusion.BlockMask(blocks, tokens, tokens, (128, 128)) if plan.takes("%mask") else None
        kept = blocks if plan.takes("%mask") else np.ones_like(blocks)
        pairs = np.repeat(np.repeat(kept, 128, axis=2), 128, axis=3)[:, :, :tokens, :tokens]
        inside = np.arange(tokens) < valid[:, None]
        inverse = np.arange(tokens) if layout is None else layout.inverse
        pairs = (pairs & inside[:, None, None])[:, :, inverse][..., inverse]
        inside = inside[:, inverse]
        for x in (q, k, v):
            x[np.broadcast_to(~inside[:, None], x.shape[:3])] = np.nan
        result = run(q, k, v, mask=given_mask, kv_lengths=valid)
        out, lse = result if len(returns) > 1 else (result, None)
        rows = np.broadcast_to(inside[:, None], out.shape[:3])
        plain = (np.where(np.isnan(x.astype(np.float32)), 0, x.astype(np.float32)) for x in (q, k, v))
        expected, expected_lse = naive(*plain, pairs)
        limit = 1e-2 if dtype == "bfloat16" else 2e-6
        difference = out.astype(np.float64)[rows] - expected[rows]
        assert np.linalg.norm(difference) <= limit * np.linalg.norm(expected[rows])
        assert (out[~rows] == 0).all()
        if lse is not None:
            np.testing.assert_allclose(lse[rows], expected_lse[rows], atol=2e-5)
            assert (lse[~rows] == -np.inf).all()

    @pytest.mark.parametrize("valid", [[0, 300], [-5, 10**6], [1, 299]])
    @pytest.mark.parametrize("omitted", ["drop", "summary"])
    def test_any_length_is_that_of_the_definition(self, rng, valid, omitted):
        problem = rainfusion.AttentionProblem(2, 2, 300, 300, 32)
        plan = rainfusion.plan(problem, None, SOME, omitted=omitted, returns=("%out", "%lse"), kv_lengths=True)
        x, valid = qkv(rng, 2, 2, 300, 32), np.array(valid, np.int32)
        reference = ReferenceBackend()
        expected = lower(plan, reference, reference.devices()[0])(*x, kv_lengths=np.clip(valid, 0, 300))
        for found, due in zip(lower(plan, BACKEND, CPU, strict=True)(*x, kv_lengths=valid), expected, strict=True):
            np.testing.assert_allclose(found, due, atol=2e-5)

    def test_keys_alone_have_lengths_where_queries_are_others(self, rng, naive):
        problem = rainfusion.AttentionProblem(2, 2, 200, 300, 32)
        run = lowered(problem, None, rainfusion.TopK(0.0), kv_lengths=True)
        q, (k, v) = qkv(rng, 2, 2, 200, 32)[0], qkv(rng, 2, 2, 300, 32)[1:]
        valid = np.array([131, 300], np.int32)
        pairs = np.broadcast_to((np.arange(300) < valid[:, None])[:, None, None], (2, 2, 200, 300))
        np.testing.assert_allclose(run(q, k, v, kv_lengths=valid), naive(q, k, v, pairs)[0], atol=2e-6)


class TestSummaries:
    def _oracle(self, q, k, v, kept, block, valid):
        """Attention over the kept blocks' tokens, and over the means of the others, in float64."""
        q, k, v = (x.astype(np.float64) for x in (q, k, v))
        out = np.zeros_like(q)
        for b, h, i in np.ndindex(*kept.shape[:3]):
            keys, values, bias = [], [], []
            for j in range(kept.shape[3]):
                span = slice(j * block, min((j + 1) * block, valid[b]))
                tokens, token_values = k[b, h, span], v[b, h, span]
                if kept[b, h, i, j] or not len(tokens):
                    keys.append(tokens), values.append(token_values), bias.append(np.zeros(len(tokens)))
                else:
                    keys.append(tokens.mean(axis=0, keepdims=True))
                    values.append(token_values.mean(axis=0, keepdims=True))
                    bias.append(np.log([len(tokens)]))
            span = slice(i * block, min((i + 1) * block, valid[b]))
            logits = q[b, h, span] @ np.concatenate(keys).T * q.shape[-1] ** -0.5 + np.concatenate(bias)
            weights = np.exp(logits - logits.max(axis=-1, keepdims=True, initial=-np.inf))
            out[b, h, span] = weights @ np.concatenate(values) / weights.sum(axis=-1, keepdims=True)
        return out

    @pytest.mark.parametrize("factor", [1, 12])
    @pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
    @pytest.mark.parametrize("kept", ["own block", "nothing", "some"])
    def test_means_are_float32(self, rng, factor, dtype, kept):
        problem = rainfusion.AttentionProblem(1, 2, 192, 192, 64, dtype)
        masks = {"own block": np.eye(96, dtype=bool), "nothing": np.zeros((96, 96), bool)}
        grid = masks[kept] if kept in masks else rng.random((96, 96)) < 0.3
        blocks = np.broadcast_to(grid, (1, 2, 96, 96)).copy()
        q, k, v = (_memory(rng, (1, 2, 192, 64), "float32") * f for f in (factor, factor, 1))
        q, k, v = (x.astype(numpy_dtype(dtype)) for x in (q, k, v))
        layout = rainfusion.TokenLayout(block=2)
        run = lowered(problem, layout, rainfusion.Fixed(), omitted="summary")
        out = run(q, k, v, mask=rainfusion.BlockMask(blocks, 192, 192, (2, 2))).astype(np.float64)
        expected = self._oracle(q, k, v, blocks, 2, [192])
        allowed = {"float32": 2e-4, "float16": 4e-3, "bfloat16": 3e-2}[dtype]
        assert np.abs(out - expected).max() <= allowed

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_lengths_end_the_blocks_that_are_summarised(self, rng, dtype):
        problem, valid = rainfusion.AttentionProblem(2, 2, 300, 300, 32, dtype), np.array([300, 137], np.int32)
        run = lowered(problem, rainfusion.TokenLayout(block=16), rainfusion.Fixed(), omitted="summary", kv_lengths=True)
        blocks = rng.random((2, 2, 19, 19)) < 0.3
        q, k, v = qkv(rng, 2, 2, 300, 32, dtype=dtype)
        mask = rainfusion.BlockMask(blocks, 300, 300, (16, 16))
        out = run(q, k, v, mask=mask, kv_lengths=valid).astype(np.float64)
        expected = self._oracle(q, k, v, blocks, 16, valid)
        assert np.linalg.norm(out - expected) <= (1e-2 if dtype == "bfloat16" else 1e-5) * np.linalg.norm(expected)


class TestForeignPrograms:
    """Programs that `plan` would not write: kernels take what they understand whole, and nothing else."""

    def test_an_inverse_that_does_not_lead_back_is_left_to_the_definition(self, rng):
        problem = rainfusion.AttentionProblem(1, 2, 256, 256, 16)
        order = rng.permutation(256)
        constants = (
            ops.Constant(value="%there", data=ops.Data(order)),
            ops.Constant(value="%back", data=ops.Data(np.roll(np.argsort(order), 1))),
        )
        reads = {"q": "%q", "k": "%k", "v": "%v", "order": "%there", "inverse": "%back"}
        attention = ops.Attend(**reads, out="%out", block=(128, 128), scale=0.25)
        plan = Plan(problem, rainfusion.TokenLayout(), (*constants, attention), ("%out",))
        run = lower(plan, BACKEND, CPU)
        assert [step.by for step in run.steps] == ["definition"]
        x = qkv(rng, 1, 2, 256, 16)
        reference = ReferenceBackend()
        np.testing.assert_allclose(run(*x), lower(plan, reference, reference.devices()[0])(*x), atol=1e-6)

    def test_an_output_that_is_read_on_is_float32(self, rng):
        problem = rainfusion.AttentionProblem(1, 2, 256, 256, 16, "bfloat16")
        attention = ops.Attend(q="%q", k="%k", v="%v", out="%attended", block=(128, 128), scale=0.25)
        plan = Plan(problem, rainfusion.TokenLayout(), (attention, Negate(x="%attended", y="%out")), ("%out",))
        run = lower(plan, BACKEND, CPU)
        assert [step.by for step in run.steps] == ["openvino", "definition"]
        x = qkv(rng, 1, 2, 256, 16, dtype="bfloat16")
        (first, _) = run.steps
        values = dict(zip(("%q", "%k", "%v"), x, strict=True))
        assert first.run(values)["%attended"].dtype == np.float32

    def test_one_half_of_a_summary_is_attended_alone(self, rng):
        problem = rainfusion.AttentionProblem(1, 2, 600, 600, 16)
        plan = rainfusion.plan(problem, None, SOME, omitted="summary")
        merge = plan.find(ops.Merge)
        negated = Negate(x=merge.out_b, y="%turned")
        changed = [dataclasses.replace(op_, out_b="%turned") if op_ is merge else op_ for op_ in plan.ops]
        at = changed.index(next(op_ for op_ in changed if isinstance(op_, ops.Merge)))
        mixed = Plan(problem, plan.layout, (*changed[:at], negated, *changed[at:]), plan.returns)
        run = lower(mixed, BACKEND, CPU)
        by = {op_.name: step.by for step in run.steps for op_ in step.segment.ops}
        assert by["attend"] == by["select"] == by["block_mean"] == "openvino"
        assert by[Negate.name] == by["merge"] == "definition"
        x = qkv(rng, 1, 2, 600, 16)
        reference = ReferenceBackend()
        np.testing.assert_allclose(run(*x), lower(mixed, reference, reference.devices()[0])(*x), atol=1e-5)


class TestProcesses:
    @pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
    @pytest.mark.parametrize("end", ["os._exit", "sys.exit"])
    def test_a_forked_child_computes_the_same(self, end):
        code = (
            "import os, sys, numpy as np, rainfusion\n"
            "x = np.random.default_rng(0).standard_normal((1, 2, 640, 64)).astype(np.float32)\n"
            "call = lambda: rainfusion.attention(x, x, x, sparsity=0.5, backend='openvino')\n"
            "first = call()\n"
            "child = os.fork()\n"
            "same = np.array_equal(call(), first)\n"
            f"if child == 0: {end}(0 if same else 7)\n"
            "assert same and os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0\n"
        )
        command = [sys.executable, "-W", "ignore", "-c", code]
        made = subprocess.run(command, check=False, timeout=120, capture_output=True, text=True)
        assert made.returncode == 0, made.stderr

    def test_no_more_results_are_kept_than_the_limit(self):
        kept = processes.per_process(lambda number: [number])
        for number in range(100):
            assert kept(number) == [number]
        assert kept(99) is kept(99)
        assert kept.size() <= 8

    def test_the_cpu_plugin_is_told_how_many_kernels_to_keep(self, monkeypatch):
        """Without it, 1500 shapes take 4.5 GB; with it 0.8 GB, the pool aside."""
        told: list[dict] = []

        class Core:
            def compile_model(self, model, name, settings):
                told.append(settings)

        monkeypatch.setattr(runtime, "core", Core)
        runtime.compiled(ov.Model([], [], "nothing"), CPU, ov.Type.f32, 1)
        assert told[0]["CPU_RUNTIME_CACHE_CAPACITY"] == 64


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
