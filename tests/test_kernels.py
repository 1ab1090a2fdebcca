"""Which path the collectives of shared memory take, and what compiles the kernels of the faster one."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from backends.shm.communicator import ShmCommunicator
from backends.shm.compiled import loading
from minidist.errors import BackendUnavailableError
from tests.harness import ROOT, run_forked

LOAD = "from backends.shm.compiled import loading; loading.kernels(); print(loading._directory())"


def run_python(program: str, **environment: str) -> str:
    """Run a program in a process of its own; return what it printed."""
    variables = {**os.environ, **environment}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, env=variables)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_imports_load_no_numba() -> None:
    program = "import sys, minidist, backends, backends.shm; print('numba' in sys.modules)"
    assert run_python(program) == "False"


def test_an_unknown_choice_is_refused() -> None:
    with pytest.raises(ValueError, match="kernels must be one of auto, compiled, torch, got 'fast'"):
        ShmCommunicator(kernels="fast")


def test_without_numba_torch_does_it_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(loading, "is_installed", lambda: False)
    with pytest.raises(BackendUnavailableError, match=r"kernels=compiled needs numba; pip install minidist\[fast\]"):
        ShmCommunicator(kernels="compiled")
    with caplog.at_level(logging.INFO), ShmCommunicator() as comm:
        comm.all_reduce(torch.ones(3))
    assert [record.message for record in caplog.records] == [
        "shm runs on torch's operations, as not all ranks have numba; pip install minidist[fast] for its faster kernels"
    ]


@pytest.mark.parametrize(
    ("first", "second", "outcome"),
    [("auto", "torch", ["sum 3", "sum 3"]), ("compiled", "torch", ["refused", "lost"])],
)
def test_all_ranks_take_one_path(first: str, second: str, outcome: list[str], tmp_path: Path) -> None:
    returncode, output = run_forked(
        "tests.shm_ranks", "mix_paths", first, second, world_size=2, output=tmp_path / "output.txt", limit_s=100
    )
    assert returncode == 0, output
    assert sorted(re.findall("sum 3|refused|lost", output)) == sorted(outcome), output  # lines of two ranks may mix


def test_kernels_are_compiled_once(tmp_path: Path) -> None:
    directory = Path(run_python(LOAD, XDG_CACHE_HOME=str(tmp_path)))
    assert directory.is_relative_to(tmp_path)
    kept = {path: path.stat().st_mtime_ns for path in directory.rglob("*.nb*")}
    assert len(kept) >= 8, "four kernels and a reducer, each with its index"
    run_python(LOAD, XDG_CACHE_HOME=str(tmp_path))
    assert {path: path.stat().st_mtime_ns for path in directory.rglob("*.nb*")} == kept


def test_kernels_are_kept_where_nobody_else_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(loading.tempfile, "gettempdir", lambda: str(tmp_path / "temporary"))
    find = loading._directory.__wrapped__
    assert find().parent == tmp_path / "minidist"
    (tmp_path / "minidist").chmod(0o777)
    assert find().parent == tmp_path / "temporary" / f"minidist-{os.getuid()}"
    find().chmod(0o777)
    with pytest.raises(PermissionError, match="must belong to user"):
        find()


def test_a_user_without_a_home_has_kernels_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(loading.Path, "home", no_home)
    monkeypatch.setattr(loading.tempfile, "gettempdir", lambda: str(tmp_path))
    assert loading._directory.__wrapped__().parent == tmp_path / f"minidist-{os.getuid()}"
