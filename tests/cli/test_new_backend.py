"""``rainfusion new-backend``: what it refuses, and that what it writes is a backend as written."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from typer import BadParameter

import rainfusion
from rainfusion import cli
from rainfusion.cli import new_backend as module

DEMO = Path(__file__).parent.parent / "demo_backend"
NOT_WRITTEN = {"__pycache__", ".pytest_cache", ".ruff_cache"}


def command(monkeypatch: Any, capfd: Any, *arguments: str) -> tuple[Any, str, str]:
    """Exit status, stdout, stderr."""
    monkeypatch.setattr(sys, "argv", ["rainfusion", "new-backend", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return (ended.value.code, *capfd.readouterr())


def contents(folder: Path) -> dict[str, str]:
    """The files of a folder that git would keep, by their path."""
    paths = (path for path in folder.rglob("*") if path.is_file() and not NOT_WRITTEN & {*path.parts})
    return {path.relative_to(folder).as_posix(): path.read_text(encoding="utf-8") for path in paths}


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


# -- what it writes --------------------------------------------------------------------------------


def test_the_demo_backend_is_what_it_writes(monkeypatch: Any, capfd: Any) -> None:
    status, out, _ = command(monkeypatch, capfd, "acme")
    assert status == 0
    assert contents(Path("acme-rainfusion")) == contents(DEMO)
    assert out.splitlines()[0] == "wrote acme-rainfusion"
    assert {line.strip() for line in out.splitlines()} >= {*contents(DEMO), "cd acme-rainfusion"}


def test_the_record(monkeypatch: Any, capfd: Any) -> None:
    status, out, err = command(monkeypatch, capfd, "my_chip", "--folder", "a b", "--json")
    record = json.loads(out)
    assert (status, err, record["backend"], record["folder"]) == (0, "", "my_chip", "a b")
    assert sorted(record["files"]) == sorted(contents(Path("a b")))


def test_the_next_steps_can_be_pasted(monkeypatch: Any, capfd: Any) -> None:
    assert "  cd 'a b'\n" in command(monkeypatch, capfd, "my_chip", "--folder", "a b")[1]


@pytest.mark.parametrize("name", ["a", "x3d", "class", "a" * 32, "a_0" + "_0" * 14])
def test_names_from_the_shortest_to_the_longest(name: str) -> None:
    module._check_name(name)
    texts = module._texts(module._fields(name))
    for path, text in texts.items():
        if path.endswith(".py"):
            compile(text, path, "exec")
            assert max(map(len, text.splitlines())) <= 120
        assert "${name}" not in path + text


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A package as it was written, built and installed by pip into a folder, without a network."""
    pytest.importorskip("hatchling", reason="the package is built by hatchling")
    from tests.installed import Site

    site = Site(tmp_path_factory.mktemp("installed"))
    project = site.folder.with_name("project")
    module._write(project, module._texts(module._fields("my_chip")))
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--no-compile", "--disable-pip-version-check")
    done = site.start("-m", "pip", "install", *options, "--target", str(site.folder), str(project))
    assert done.returncode == 0, done.stderr
    return site, project


@pytest.mark.slow
def test_pip_installs_it_and_its_arrays_choose_it(installed: Any) -> None:
    site, _ = installed
    found = site.ask("""
        import numpy as np
        import rainfusion
        from my_chip_rainfusion.backend import MyChipArray

        q, k, v = np.random.default_rng(0).standard_normal((3, 1, 2, 300, 32)).astype("float32").view(MyChipArray)
        out = rainfusion.attention(q, k, v, sparsity=0.5, block=32)
        rows = [(row.backend, row.device, row.status) for row in rainfusion.devices()]
        answer = [type(out).__name__, rows]
    """)
    assert found[0] == "MyChipArray"
    assert ["my_chip", "my_chip:0", "ready"] in found[1]


@pytest.mark.slow
@pytest.mark.kit
def test_it_passes_the_kit(installed: Any, tmp_path: Path) -> None:
    """The contract and a case of every kind; the whole kit runs on the demo backend, whose text is the same."""
    site, project = installed
    few = ("-k", "contract and not torch or video and f32")
    report = tmp_path / "report.json"
    options = ("-q", "-p", "no:cacheprovider", f"--rainfusion-report={report}")
    done = site.start("-m", "pytest", *options, *few, cwd=project, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stdout[-3000:]
    found = json.loads(report.read_text(encoding="utf-8"))
    assert (found["target"]["backend"], found["target"]["stand_in"]) == ("my_chip", "NumPy")
    assert {test["outcome"] for test in found["tests"]} == {"passed", "skipped"}


# -- what it refuses -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("Acme", "lower-case letters"),
        ("a-b", "such as my_chip"),
        ("a__b", "such as my_chip"),
        ("_a", "a letter first"),
        ("1a", "a letter first"),
        ("", "cannot name a backend"),
        ("../a", "cannot name a backend"),
        ("a\n", "cannot name a backend"),
        ("a" * 33, "at most 32"),
        ("cuda", "such as my_cuda"),
        ("reference", "a backend of that name is installed"),
        ("torch_npu", "a backend of that name is installed"),
    ],
)
def test_names_that_cannot_be_used(monkeypatch: Any, capfd: Any, name: str, said: str) -> None:
    status, out, err = command(monkeypatch, capfd, "--", name)
    assert (status, out, len(err.splitlines())) == (2, "", 1)
    assert said in err
    assert not [*Path().iterdir()]


def test_names_of_plugins_and_packages_that_are_there(monkeypatch: Any, tmp_path: Path) -> None:
    (tmp_path / "site" / "nearby_rainfusion").mkdir(parents=True)
    (tmp_path / "site" / "nearby_rainfusion" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path / "site")
    with pytest.raises(BadParameter, match="a package nearby_rainfusion can be imported"):
        module._check_name("nearby")
    rainfusion.register(rainfusion.BackendSpec("spoken_for", "nowhere:Backend"))
    try:
        with pytest.raises(BadParameter, match="a backend of that name is installed"):
            module._check_name("spoken_for")
    finally:
        rainfusion.unregister("spoken_for")


@pytest.mark.parametrize("there", ["folder", "file", "link"])
def test_nothing_is_overwritten(monkeypatch: Any, capfd: Any, there: str) -> None:
    place = Path("acme-rainfusion")
    if there == "folder":
        place.mkdir()
    elif there == "file":
        place.write_text("mine")
    else:
        place.symlink_to("nowhere")
    before = os.lstat(place)
    status, _, err = command(monkeypatch, capfd, "acme")
    assert status == 2
    assert "acme-rainfusion is there already; give another with --folder" in err
    assert os.lstat(place).st_ino == before.st_ino
    assert not Path("nowhere").exists()


def test_a_folder_in_a_folder_that_is_not_there(monkeypatch: Any, capfd: Any) -> None:
    status, _, err = command(monkeypatch, capfd, "acme", "--folder", "a/b")
    assert status == 2
    assert "there is no folder a; create it first" in err


def test_nothing_is_left_where_writing_fails(monkeypatch: Any, capfd: Any) -> None:
    write = Path.write_text

    def full(path: Path, *arguments: Any, **options: Any) -> int:
        if path.name == "backend.py":
            raise OSError(28, "No space left on device", str(path))
        return write(path, *arguments, **options)

    monkeypatch.setattr(Path, "write_text", full)
    status, _, err = command(monkeypatch, capfd, "acme")
    assert status == 2
    assert "No space left on device" in err
    assert not [*Path().iterdir()]
