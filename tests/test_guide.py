"""docs/first_collective.md: every file of it is written and every command run, in the order of the page."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
GUIDE = (ROOT / "docs" / "first_collective.md").read_text()
PYTHON, YAML, SHELL = (re.findall(rf"```{kind}\n(.*?)```", GUIDE, re.DOTALL) for kind in ("python", "yaml", "sh"))


@pytest.fixture(scope="module")
def mine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("mine")
    (directory / "comm").mkdir()
    (directory / "two_way.py").write_text(PYTHON[0])
    (directory / "mine.py").write_text(PYTHON[1])
    (directory / "comm" / "two_way.yaml").write_text(YAML[0])
    return directory


def run(command: str, mine: Path) -> str:
    """Run a command of the page as a newcomer would, but for the directories that it writes into."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = {**os.environ, "PATH": path, "MINE": str(mine), "PYTHONPATH": str(mine), "COLUMNS": "200"}
    if "experiments/" in command:
        command += f" hydra.run.dir={mine}/out"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_the_files_are_those_that_the_page_names() -> None:
    assert [len(blocks) for blocks in (PYTHON, YAML, SHELL)] == [2, 1, 7]
    assert "mkdir -p $MINE/comm" in SHELL[0]


@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (1, "8 ranks: 14 steps"),
        (2, "two_way is the fastest"),
        (3, "schedule.png, .svg, .html"),
        pytest.param(4, "two_way", marks=pytest.mark.slow),
        (5, "Test accuracy"),
        (6, "passed"),
    ],
    ids=["prove", "curves", "draw", "bench", "train", "conformance"],
)
def test_its_commands_run(number: int, expected: str, mine: Path) -> None:
    for command in SHELL[number].strip().splitlines():
        output = run(command, mine)
        assert expected in output or "flat" in command, output


def test_the_broken_schedule_says_what_the_page_says(mine: Path) -> None:
    broken = mine / "broken.py"
    broken.write_text(PYTHON[0].replace("range(first, last)", "range(first, last - 1)"))
    done = subprocess.run([sys.executable, broken], capture_output=True, text=True, timeout=60, check=False)
    sentence = re.search(r"^minidist\.errors\.ScheduleError: .*$", GUIDE, re.MULTILINE)
    assert sentence is not None
    assert sentence.group() in done.stderr


def test_on_a_ring_of_links_both_ways_take_half_the_time() -> None:
    """What the page says of its pictures."""
    from functools import partial

    from minidist.analysis.network import Flat, Torus
    from minidist.analysis.simulate import simulate
    from minidist.collective import Run

    scope: dict[str, object] = {"__name__": "two_way"}
    exec(PYTHON[0], scope)
    from backends.ring import ring_all_reduce

    times = partial(simulate, run=Run("all_reduce", 8), nbytes=2**26)
    for network, gain in ((Torus(1, 8, 1e-6, 2e-11), 2), (Flat(1e-6, 2e-11), 1)):
        both = [times(schedule, network=network).seconds for schedule in (ring_all_reduce, scope["two_way_all_reduce"])]
        assert both[0] / both[1] == pytest.approx(gain, rel=0.02)
