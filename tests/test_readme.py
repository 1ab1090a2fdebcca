"""The README says what is there: its example runs, its files exist, its commands are those that are tested."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
TESTED = (ROOT / "tests" / "test_commands.py").read_text()


def test_example_prints_what_it_says() -> None:
    example = re.findall(r"```python\n(.*?)```", README, re.DOTALL)[0]
    done = subprocess.run([sys.executable, "-c", example], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.count("tensor([6., 6., 6.])") == 4, done.stderr


@pytest.mark.parametrize("path", sorted(set(re.findall(r"\]\(([^)#]+)\)", README))))
def test_linked_files_exist(path: str) -> None:
    assert (ROOT / path).exists()


@pytest.mark.parametrize("group", ["comm", "data"])
def test_choices_exist(group: str) -> None:
    named = set(re.findall(rf"\b{group}=([a-z0-9_]+(?:,[a-z0-9_]+\b(?!=))*)", README)) - {"mine"}
    there = {path.stem for path in (ROOT / "conf" / group).glob("*.yaml")}
    assert named
    assert {choice for choices in named for choice in choices.split(",")} <= there


def test_launch_commands_are_tested() -> None:
    launching = README.split("## Launching")[1].split("```")[1]
    commands = [line.split("#")[0].split() for line in launching.strip().splitlines()]
    assert len(commands) >= 5
    for words in commands:
        settings = [word for word in words if "=" in word or word in ("-m", "-n", "torchrun", "mpirun")]
        assert all(f'"{setting}"' in TESTED for setting in settings), words


def test_no_source_file_is_ignored_by_git() -> None:
    sources = [
        str(p.relative_to(ROOT)) for name in ("conf", "minidist", "backends") for p in (ROOT / name).rglob("*.*")
    ]
    named = [name for name in sources if "__pycache__" not in name]
    done = subprocess.run(["git", "check-ignore", *named], cwd=ROOT, capture_output=True, text=True, check=False)
    assert not done.stdout, f"git leaves out:\n{done.stdout}"
