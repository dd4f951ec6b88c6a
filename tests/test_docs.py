"""What the documentation shows is what the code does: examples run, print what the pages say, and links work."""

from __future__ import annotations

import io
import re
import runpy
import sys
import warnings
from collections.abc import Iterator
from contextlib import redirect_stdout, suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import rainfusion

ROOT = Path(__file__).parent.parent
DOCS = sorted(f"docs/{page.relative_to(ROOT / 'docs').as_posix()}" for page in (ROOT / "docs").rglob("*.md"))
PAGES = ["README.md", "CONTRIBUTING.md", *DOCS]
EXAMPLES = [
    "README.md",
    "docs/calibration.md",
    "docs/cuda.md",
    "docs/diffusers.md",
    "docs/errors.md",
    "docs/layouts.md",
    "docs/plan.md",
    "docs/policies.md",
    "docs/quickstart.md",
    "docs/writing_a_backend.md",
    *(page for page in DOCS if page.startswith("docs/how_to/")),
]
WITH_A_PIPELINE = ("README.md", "docs/quickstart.md", "docs/how_to/mask_reuse.md", "docs/how_to/read_the_report.md")
TORCHRUN = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
"""The environment of the one process that examples of several devices run in; port 0 is any that is free."""

FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)
PROBLEM = rainfusion.AttentionProblem(1, 40, 75600, 75600, 128, "bfloat16")
LAYOUT = rainfusion.TokenLayout((21, 45, 80))
PLANS = (
    rainfusion.plan(PROBLEM, LAYOUT, rainfusion.TopK(0.8)),
    rainfusion.plan(PROBLEM, LAYOUT, rainfusion.TopK(0.8), quotas=True, kv_lengths=True),
    rainfusion.plan(PROBLEM, LAYOUT, rainfusion.TopK(0.8), omitted="summary"),
    rainfusion.plan(PROBLEM, LAYOUT, rainfusion.Fixed()),
    rainfusion.plan(PROBLEM, LAYOUT, rainfusion.TopK(0.0)),
)


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def printed_plans(page: str) -> list[str]:
    return re.findall(r"^plan v\d.*?^  return [^\n]*", text_of(page), flags=re.MULTILINE | re.DOTALL)


def test_the_plans_on_the_page_are_the_plans_that_are_made() -> None:
    assert printed_plans("docs/plan.md")[: len(PLANS)] == [str(plan) for plan in PLANS]


def test_the_command_prints_the_plans_that_are_made() -> None:
    parts = rainfusion.Text(37), *(rainfusion.Grid(1, *sizes) for sizes in ((13, 15), (9, 11), (8, 8)))
    problem = rainfusion.AttentionProblem(1, 40, 395, 395, 128, "bfloat16")
    of_parts = rainfusion.plan(problem, rainfusion.TokenLayout(parts=parts, block=16), rainfusion.TopK(0.5))
    assert printed_plans("docs/command_line.md") == [str(PLANS[0]), str(of_parts)]


