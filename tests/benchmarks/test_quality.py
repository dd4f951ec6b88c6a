"""The quality measurements: scenes with a truth, rules that do what they say, a page made from its records."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("diffusers")
pytest.importorskip("torchmetrics")

import torch

import rainfusion
from rainfusion.core.layout import TokenLayout

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))  # as a script finds its neighbours
from quality import groups, measure, metrics, page, pictures, scenes, train
from quality import model as video
from quality.rules import Nearest, Rule, distances, sub_blocks

del sys.path[0]


def drawn(batch: int = 2, seed: int = 0) -> scenes.Scenes:
    return scenes.draw(batch, torch.Generator().manual_seed(seed))


def tensors(heads: int = 2, grid: tuple[int, int, int] = (4, 8, 8), seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1, int(np.prod(grid)), heads, 32, generator=generator) for _ in range(3)]


# -- scenes and the model ------------------------------------------------------------------------------


def test_a_background_pans_by_whole_pixels_and_wraps_around():
    scene = drawn()
    scene.slope[:] = 0
    scene.pan[:] = torch.tensor([2 / 32, -1 / 32])
    places = (torch.arange(32) + 0.5) / 32
    pictures = scenes._background(scene, torch.arange(4.0), places, places)
    for frame in range(4):
        expected = pictures[:, :, 0].roll((-frame, 2 * frame), dims=(-2, -1))
        torch.testing.assert_close(pictures[:, :, frame], expected, atol=1e-5, rtol=0)


def test_the_text_tells_scenes_apart_and_no_texture():
    one, other = drawn(seed=1), drawn(seed=2)
    assert scenes.text(one).shape == (2, scenes.TEXT_TOKENS, scenes.TEXT_DIM)
    assert not torch.equal(scenes.text(one), scenes.text(other))
    told = scenes.text(one)
    one.phases += 1
    one.shape_tints *= 2
    assert torch.equal(scenes.text(one), told)


def test_shapes_bounce():
    assert scenes._bounced(torch.tensor([-0.25, 0.5, 1.25, 2.5])).tolist() == [0.25, 0.5, 0.75, 0.5]


def test_a_task_gives_one_frame_at_its_place():
    asked = video.task(drawn(), (5, 4, 4), torch.tensor([3, -1]))
    assert asked.video.shape == (2, 3, 5, 16, 16)
    assert torch.equal(asked.given[0, :3, 3], asked.video[0, :, 3])
    assert asked.given[0, 3].sum(dim=(1, 2)).tolist() == [0, 0, 0, 256, 0]
    assert not asked.given[1].any()


def test_the_weights_are_those_of_the_record():
    record = json.loads(video.ASSET.with_suffix(".json").read_text())
    assert video.digest() == record["sha256"] == json.loads((page.RECORDS / "quality-h200.json").read_text())["weights"]
    assert sum(p.numel() for p in video.trained_model().parameters()) < 6e6


@pytest.mark.filterwarnings("ignore:Mismatch dtype")
def test_training_runs_and_writes_what_it_did(tmp_path, monkeypatch):
    stages = tuple(train.Stage(((2, 2, 2), (3, 2, 2)), (2, 1), 1, 2.0) for _ in range(3))
    monkeypatch.setattr(train, "STAGES", stages)
    out = tmp_path / "weights.safetensors"
    monkeypatch.setattr(sys, "argv", ["train", "--out", str(out), "--device", "cpu", "--no-compile", "--steps", *"212"])
    train.main()
    record = json.loads(out.with_suffix(".json").read_text())
    assert record["steps"] == [2, 1, 2]
    assert record["sha256"] == video.digest(out)
    assert {*record["psnr"]} == {"(2, 2, 2)", "(3, 2, 2)"}
    video.trained_model(out)


def test_muon_is_that_of_torch():
    muon = pytest.importorskip("torch.optim").__dict__.get("Muon")
    if muon is None:
        pytest.skip("this torch has no Muon")
    torch.manual_seed(0)
    own = [torch.nn.Parameter(torch.randn(shape) * 0.05) for shape in ((48, 48), (96, 48), (48, 96), (48, 48))]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in own]
    settings = {"lr": train.LEARNING_RATE, "weight_decay": train.WEIGHT_DECAY, "adjust_lr_fn": "match_rms_adamw"}
    optimisers = train.Muon(own), muon(theirs, **settings)
    for _ in range(3):
        for a, b in zip(own, theirs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        for optimiser in optimisers:
            optimiser.step()
    for a, b in zip(own, theirs, strict=True):
        assert (a - b).norm() < 2e-3 * b.norm()


# -- rules ---------------------------------------------------------------------------------------------


def test_scores_of_whole_blocks_choose_what_block_means_choose():
    q, k, v = tensors()
    settings = {"sink": None, "block": 32}
    shipped = Rule("", settings=settings).attention(q, k, v, (4, 8, 8), 0.5)
    own = Rule("", settings=settings, scores=lambda *call: sub_blocks(*call, pieces=1))
    out, mask = own.attention(q, k, v, (4, 8, 8), 0.5)
    assert np.array_equal(mask.blocks, shipped[1].blocks)
    torch.testing.assert_close(out, shipped[0])


def test_sub_blocks_of_a_ragged_block_count_their_tokens():
    q, k, _ = (x.transpose(1, 2) for x in tensors(grid=(1, 7, 11)))  # 77 tokens: two blocks and 13
    layout = TokenLayout((1, 7, 11), block=32, sink=None)
    score = sub_blocks(q, k, layout, 0.2)
    means = [x[:, :, 64:].mean(2) for x in (q, k)]
    pieces = [
        torch.stack([x[:, :, 64:72].mean(2), x[:, :, 72:].mean(2), m, m], 2) for x, m in zip((q, k), means, strict=True)
    ]
    expected = (pieces[0] @ pieces[1].mT * 0.2).exp().mean(dim=(2, 3)).log()
    torch.testing.assert_close(score[:, :, 2, 2], expected)


def test_every_run_of_every_group_is_a_rule_that_plans():
    for name, group in groups.GROUPS.items():
        runs = group((21, 24, 24))
        assert runs, name
        for run in runs:
            assert run.rule.layout((21, 24, 24)).length == 21 * 24 * 24
            assert run.rule.policy(run.share) is not None


def test_the_nearest_blocks_are_kept():
    grid = (4, 8, 8)
    layout = TokenLayout(grid, block=32, sink=None)
    far = distances(layout)
    assert np.array_equal(far, far.T)
    assert not far.diagonal().any()
    q, k, _ = tensors()
    rule = Rule("", lambda share: Nearest(share, grid=grid, count=3), {"sink": None, "block": 32})
    _, mask = rule.attention(q, k, k, grid, 0.5)
    nearest = far.argsort(axis=-1, kind="stable")[:, :3]
    assert np.take_along_axis(np.asarray(mask.blocks[0, 0]), nearest, axis=-1).all()


def test_raster_order_folds_nothing():
    layout = Rule("", settings={"sink": None, "block": 32}, raster=True).layout((4, 8, 8))
    assert np.array_equal(layout.order, np.arange(256))


# -- measuring and the page ----------------------------------------------------------------------------


def test_metrics_of_the_same_and_of_other_videos():
    video_of = torch.rand(2, 3, 4, 16, 16) * 2 - 1
    same = metrics.compared(video_of, video_of)
    assert same == {"relative_l1": [0, 0], "psnr": [100, 100], "ssim": [1, 1], "cosine": [1, 1], "temporal": [0, 0]}
    other = metrics.compared(-video_of, video_of)
    assert other["relative_l1"] == [2, 2]
    assert max(other["cosine"]) == -1
    assert max(other["psnr"]) < 10


@pytest.mark.slow
def test_runs_by_both_ways_agree_and_are_recorded(tmp_path, monkeypatch):
    rule = Rule("small", settings={"sink": None, "block": 16})
    runs = [
        groups.Run(rule, 0.5, picture=True),
        groups.Run(rule, 0.5, note="applied", config={}),
        groups.Run(rule, 0.5, note="budgets", config={"calibrated": True}),
        groups.Run(rule, 0.5, (1, 0)),
    ]
    monkeypatch.setitem(groups.GROUPS, "few", lambda grid: runs)
    record, picture = tmp_path / "new" / "record.json", tmp_path / "frames.png"
    command = f"--groups few --grid 3x4x8 --device cpu --dtype float32 --scenes 2 --steps 3 --json {record}"
    monkeypatch.setattr(sys, "argv", ["measure", *command.split(), "--picture", str(picture)])
    measure.main()
    by_rule, applied, budgets, one_dense = json.loads(record.read_text())["runs"]
    assert by_rule["density"] == applied["density"] == 0.5
    assert applied["relative_l1"] == pytest.approx(by_rule["relative_l1"], rel=1e-3)
    assert budgets["density"] == pytest.approx(0.5, abs=0.01)
    assert max(one_dense["relative_l1"]) < max(by_rule["relative_l1"])
    assert picture.stat().st_size > 1000


def test_the_page_is_what_the_records_say():
    record, speed = (json.loads((page.RECORDS / f"{name}-h200.json").read_text()) for name in ("quality", "speed"))
    text = page.PAGE.read_text(encoding="utf-8")
    assert page.filled(text, page.tables(record, speed)) == text


def test_claims_of_the_page_follow_from_the_record():
    runs: list[dict[str, Any]] = json.loads((page.RECORDS / "quality-h200.json").read_text())["runs"]

    def error(rule: str, share: float, note: str = "") -> np.ndarray:
        found = [run for run in runs if (run["rule"], run["asked"], run["note"]) == (rule, share, note)]
        return np.array(found[0]["relative_l1"])

    published = error("published", 0.8)
    best = {share: error("sink none, summaries", share, "budgets a head") for share in (0.8, 0.9)}
    assert best[0.8].mean() / published.mean() == pytest.approx(0.48, abs=0.005)
    assert (best[0.8] < published).all()
    assert best[0.9].mean() / published.mean() == pytest.approx(1.07, abs=0.005)
    assert best[0.8].mean() / error("sink none, summaries", 0.8).mean() == pytest.approx(0.37, abs=0.01)


def test_a_plot_is_drawn(tmp_path):
    record, speed = (json.loads((page.RECORDS / f"{name}-h200.json").read_text()) for name in ("quality", "speed"))
    pictures.error_against_speed(record["runs"], speed["rows"], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_protection_is_counted_as_the_plan_counts_it():
    row = {"rule": "sink rows and columns", "density": 0.2}
    layout = TokenLayout((21, 24, 24), block=128)
    problem = rainfusion.AttentionProblem(1, 3, layout.length, layout.length, 64, "bfloat16")
    plan = rainfusion.plan(problem, layout, rainfusion.TopK(0.7))
    share, free = page.spent({**row, "density": plan.density}, (21, 24, 24))
    assert share == pytest.approx(plan.protected_share)
    assert free == pytest.approx(plan.free_blocks_a_row)
