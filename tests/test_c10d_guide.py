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
BORROWED = """
import torch
import torch.distributed as dist
from adapter import get_ddp
from torch import nn

dist.init_process_group("gloo")
torch.manual_seed(dist.get_rank())
model = get_ddp(nn.Linear(4, 1, bias=False))
model(torch.full((2, 4), float(dist.get_rank()))).sum().backward()
(gradient,) = (parameter.grad for parameter in model.parameters())
weights = [torch.empty(1, 4) for _ in range(2)]
dist.all_gather(weights, model.module.weight.detach())
assert torch.equal(*weights)
if dist.get_rank() == 0:
    print("the gradient has", gradient.numel(), "elements", gradient.tolist())
dist.destroy_process_group()
"""


def run(command: str, folder: Path) -> str:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = {**os.environ, "PATH": path, "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(["bash", "-c", command], cwd=folder, env=env, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_page(tmp_path: Path, command: str) -> None:
    text = PYTHON[0].replace('"minidist"', '"gloo"') if "--as gloo" in command else PYTHON[0]
    (tmp_path / "train.py").write_text(text)
    assert "the gradient has 4 elements" in run(command, tmp_path)


def test_the_adapter_of_the_page(tmp_path: Path) -> None:
    """It is all that a course's tests of a DDP need, which make the process group themselves."""
    assert len(PYTHON[1].splitlines()) <= 15
    (tmp_path / "adapter.py").write_text(PYTHON[1])
    (tmp_path / "train.py").write_text(BORROWED)
    output = run("torchrun --standalone --nproc-per-node=2 train.py", tmp_path)
    assert "the gradient has 4 elements [[1.0, 1.0, 1.0, 1.0]]" in output
