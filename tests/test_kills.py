"""Ranks that are killed at random moments of a training; `tests.kills` as a program does so a hundred times."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.kills import Kill, drawn, suffer

NUM_KILLS = 20
SEED = 2026


def name(kill: Kill) -> str:
    return f"{kill.kind.launcher}-{kill.kind.comm}-{kill.number}".replace(" ", "-")


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("kill", list(drawn(NUM_KILLS, SEED)), ids=name)
def test_survivors_end_nothing_is_left_and_the_run_goes_on_to_the_same_bits(kill: Kill, tmp_path: Path) -> None:
    outcome = suffer(kill, tmp_path / "kill")
    assert not outcome.wrong, str(outcome)
