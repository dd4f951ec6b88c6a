"""What is published: the wheel and the sdist hold what they should, and the wheel needs NumPy alone."""

from __future__ import annotations

import importlib
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
LARGEST_WHEEL = 600_000  # bytes
ALONE = ("numpy", "numpy.libs", "array_api_compat", "pluggy", "tomli")  # what `pip install rainfusion` brings

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The wheel and the sdist, by kind, as an installer's build of this checkout makes them."""
    pytest.importorskip("hatchling", reason="the package is built by hatchling")
    folder = tmp_path_factory.mktemp("dist")
    build = "import sys; from hatchling import build as b; b.build_wheel(sys.argv[1]); b.build_sdist(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", build, str(folder)], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return {"wheel": next(folder.glob("*.whl")), "sdist": next(folder.glob("*.tar.gz"))}


@pytest.fixture(scope="module")
def tracked() -> list[str]:
    """The files of the checkout that git keeps."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("this is no checkout")
    return [path for path in listed.stdout.splitlines() if (ROOT / path).exists()]


def test_the_wheel_is_small(built: dict[str, Path]) -> None:
    assert built["wheel"].stat().st_size < LARGEST_WHEEL


def test_the_wheel_holds_the_package_and_nothing_else(built: dict[str, Path], tracked: list[str]) -> None:
    names = [name for name in zipfile.ZipFile(built["wheel"]).namelist() if ".dist-info/" not in name]
    assert sorted(names) == sorted(path for path in tracked if path.startswith("rainfusion/"))


def test_the_sdist_is_complete(built: dict[str, Path], tracked: list[str]) -> None:
    with tarfile.open(built["sdist"]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    left_out = {path for path in tracked if path not in names}
    assert {path for path in left_out if not path.startswith((".ci/", ".github/", ".pre-commit"))} == set()


def test_one_attention_call_with_numpy_alone(built: dict[str, Path], tmp_path: Path) -> None:
    with zipfile.ZipFile(built["wheel"]) as wheel:
        wheel.extractall(tmp_path)
    for name in ALONE:
        found = next((path for path in map(Path, sys.path) if (path / name).is_dir()), None)
        if found:
            (tmp_path / name).symlink_to(found / name)
    program = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
from importlib.util import find_spec
import numpy as np
import rainfusion
q, k, v = np.random.default_rng(0).standard_normal((3, 1, 2, 512, 32), dtype=np.float32)
out = rainfusion.attention(q, k, v, grid=(2, 16, 16), block=64, sink=None, sparsity=0.5)
assert out.shape == q.shape and np.isfinite(out).all()
print([name for name in ("torch", "typer", "rich", "scipy") if find_spec(name)], rainfusion.__file__)
"""
    # -S: no site-packages, so that nothing else can be imported.
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-W", "error", "-c", program],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["[]", str(tmp_path / "rainfusion" / "__init__.py")]


def project() -> dict[str, Any]:
    """The table ``project`` of pyproject.toml."""
    table: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return table


def floors() -> dict[str, set[str]]:
    """The lower bounds of every requirement, extras included, by package."""
    extras = project()["optional-dependencies"].values()
    found: dict[str, set[str]] = {}
    for requirement in map(Requirement, [*project()["dependencies"], *(text for extra in extras for text in extra)]):
        bounds = {part.version for part in requirement.specifier if part.operator == ">="}
        found.setdefault(requirement.name, set()).update(bounds)
    return found


def test_the_oldest_versions_are_those_that_are_allowed() -> None:
    lines = (ROOT / "constraints-oldest.txt").read_text(encoding="utf-8").splitlines()
    pinned = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert pinned.keys() >= {Requirement(text).name for text in project()["dependencies"]} - {"tomli"}
    for name, version in pinned.items():
        assert {Version(floor) for floor in floors()[name]} == {Version(version)}, name


def test_the_entry_points_can_be_imported() -> None:
    for target in project()["entry-points"]["rainfusion"].values():
        assert importlib.import_module(target).__name__ == target
