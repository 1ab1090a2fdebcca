"""Ranks that a plain ``python`` starts train exactly what was composed, however it was, wherever it lies."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.test_commands import MNIST, ROOT, TINY, environment, only_run, run, run_python

SMALL = tuple(setting for setting in TINY if not setting.startswith("engine."))
STRANGE = "a=b, (2) 'c' \"d\" [e] {f} $g %s ; # Данные"
pytestmark = pytest.mark.timeout(300)


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """A user's own directory of configurations: own.yaml builds on the project's, experiment/mine.yaml is a choice."""
    directory = tmp_path / "mine"
    (directory / "experiment").mkdir(parents=True)
    primary = "defaults: [mnist, _self_]\nengine: {epochs: 3}\n"
    searchpath = f"hydra:\n  searchpath: ['file://{ROOT}/conf']\n"
    (directory / "own.yaml").write_text(primary + searchpath)
    (directory / "experiment" / "mine.yaml").write_text("# @package _global_\nengine: {epochs: 3}\n")
    return directory


def ways(mine: Path) -> dict[str, list[str]]:
    """The ways in which a user says where the configuration is; each asks for 3 epochs."""
    beside = os.path.relpath(mine, ROOT / "experiments")
    return {
        "config-path": ["--config-path", str(mine), "--config-name", "own"],
        "config-path-beside-the-script": ["-cp", beside, "-cn", "own.yaml"],
        "config-dir": ["--config-dir", str(mine), "experiment=mine"],
        "config-dir-from-here": ["-cd", "mine", "--config-name=own"],
        "searchpath": [f"hydra.searchpath=[file://{mine}]", "experiment=mine"],
        "two-ways": ["--config-path", str(mine), "-cn", "own", f"hydra.searchpath=[file://{ROOT}/conf]"],
        "hydra-settings": ["engine.epochs=3", "hydra.job.chdir=true", "hydra.output_subdir=settings"],
    }


def results(path: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((path / "results.json").read_text())
    return found


QUICK = ("config-path",)


@pytest.mark.parametrize(
    "way", [way if way in QUICK else pytest.param(way, marks=pytest.mark.slow) for way in ways(Path("/"))]
)
def test_ranks_train_what_the_user_composed(way: str, mine: Path) -> None:
    done = run_python(mine.parent, MNIST, *ways(mine)[way], *SMALL, "launch.nproc=1")
    assert done.returncode == 0, done.stderr
    assert results(only_run(mine.parent))["epochs"] == 3


def test_any_path_can_be_the_directory_of_a_run(tmp_path: Path) -> None:
    """Each rank resolves for itself what differs between ranks; the name of the run is the same for all."""
    where = tmp_path / STRANGE
    where.mkdir()
    done = run_python(where, MNIST, *TINY, "engine.checkpoint_dir=kept/${run_id:}", "launch.nproc=2")
    assert done.returncode == 0, done.stderr
    assert results(only_run(where))["world_size"] == 2
    assert {"rank0.log", "rank1.log"} < {path.name for path in only_run(where).iterdir()}
    assert (where / "kept" / only_run(where).name).is_dir()


@pytest.mark.slow
@pytest.mark.parametrize("comm", ["mpi", "thread"])
def test_any_path_can_be_the_directory_of_a_run_on(comm: str, tmp_path: Path) -> None:
    where = tmp_path / STRANGE
    where.mkdir()
    done = run(where, "python", MNIST, *TINY, f"comm={comm}", "launch.nproc=2")
    assert done.returncode == 0, done.stderr
    assert results(only_run(where))["world_size"] == 2


def test_a_sweep_can_name_its_directories_by_what_differs(tmp_path: Path) -> None:
    """An override with a slash makes a directory in a directory; the table has all jobs, in their order."""
    sweep = ["-m", "comm=ring", "comm/transport=shm,gloo", "hydra.sweep.subdir=${hydra.job.override_dirname}"]
    short = "hydra.job.config.override_dirname.exclude_keys=[" + ",".join(s.split("=")[0] for s in TINY) + "]"
    done = run_python(tmp_path, MNIST, *sweep, short, "launch.nproc=1", *TINY)
    assert done.returncode == 0, done.stderr
    found = {path.parent.relative_to(only_run(tmp_path, "multirun/*")) for path in tmp_path.rglob("results.json")}
    assert found == {Path(f"comm/transport={name},comm=ring,launch.nproc=1") for name in ("shm", "gloo")}
    rows = (only_run(tmp_path, "multirun/*") / "sweep.csv").read_text().splitlines()
    assert [re.findall("transport=(shm|gloo)", row)[0] for row in rows[1:]] == ["shm", "gloo"]


SCRIPT = """
import hydra
import sys
from omegaconf import DictConfig, OmegaConf
from experiments.running.run import main, run

OmegaConf.register_new_resolver("three", lambda: 3)

@hydra.main(version_base="1.3", config_path={conf!r}, config_name="mnist")
def mine(cfg: DictConfig) -> float:
    cfg.engine.epochs += 1
    return run(cfg)

if __name__ == "__main__":
    main(mine)
"""


@pytest.mark.parametrize("as_module", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["module", "script"])
def test_ranks_run_the_users_own_script(as_module: bool, tmp_path: Path) -> None:
    """What it registers, what it does to the configuration, and where it is imported from."""
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "mine.py").write_text(SCRIPT.format(conf=str(ROOT / "conf")))
    script = ["-m", "package.mine"] if as_module else ["package/mine.py"]
    settings = ["engine.epochs=${three:}", "hydra.job.chdir=true", "launch.nproc=1", *SMALL]
    done = run(tmp_path, "python", *script, *settings)
    assert done.returncode == 0, done.stderr
    assert results(only_run(tmp_path))["epochs"] == 4


@pytest.mark.slow
def test_nothing_of_the_handing_over_is_left(tmp_path: Path) -> None:
    command: Sequence[str] = (sys.executable, MNIST, *TINY, "launch.nproc=1")
    (tmp_path / "temporary").mkdir()
    variables = environment() | {"TMPDIR": str(tmp_path / "temporary")}
    done = subprocess.run(
        command, cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr
    assert not list((tmp_path / "temporary").glob("minidist*"))
