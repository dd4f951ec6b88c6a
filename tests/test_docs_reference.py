"""The reference pages have every name, variable, error and command that the code has, and no other."""

from __future__ import annotations

import ast
import re
import runpy
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import rainfusion
import rainfusion.core.errors
from rainfusion.core import ops, passes

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "rainfusion"
CAUGHT_INSIDE = {"LacksSymbolError", "PluginFailed", "PluginLate"}  # no caller sees these


def page(name: str) -> str:
    return (ROOT / "docs" / name).read_text(encoding="utf-8")


def sources() -> Iterator[str]:
    for path in PACKAGE.rglob("*.py"):
        yield path.read_text(encoding="utf-8")


def literal_all(path: str) -> list[str]:
    """`__all__` of a module that is not imported, because it needs what may be missing."""
    tree = ast.parse((PACKAGE / path).read_text(encoding="utf-8"))
    values = [
        node.value for node in tree.body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    ]
    return list(ast.literal_eval(values[0]))


def public_names() -> list[str]:
    own_pages = {"ops", "passes"}
    names = [*(set(rainfusion.__all__) - own_pages), "TorchArrays"]
    names += [f"ops.{name}" for name in ops.__all__]
    names += [f"distributed.{name}" for name in literal_all("distributed/__init__.py")]
    names += literal_all("integrations/diffusers/__init__.py")
    return sorted(names)


@pytest.mark.parametrize("name", public_names())
def test_every_public_name_is_on_the_reference_page(name: str) -> None:
    errors = {error for error in vars(rainfusion.core.errors) if error[0].isupper()}
    by_module = name in errors  # `automodule` lists those
    assert by_module or re.search(rf"[.`\s]{re.escape(name)}\b", page("api.md")), f"add {name} to docs/api.md"


def test_every_pass_has_a_docstring_for_the_reference_page() -> None:
    undocumented = [
        name
        for name, value in vars(passes).items()
        if name[0] != "_" and getattr(value, "__module__", None) == passes.__name__ and not value.__doc__
    ]
    assert not undocumented


def test_every_environment_variable_is_on_its_page_and_no_other() -> None:
    read = {name for text in sources() for name in re.findall(r"\bRAINFUSION_[A-Z_]+\b", text)}
    told = set(re.findall(r"^\| `(RAINFUSION_[A-Z_]+)", page("environment.md"), flags=re.MULTILINE))
    assert told == read


def test_no_other_page_has_a_table_of_environment_variables() -> None:
    tables = [
        path.name
        for path in (ROOT / "docs").rglob("*.md")
        if re.search(r"^\| `RAINFUSION_", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    ]
    assert tables == ["environment.md"]


def classes_under(*roots: str) -> set[str]:
    """Public classes of the package that derive from the roots, found without importing anything."""
    bases = {
        node.name: {ast.unparse(base).rpartition(".")[2] for base in node.bases}
        for text in sources()
        for node in ast.parse(text).body
        if isinstance(node, ast.ClassDef)
    }
    found, before = set(roots), set[str]()
    while found != before:
        before = set(found)
        found |= {name for name, of in bases.items() if of & found}
    return {name for name in found if name[0] != "_"}


def test_every_error_and_warning_is_on_its_page_and_no_other() -> None:
    raised = classes_under("RainfusionError", "RainfusionWarning") - CAUGHT_INSIDE - {"RainfusionError"}
    told = set(re.findall(r"^\| `(\w+(?:Error|Warning))`", page("errors.md"), flags=re.MULTILINE))
    assert told == raised


def test_every_command_has_its_section_and_every_option_is_named() -> None:
    pytest.importorskip("typer")
    from typer.main import get_command

    from rainfusion.cli.app import app

    commands = get_command(app).commands  # type: ignore[attr-defined]
    text = page("command_line.md")
    assert set(re.findall(r"^## `rainfusion ([\w-]+)`", text, flags=re.MULTILINE)) == set(commands)
    for name, command in commands.items():
        for option in command.params:
            long = [opt for opt in (*option.opts, *option.secondary_opts) if opt.startswith("--")]
            assert not long or any(opt in text for opt in long), f"{name} {long[0]} is not on docs/command_line.md"


def test_every_term_of_the_glossary_is_explained_once() -> None:
    body = re.search(r"```\{glossary\}\n(.*?)```", page("glossary.md"), flags=re.DOTALL)
    assert body
    terms = [term.strip() for line in re.findall(r"^(\S.*)$", body[1], flags=re.MULTILINE) for term in line.split(",")]
    assert len(terms) == len(set(terms))
    assert terms == sorted(terms)
    assert set(re.findall(r"<([^>]+)>`", body[1])) <= set(terms)


@pytest.mark.slow
def test_the_pictures_of_the_concepts_are_what_the_script_draws(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    pytest.importorskip("torch")
    pytest.importorskip("openvino")
    from PIL import Image

    script = runpy.run_path(str(ROOT / "docs" / "draw_concepts.py"))
    script["draw_all"](tmp_path)
    drawn = sorted(path.name for path in tmp_path.iterdir())
    assert drawn == sorted(path.name for path in script["FOLDER"].iterdir())
    for name in drawn:
        with Image.open(tmp_path / name) as new, Image.open(script["FOLDER"] / name) as kept:
            assert new.size == kept.size
            pixels = [np.asarray(image.convert("L"), dtype=float) for image in (new, kept)]
        assert np.abs(pixels[0] - pixels[1]).mean() < 3, f"{name} is out of date: python docs/draw_concepts.py"
        assert (script["FOLDER"] / name).stat().st_size < 100_000
