"""The benchmark of composed gains, on a tiny model on the CPU: its arithmetic, its cache, and what it computes."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("diffusers")

import torch
from diffusers.hooks import HookRegistry
from diffusers.hooks.first_block_cache import _FBC_LEADER_BLOCK_HOOK
from torch._dynamo.testing import CompileCounterWithBackend

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))  # as a script finds its neighbours
import cuda_compose
import cuda_models
import float8_linear

del sys.path[0]

LINEAR_LAYERS = 10  # of a block of Wan: q, k, v, o of two attentions, and two of the feed-forward layer


def linear(bias: bool = True) -> Any:
    torch.manual_seed(0)
    layer = torch.nn.Linear(64, 48, bias=bias, dtype=torch.bfloat16).requires_grad_(False)
    layer.weight[0] = 0
    return layer


def rows() -> Any:
    torch.manual_seed(1)
    x = torch.randn(2, 5, 64, dtype=torch.bfloat16)
    x[0, 0], x[0, 1], x[1, 2] = 0, x[0, 1] * 1e-4, x[1, 2] * 1e4
    return x


# -- FP8 -----------------------------------------------------------------------------------------------


def test_rows_are_rounded_to_fp8_numbers():
    x = rows().flatten(0, 1)
    numbers, scale = float8_linear.quantised(x)
    assert (numbers.dtype, scale.dtype, scale.shape) == (torch.float8_e4m3fn, torch.float32, (10, 1))
    assert numbers.float().abs().amax(dim=1).tolist() == [0.0, *[float8_linear.LARGEST] * 9]
    # Half a unit of 3 bits of mantissa, or of the smallest subnormal number.
    allowed = torch.maximum(x.float().abs() / 16, scale * 2**-10)
    assert ((numbers.float() * scale - x.float()).abs() <= 1.001 * allowed).all()


@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_multiplies_what_was_rounded(bias):
    layer, x = linear(bias), rows()
    out = float8_linear.Float8Linear(layer)(x)
    (a, a_scale), (b, b_scale) = float8_linear.quantised(x.flatten(0, 1)), float8_linear.quantised(layer.weight)
    expected = (a.double() * a_scale) @ (b.double() * b_scale).t() + (layer.bias.double() if bias else 0)
    assert (out.dtype, out.shape) == (torch.bfloat16, (2, 5, 48))
    torch.testing.assert_close(out.flatten(0, 1).double(), expected, rtol=2**-7, atol=1e-3)
    error = (out - layer(x)).float().norm() / layer(x).float().norm()
    assert 0.005 < error < 0.05  # of the rounding of both operands: 3 bits of mantissa


def test_all_linear_layers_of_the_blocks_are_swapped_and_given_back():
    model, arguments = cuda_models.random_model(cuda_compose.WANS["tiny"], 2, "cpu")
    before = dict(model.named_modules())
    layers = float8_linear.Float8Layers(model.blocks)
    with torch.no_grad():
        dense = model(**arguments)[0]
        with layers.used():
            swapped = [n for n, m in model.named_modules() if isinstance(m, float8_linear.Float8Linear)]
            left = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
            float8 = model(**arguments)[0]
        after = model(**arguments)[0]
    assert len(layers) == len(swapped) == 2 * LINEAR_LAYERS
    assert all(name.startswith("blocks.") for name in swapped)
    assert not any(name.startswith("blocks.") for name in left)
    assert dict(model.named_modules()) == before
    assert torch.equal(after, dense)
    assert not torch.equal(float8, dense)


def test_layers_that_cannot_be_fp8_are_refused():
    with pytest.raises(ValueError, match=r"0 is torch\.float32; give a model in torch\.bfloat16"):
        float8_linear.Float8Layers(torch.nn.Sequential(torch.nn.Linear(16, 16)))
    with pytest.raises(ValueError, match="no linear layer"):
        float8_linear.Float8Layers(torch.nn.Sequential(torch.nn.ReLU()))


def test_a_device_without_fp8_is_refused(monkeypatch):
    weight = Namespace(dtype=torch.bfloat16, is_cuda=True, device="cuda:0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(ValueError, match=r"compute capability \(8, 0\); FP8 needs \(8, 9\) or later"):
        float8_linear._check("q", weight)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    float8_linear._check("q", weight)


# -- measuring -----------------------------------------------------------------------------------------


class Watched(cuda_compose.Bench):
    """Counts what the cache decided in timed steps, by its threshold."""

    def __init__(self, *args: Any) -> None:
        self.decided: Counter[tuple[float, bool] | None] = Counter()
        super().__init__(*args)

    def _seconds(self) -> float:
        took: float = super()._seconds()
        hook = HookRegistry.check_if_exists_or_initialize(self.model.blocks[0]).get_hook(_FBC_LEADER_BLOCK_HOOK)
        state = hook and hook.state_manager._state_cache["cond"]
        self.decided[(hook.threshold, state.should_compute) if hook else None] += 1
        return took


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning:torch.*")
@pytest.mark.filterwarnings("ignore::rainfusion.core.errors.RainfusionWarning")
def test_every_variant_is_measured():
    torch.compiler.reset()
    torch.manual_seed(0)
    graphs = CompileCounterWithBackend("aot_eager")
    model, arguments = cuda_models.random_model(cuda_compose.WANS["tiny"], None, "cpu")
    bench = Watched(model, arguments, Namespace(device="cpu", dense="native", settings={}, compiler=graphs, rounds=1))
    rows = {(row["attention"], row["linear"]): row for row in [*bench.rows()][-1]}
    torch.compiler.reset()
    assert [*rows] == [(a, b) for a in ("dense", "80% sparse", "90% sparse") for b in ("bfloat16", "FP8")]
    assert all(row[name] > 0 for row in rows.values() for name in ("step", "miss", "hit"))
    # Every miss computed all blocks, every hit only the first one, in graphs that the warm-up compiled.
    assert bench.decided == {None: 12, (cuda_compose.ALWAYS_MISS, True): 6, (cuda_compose.ALWAYS_HIT, False): 6}
    assert graphs.frame_count == 4
    errors = {name: row["relative_error"] for name, row in rows.items()}
    assert errors["dense", "bfloat16"] == 0
    assert 0 < errors["80% sparse", "bfloat16"] < errors["90% sparse", "bfloat16"] < 0.1
    assert all(errors[a, "FP8"] > errors[a, "bfloat16"] for a in ("dense", "80% sparse", "90% sparse"))
    assert not model.is_cache_enabled


# -- the tables ----------------------------------------------------------------------------------------


def record() -> dict[str, Any]:
    def row(attention: str, linear: str, step: float, hit: float, error: float) -> dict[str, Any]:
        times = {"step": step, "miss": step, "hit": hit}
        return {"attention": attention, "linear": linear, **times, "relative_error": error}

    dense = [row("dense", "bfloat16", 10.0, 1.0, 0.0), row("dense", "FP8", 8.0, 0.8, 0.0123)]
    return {"rows": [*dense, row("80% sparse", "FP8", 2.0, 0.5, 0.05)]}


def cells(text: str) -> list[list[str]]:
    """The cells of both tables, without their heads."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in lines[:5]}) == len({line.count("|") for line in lines[5:]}) == 1
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in (*lines[2:5], *lines[7:])]


