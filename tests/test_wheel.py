"""The project as others install it: a wheel, in an environment that has never seen this directory."""

from __future__ import annotations

import json
import os
import shutil
import site
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

from tests.test_commands import TINY, only_run

ROOT = Path(__file__).parent.parent
PACKAGES = ("minidist", "backends", "experiments")
pytestmark = pytest.mark.timeout(300)


def run(directory: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Run a command that finds nothing but what is installed."""
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        command, cwd=directory, env=variables, capture_output=True, text=True, timeout=250, check=False
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of a copy of the sources: building leaves things behind, and finds what was left behind."""
    directory = tmp_path_factory.mktemp("wheel")
    left_out = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in (*PACKAGES, "conf"):
        shutil.copytree(ROOT / name, directory / "copy" / name, ignore=left_out)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, directory / "copy" / name)
    pip = (sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", ".", "./copy")
    run(directory, *pip)
    return only_run(directory, "*.whl")


def test_a_wheel_holds_every_module_and_every_configuration(wheel: Path) -> None:
    sources = [path for name in PACKAGES for pattern in ("*.py", "*.html") for path in (ROOT / name).rglob(pattern)]
    expected = {path.relative_to(ROOT).as_posix() for path in sources}
    expected |= {f"experiments/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "conf").rglob("*.yaml")}
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert held == expected


def test_an_installed_project_trains_from_any_directory(wheel: Path, tmp_path: Path) -> None:
    """The environment borrows the libraries of the one that tests, but not what leads to these sources."""
    venv.create(tmp_path / "clean", symlinks=True)
    python = str(tmp_path / "clean" / "bin" / "python")
    run(tmp_path, sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", str(wheel))
    (installed,) = (tmp_path / "clean" / "lib").glob("python*/site-packages")
    (installed / "borrowed.pth").write_text("\n".join(site.getsitepackages()))
    work = tmp_path / "elsewhere"
    work.mkdir()
    found = run(work, python, "-c", "import minidist; print(minidist.__file__)").stdout
    assert Path(found.strip()).parent == installed / "minidist"
    small = [setting for setting in TINY if not setting.startswith("data")]
    run(work, python, "-m", "experiments.mnist", "data=digits", "comm=ring", "launch.nproc=2", *small)
    results = json.loads((only_run(work) / "results.json").read_text())
    assert (results["data"], results["world_size"]) == ("digits", 2)
