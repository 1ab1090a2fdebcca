"""docs/my_training_hangs.md: its script is written, its commands run, and they say what the page says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness import ROOT

PAGE = (ROOT / "docs" / "my_training_hangs.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
PYTHON, SHELL, OUTPUT = ([text for kind, text in BLOCKS if kind == wanted] for wanted in ("python", "sh", ""))
MEASURED = re.compile(r"[\d.e+-]+ m?s\b")


def run(command: str, folder: Path) -> tuple[int, str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(["bash", "-c", command], cwd=folder, env=env, capture_output=True, text=True, timeout=100)
    return done.returncode, done.stdout + done.stderr


def without_times(text: str) -> list[str]:
    """Return the lines with one space for several, as columns are as wide as the times in them."""
    return [" ".join(MEASURED.sub("T", line).split()) for line in text.strip().splitlines()]


@pytest.mark.timeout(240)
def test_its_commands_say_what_the_page_says(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(PYTHON[0])
    returncode, output = run(SHELL[0].strip(), tmp_path)
    assert returncode != 0
    (error,) = without_times(OUTPUT[0])
    assert error in " ".join(without_times(output)), output
    returncode, output = run(SHELL[1].strip(), tmp_path)
    assert returncode == 0, output
    assert without_times(output) == without_times(OUTPUT[2])


RAISES = """
import torch
import torch.distributed as dist

dist.init_process_group("minidist")
dist.all_reduce(torch.ones(3))
if dist.get_rank() == 1:
    raise ValueError("boom")
dist.all_reduce(torch.ones(3))
"""


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize("spec", ["gloo", "shm", "checked/gloo"])
def test_an_error_that_ends_a_stock_program_is_what_the_others_hear(spec: str, tmp_path: Path) -> None:
    """It is caught by nobody, and closes nothing."""
    (tmp_path / "raises.py").write_text(RAISES)
    command = f"MINIDIST_COMM={spec} torchrun --standalone --nproc-per-node=2 raises.py"
    returncode, output = run(command, tmp_path)
    assert returncode != 0
    assert re.search(r"rank 1 is gone: ValueError: boom at raises.py:8, after all_reduce #\d+", output), output