def test_the_tables_of_a_record():
    found = cells(cuda_compose.table(record(), 0.6))
    assert found[0] == ["dense", "bfloat16", "10.0 s", "1.00x", "0", "10.0 s", "1.00 s", "4.60 s", "2.17x"]
    assert found[1] == ["dense", "FP8", "8.00 s", "1.25x", "0.012", "8.00 s", "800 ms", "3.68 s", "2.72x"]
    assert found[2] == ["80% sparse", "FP8", "2.00 s", "5.00x", "0.05", "2.00 s", "500 ms", "1.10 s", "9.09x"]
    # A fifth of the steps is dense, with the linear layers of the row and without a hit.
    assert found[3] == ["dense", "bfloat16", "400 s", "500 s", "1.00x", "227 s", "284 s", "1.76x"]
    assert found[5] == ["80% sparse", "FP8", "128 s", "160 s", "3.12x", "99.2 s", "124 s", "4.03x"]


def test_a_record_becomes_a_table_without_measuring(tmp_path, monkeypatch, capsys):
    (tmp_path / "record.json").write_text(json.dumps(record()))
    monkeypatch.setattr(sys, "argv", ["cuda_compose.py", "--table", str(tmp_path / "record.json"), "--hits", "0.6"])
    cuda_compose.main()
    assert capsys.readouterr().out == cuda_compose.table(record(), 0.6) + "\n"


@pytest.mark.parametrize("wrong", [("--hits", "1.5"), ("--rounds", "0"), ("--layers", "1")])
def test_arguments_out_of_range_are_refused(wrong, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["cuda_compose.py", *wrong])
    with pytest.raises(SystemExit):
        cuda_compose.main()
    assert f"{wrong[0]} {wrong[1]}" in capsys.readouterr().err
