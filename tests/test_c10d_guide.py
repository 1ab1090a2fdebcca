"""docs/your_collective_elsewhere.md: its files are written, and its commands run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness import ROOT

PAGE = (ROOT / "docs" / "your_collective_elsewhere.md").read_text()
PYTHON, SHELL = (re.findall(rf"```{kind}\n(.*?)```", PAGE, re.DOTALL) for kind in ("python", "sh"))
COMMANDS = [line for block in SHELL for line in block.splitlines()]
REPEATED = ("--as gloo", "halving_doubling")
"""In commands that differ from others in what tests/test_c10d.py runs too."""
COURSE = ROOT / "tests" / "c10d_course.py"
"""It imports the adapter by its name, as a course's tests do."""


def run(command: str, folder: Path) -> str:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = {**os.environ, "PATH": path, "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(["bash", "-c", command], cwd=folder, env=env, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(command, marks=[pytest.mark.slow] if any(part in command for part in REPEATED) else [])
        for command in COMMANDS
    ],
)
def test_a_command_of_the_page(tmp_path: Path, command: str) -> None:
    text = PYTHON[0].replace('"minidist"', '"gloo"') if "--as gloo" in command else PYTHON[0]
    (tmp_path / "train.py").write_text(text)
    assert "the gradient has 4 elements" in run(command, tmp_path)


def test_the_adapter_of_the_page(tmp_path: Path) -> None:
    """It is all that a course's tests of a DDP need, which start the ranks and their process group themselves."""
    assert len(PYTHON[1].splitlines()) <= 15
    (tmp_path / "adapter.py").write_text(PYTHON[1])
    output = run(f"python {COURSE}", tmp_path)
    assert output.count("trained as one process does") == 2, output
