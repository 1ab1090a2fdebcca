"""docs/your_first_compressor.md: every file of it is written and every command run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.test_guide import ROOT, run

GUIDE = (ROOT / "docs" / "your_first_compressor.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", GUIDE, re.DOTALL | re.MULTILINE)
PYTHON, YAML, SHELL, OUTPUT, ROWS = (
    [text for kind, text in BLOCKS if kind == wanted] for wanted in ("python", "yaml", "sh", "", "text")
)


@pytest.fixture(scope="module")
def mine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("mine")
    (directory / "ddp" / "hook" / "compressor").mkdir(parents=True)
    (directory / "round_robin.py").write_text(PYTHON[0])
    (directory / "check.py").write_text(PYTHON[1])
    (directory / "ddp" / "hook" / "compressor" / "round_robin.yaml").write_text(YAML[0])
    return directory


def test_the_check_prints_what_the_page_says(mine: Path) -> None:
    assert run(SHELL[1].strip(), mine) == OUTPUT[0]


@pytest.mark.slow
def test_the_training_runs(mine: Path) -> None:
    accuracy = re.findall(r"Test accuracy: ([\d.]+) %", run(SHELL[2].strip(), mine))
    assert float(accuracy[-1]) > 40


def test_the_judge_has_a_row_for_it(mine: Path) -> None:
    output = run(SHELL[3].strip(), mine)
    rows = [line.split() for line in output.splitlines() if line.startswith("digits  ")]
    theirs = [line.split() for line in ROWS[0].splitlines() if line.startswith("digits  ")]
    assert [row[1] for row in rows] == [row[1] for row in theirs]
    assert [row[5] for row in rows] == [row[5] for row in theirs]  # how many fewer bytes, which depends on no clock
