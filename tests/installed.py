"""Plugins installed for one interpreter: real distributions on its path, found by their entry points. Fixtures."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

HEAVY = "torch,triton,torch_npu,openvino"  # off unless a test is about them: importing them takes a while
DEMO = Path(__file__).parent / "demo_backend"


@dataclass(frozen=True)
class Site:
    """A folder of installed distributions, and interpreters that see it."""

    folder: Path

    def add(self, distribution: str, entries: dict[str, str], files: dict[str, str] | None = None) -> None:
        """Lay a distribution down as an installer does: its modules and its metadata."""
        for name, source in (files or {}).items():
            (self.folder / name).write_text(dedent(source), encoding="utf-8")
        metadata = self.folder / f"{distribution.replace('-', '_')}-1.0.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
        lines = ["[rainfusion]", *(f"{name} = {target}" for name, target in entries.items())]
        (metadata / "entry_points.txt").write_text("\n".join(lines) + "\n")

    def add_demo(self) -> None:
        """Install the demo backend: its own package, the entry points its pyproject.toml declares."""
        project = tomllib.loads((DEMO / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        self.add(project["name"], project["entry-points"]["rainfusion"])
        (self.folder / "acme_rainfusion").symlink_to(DEMO / "acme_rainfusion")

    def start(self, *command: str, cwd: Path | None = None, **environ: str) -> subprocess.CompletedProcess[str]:
        """Run this Python with the site on its path."""
        inherited = {key: value for key, value in os.environ.items() if not key.startswith(("RAINFUSION", "PYTEST"))}
        path = {
            "PYTHONPATH": os.pathsep.join(filter(None, [str(self.folder), os.environ.get("PYTHONPATH")])),
            "PYTHONDONTWRITEBYTECODE": "1",
            "RAINFUSION_PLUGIN_SECONDS": "30",  # machines that run tests are busy
        }
        return subprocess.run(
            [sys.executable, *command],
            env={**inherited, **path, **environ},
            cwd=cwd or self.folder,
            capture_output=True,
            text=True,
            timeout=900,  # and the whole kit takes minutes
            check=False,
        )

    def ask(self, code: str, **environ: str) -> Any:
        """Run code that leaves its answer in `answer`; return the answer."""
        program = f"{dedent(code)}\nimport json\nprint(json.dumps(answer))"
        done = self.start("-W", "error", "-c", program, **{"RAINFUSION_DISABLED_PLUGINS": HEAVY, **environ})
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture
def site(tmp_path: Path) -> Site:
    """An empty site."""
    return Site(tmp_path)


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Site:
    """A site with the demo backend in it."""
    site = Site(tmp_path_factory.mktemp("demo"))
    site.add_demo()
    return site


@pytest.fixture
def plugin() -> Callable[..., str]:
    """Source of a plugin that announces backends: ``plugin(name="module:Class")``."""

    def source(isolate: bool = False, **targets: str) -> str:
        specs = ", ".join(f"BackendSpec({n!r}, {t!r}, isolate={isolate})" for n, t in targets.items())
        return f"""
            from rainfusion import BackendSpec, hookimpl

            @hookimpl
            def rainfusion_backends():
                return [{specs}]
        """

    return source
