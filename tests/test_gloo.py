"""What only Gloo can get wrong: it ends the process at a message that is longer than expected."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.gloo_ranks import others
from tests.harness import run_forked


def run_ranks(what: str, kind: str, tmp_path: Path, world_size: int) -> list[str]:
    """Run a function of tests/gloo_ranks.py on every rank; return what they wrote. A signal that ends one fails."""
    output_file = tmp_path / "output.txt"
    returncode, output = run_forked(
        "tests.gloo_ranks", what, kind, world_size=world_size, output=output_file, limit_s=100
    )
    assert returncode == 0, output
    return [line for line in output.splitlines() if line.endswith("named") or "rror" in line]


@pytest.mark.parametrize(
    ("kind", "world_size"),
    [
        ("gloo", 2),
        ("ring", 2),
        pytest.param("gloo", 4, marks=pytest.mark.slow),
        pytest.param("halving_doubling", 4, marks=pytest.mark.slow),
    ],
)
def test_no_disagreement_ends_a_process(kind: str, world_size: int, tmp_path: Path) -> None:
    lines = run_ranks("disagree", kind, tmp_path, world_size)
    assert len(lines) == world_size * 2 * len(others(1))
    assert [line for line in lines if not line.endswith(": named")] == []


@pytest.mark.parametrize("kind", ["gloo", "ring"])
def test_no_message_ends_a_process(kind: str, tmp_path: Path) -> None:
    assert run_ranks("send_others", kind, tmp_path, 2) == ["named"] * 14


def test_a_rank_may_leave_as_soon_as_it_has_come(tmp_path: Path) -> None:
    assert run_ranks("leave_at_once", "gloo", tmp_path, 2) == ["left and named"] * 2