@pytest.fixture
def module(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """A module for the code of a page; classes defined there can be found by their name."""
    made = ModuleType(f"page_{Path(request.node.callspec.params['page']).stem}")
    monkeypatch.setitem(sys.modules, made.__name__, made)
    yield made
    with suppress(rainfusion.UnknownBackendError):
        rainfusion.unregister("acme")


@pytest.mark.parametrize("page", EXAMPLES)
def test_examples_run_and_print_what_the_page_says(
    page: str, module: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torch")
    monkeypatch.chdir(tmp_path)  # for the files that examples write
    for variable, value in TORCHRUN.items():
        monkeypatch.setenv(variable, value)
    text = text_of(page)
    if page == "docs/calibration.md":
        text = with_a_tiny_calibration(with_a_tiny_pipeline(text, module.__dict__), module.__dict__)
    if page in WITH_A_PIPELINE:
        text = with_a_tiny_pipeline(text, module.__dict__)
    if page == "docs/diffusers.md":
        text = with_a_tiny_schedule(text, module.__dict__)
    if page in ("README.md", "docs/cuda.md"):
        text = with_small_tensors(text, module.__dict__)
    if "register_adapter(" in text:
        adapter = pytest.importorskip("rainfusion.integrations.diffusers.adapter")
        monkeypatch.setattr(adapter, "_ADAPTERS", dict(adapter._ADAPTERS))  # without that of the page afterwards
    printed, end = "", None
    for fence in FENCE.finditer(text):
        language, body = fence.groups()
        if language == "python":
            printed, end = run(body, module, f"{page}:{text.count(chr(10), 0, fence.start()) + 2}"), fence.end()
        elif language == "text" and end is not None and not text[end : fence.start()].strip():
            assert without_remarks(printed) == without_remarks(body)


def with_a_tiny_pipeline(text: str, names: dict[str, Any]) -> str:
    """Examples for a tiny video, and the pipeline that they speak of."""
    pytest.importorskip("diffusers")
    made = runpy.run_path(str(ROOT / "examples" / "tiny.py"))["wan_text_to_video"]
    names["pipe"], _, sizes = made()
    asked = "height=720, width=1280, num_frames=81"
    assert asked in text
    return text.replace(asked, ", ".join(f"{name}={size}" for name, size in sizes.items()))


def with_a_tiny_calibration(text: str, names: dict[str, Any]) -> str:
    """Examples of calibration for the tiny pipeline, and the model and the loop that they speak of."""
    import torch

    other, config, _ = runpy.run_path(str(ROOT / "examples" / "tiny.py"))["wan_text_to_video"]()
    names["model"], names["tiny"] = other.transformer, config

    def denoise(model: Any, seed: int) -> None:
        random = torch.Generator().manual_seed(seed)
        latents, prompt = (torch.randn(*shape, generator=random) for shape in ((1, 4, 5, 16, 16), (1, 7, 16)))
        for step in (900, 500):
            model(latents, torch.tensor([step]), prompt)

    names["denoise"] = denoise
    for asked, given in (
        ('RainFusionConfig(omitted="summary", dense_steps=(10, 0))', "tiny"),
        ("run=sample, sparsity=0.8", "run=sample, config=tiny, every=1, sparsity=0.5"),
        ("prompts, sparsity=0.8", "prompts, every=1, sparsity=0.5"),
    ):
        assert asked in text
        text = text.replace(asked, given)
    return text


def with_a_tiny_schedule(text: str, names: dict[str, Any]) -> str:
    """The guide's examples for a tiny video, and what its excerpt of `examples/own_model.py` takes from there."""
    pytest.importorskip("diffusers")
    import rainfusion.integrations.diffusers as host

    names["pipe"], names["tiny"], sizes = runpy.run_path(str(ROOT / "examples" / "tiny.py"))["wan_text_to_video"]()
    names.update(prompt="a paper boat on a river", rainfusion=rainfusion, OwnTransformer="OwnTransformer")
    names.update((name, getattr(host, name)) for name in ("REST", "Adapter", "Grid", "register_adapter"))
    for asked, given in (
        ("pipe(prompt)", f"pipe(prompt, {', '.join(f'{name}={size}' for name, size in sizes.items())})"),
        (
            "RainFusionConfig(sparsity=0.8, dense_steps=(10, 0), refresh_every=8)",
            "dataclasses.replace(tiny, refresh_every=8)",
        ),
    ):
        assert asked in text
        text = text.replace(asked, given)
    return text


def with_small_tensors(text: str, names: dict[str, Any]) -> str:
    """Examples for a video of few tokens, and the q, k and v that they speak of."""
    grid = (9, 8, 16)
    shape = (1, 2, int(np.prod(grid)), 32)
    names.update((name, np.random.default_rng(0).standard_normal(shape, dtype=np.float32)) for name in "qkv")
    names["rainfusion"] = rainfusion
    return text.replace("(21, 45, 80)", str(grid))


def run(code: str, module: ModuleType, place: str) -> str:
    """What code prints when it runs in a module."""
    printed = io.StringIO()
    with redirect_stdout(printed), warnings.catch_warnings():
        warnings.simplefilter("ignore", rainfusion.RainfusionWarning)  # small examples cannot spend a budget well
        exec(compile(code, place, "exec"), module.__dict__)
    return printed.getvalue()


def without_remarks(text: str) -> list[str]:
    """Lines without what kernels say of themselves, which depends on the machine and the versions."""
    return [re.sub(r"  \([^()]*\)$", "", line) for line in text.rstrip().splitlines()]


@pytest.mark.parametrize("page", PAGES)
def test_links_between_pages_lead_somewhere(page: str) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text_of(page))
    missing = [t for t in targets if "://" not in t and not ((ROOT / page).parent / t).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_headings_that_exist(page: str) -> None:
    links = re.findall(r"\]\(([^)#\s:]*)#([^)\s]+)\)", text_of(page))
    missing = [f"{target}#{anchor}" for target, anchor in links if anchor not in anchors(page, target)]
    assert not missing


def anchors(page: str, target: str) -> list[str]:
    """The anchors of the page that a link leads to, as GitHub and Sphinx make them of headings."""
    path = (ROOT / page).parent / target if target else ROOT / page
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", path.read_text(encoding="utf-8")), flags=re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
