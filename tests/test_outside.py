"""The conformance suite on communicators that are not in its table, by the command that its docstring names."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.harness import run_command

SOME = "values or split or timeout or rank_is_named"
"""What is run by default: each kind of hook, and what becomes of a rank that is gone."""


def _conformance(directory: Path, limit_s: float, *options: str) -> tuple[int | None, str]:
    command = [sys.executable, "-m", "pytest", "-q", "tests/test_conformance.py", *options]
    return run_command(command, directory / "output.txt", limit_s)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("checks", [SOME, pytest.param("", marks=pytest.mark.slow)], ids=["some", "all"])
def test_a_communicator_from_outside_passes(checks: str, tmp_path: Path) -> None:
    options = [
        "--comm",
        "tests.outside.StoreCommunicator",
        "--comm-launcher",
        "torchrun",
        "--world-sizes",
        "3",
        "-k",
        f"not training and ({checks})" if checks else "not training",
    ]
    for check in ("killed_rank", "exiting_rank"):
        options += ["--comm-lacks", f"{check}=nobody watches the processes"]
    returncode, output = _conformance(tmp_path, 280, *options)
    assert returncode == 0, output
    assert "nobody watches the processes" in output


@pytest.mark.timeout(120)
def test_a_communicator_that_is_wrong_fails_with_its_traceback(tmp_path: Path) -> None:
    options = ["--comm", "tests.outside.ForgetfulCommunicator", "--world-sizes", "2", "-k", "check_all_reduce_values"]
    returncode, output = _conformance(tmp_path, 100, *options)
    assert returncode == 1, output
    assert "all_reduce torch.float64 ReduceOp.AVG 1: got" in output
    assert "1 failed" in output
