"""Random things on shared memory, with ranks that are late and ranks that are killed; none but right results, no leak.

Ten minutes of it: ``MINIDIST_STRESS_S=75 pytest --slow tests/test_stress.py``.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from tests.harness import run_forked

SECONDS = float(os.environ.get("MINIDIST_STRESS_S", "8"))
WORLD_SIZES = (2, 3, 4, 8)


def run_ranks(world_size: int, victim: int, output: Path, seed: int) -> tuple[int | None, str]:
    return run_forked(
        "tests.stress_ranks",
        *(str(seed), str(SECONDS), str(victim)),
        world_size=world_size,
        output=output,
        limit_s=SECONDS + 90,
    )


@pytest.mark.slow
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_random_operations_are_right(world_size: int, tmp_path: Path) -> None:
    returncode, output = run_ranks(world_size, -1, tmp_path / "output.txt", int(time.time()))
    assert returncode == 0, output
    assert output.count("did ") == world_size, output


@pytest.mark.slow
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_a_kill_in_the_middle_of_anything_is_named(world_size: int, tmp_path: Path) -> None:
    seed = int(time.time())
    victim = seed % world_size
    _, output = run_ranks(world_size, victim, tmp_path / "output.txt", seed)
    assert output.count(f"lost ({victim},)") == world_size - 1, output
