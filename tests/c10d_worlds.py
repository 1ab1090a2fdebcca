"""Runs a program of tests/c10d_programs on ranks, and returns what they have saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.harness import run_forked


def run_program(program: str, spec: str, world_size: int, folder: Path, limit_s: float = 110) -> list[Any]:
    """Return what each rank has saved, None for one that has not.

    ``spec`` is of MINIDIST_COMM, or ``torch`` for native Gloo.
    """
    returncode, output = run_forked(
        "tests.c10d_ranks",
        *(program, "gloo" if spec == "torch" else "minidist", str(folder)),
        world_size=world_size,
        output=folder / "output.txt",
        limit_s=limit_s,
        environment={"MINIDIST_COMM": spec},
    )
    assert returncode == 0, output
    files = [folder / f"{program}-{rank}.pt" for rank in range(world_size)]
    return [torch.load(file) if file.exists() else None for file in files]
