"""Libraries that train on torch.distributed, on minidist: programs of tests/ecosystem, which know nothing of it.

Each checks its own result; what it has trained is the same, bit for bit, as over Gloo.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.harness import ROOT, command, run_command

pytestmark = pytest.mark.slow
ENVIRONMENT = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1"}


def trained(program: str, *arguments: str, folder: Path, bridge: tuple[str, ...] = ()) -> tuple[str, str]:
    """Run a program on two ranks; return what names its parameters, and the backend."""
    path = str(ROOT / "tests" / "ecosystem" / program)
    started = command("torchrun", 2, *bridge, path, *arguments)
    returncode, output = run_command(started, folder / "output.txt", 110, ENVIRONMENT)
    assert returncode == 0, output
    said = re.findall(r"^replicas (\w+) on (\w+)$", output, re.MULTILINE)
    assert len(said) == 2, output
    (both,) = set(said)
    return both


@pytest.mark.timeout(240)
@pytest.mark.parametrize("program", ["fabric_loop.py", "lightning_fit.py"])
def test_a_library_that_is_given_the_name(program: str, tmp_path: Path) -> None:
    ours, backend = trained(program, "minidist", str(tmp_path / "ours"), folder=tmp_path)
    theirs, native = trained(program, "gloo", str(tmp_path / "theirs"), folder=tmp_path)
    assert (backend, native) == ("MinidistBackend", "ProcessGroupGloo")
    assert ours == theirs


@pytest.mark.timeout(240)
@pytest.mark.parametrize("program", ["accelerate_loop.py", "transformers_fit.py"])
def test_a_library_that_asks_for_gloo(program: str, tmp_path: Path) -> None:
    bridge = ("-m", "minidist.c10d", "--as", "gloo")
    ours, backend = trained(program, str(tmp_path / "ours"), folder=tmp_path, bridge=bridge)
    theirs, native = trained(program, str(tmp_path / "theirs"), folder=tmp_path)
    assert (backend, native) == ("MinidistBackend", "ProcessGroupGloo")
    assert ours == theirs
