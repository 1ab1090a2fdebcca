"""Every command that the README promises, as a user types it, and what is said where one is wrong."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from tests.harness import run_forked

ROOT = Path(__file__).parent.parent
MNIST = str(ROOT / "experiments" / "mnist.py")
TIMEOUT_S = 280
TINY = (
    "data=synthetic",
    "data.shape=[1,8,8]",
    "data.num_samples=96",
    "data.num_test_samples=40",
    "data.batch_size=8",
    "model=mlp",
    "model.width=16",
    "engine.epochs=1",
)
pytestmark = pytest.mark.timeout(300)


def environment() -> dict[str, str]:
    """The environment of a shell in which the virtual environment is active."""
    return {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


def words(value: object) -> str | None:
    """The id of a parameter that is part of a command; None leaves others to pytest."""
    return " ".join(map(str, value)) if isinstance(value, tuple) else None


def run(directory: Path, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=directory, env=environment(), capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )


def run_python(
    directory: Path, script: str, *arguments: str, variables: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """As ``run(directory, "python", ...)``, in a fork of a process that has torch loaded; both outputs are stderr."""
    return run_ranks(directory, None, script, *arguments, variables=variables)


def run_ranks(
    directory: Path,
    world_size: int | None,
    script: str,
    *arguments: str,
    variables: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """As ``run(directory, "torchrun", ...)`` on so many ranks, without torchrun; see `run_python`."""
    with tempfile.TemporaryDirectory() as elsewhere:
        status, output = run_forked(
            script,
            *arguments,
            world_size=world_size,
            output=Path(elsewhere) / "output.txt",
            limit_s=TIMEOUT_S,
            directory=directory,
            environment={**environment(), **(variables or {})},
        )
    assert status is not None, output
    return subprocess.CompletedProcess((script, *arguments), status, "", output)


@contextmanager
def started(directory: Path, *command: str) -> Iterator[subprocess.Popen[str]]:
    """A command that has trained its first steps; whatever happens, it is gone in the end."""
    process = subprocess.Popen(
        command, cwd=directory, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    with process:
        try:
            assert process.stdout is not None
            assert any("Step" in line for line in process.stdout), "it ended before its first line"
            yield process
        finally:
            process.kill()


def only_run(directory: Path, pattern: str = "outputs/*") -> Path:
    (found,) = directory.glob(pattern)
    return found


def check_run(path: Path, comm: str, world_size: int, rank_files: int | None = None) -> None:
    """One directory with one configuration, a log per rank, and results."""
    names = {entry.name for entry in path.iterdir()}
    logs = {f"rank{rank}.log" for rank in range(world_size if rank_files is None else rank_files)}
    assert names == {".hydra", "checkpoints", "metrics.jsonl", "results.json"} | logs
    results = json.loads((path / "results.json").read_text())
    assert (results["comm"], results["world_size"], results["data"]) == (comm, world_size, "synthetic")
    assert results["epochs"] == 1
    assert 0 <= results["accuracy"] <= 1
    assert not results["stopped"]


# Launching --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("launch", "overrides", "comm", "world_size"),
    [
        (("python",), (), "gloo", 1),
        (("torchrun", "--nproc-per-node=2"), ("comm=ring",), "ring/gloo", 2),
        (("mpirun", "-n", "4", "python"), ("comm=mpi",), "mpi", 4),
        (("python",), ("comm=ring", "comm.checked=16", "launch.nproc=2"), "ring/gloo", 2),
        pytest.param(("mpirun", "-n", "2", "python"), ("comm=shm",), "shm", 2, marks=pytest.mark.slow),
        pytest.param(
            ("python",), ("comm=ring", "comm/transport=mpi", "launch.nproc=2"), "ring/mpi", 2, marks=pytest.mark.slow
        ),
        pytest.param(("python",), ("comm=shm", "launch.nproc=3"), "shm", 3, marks=pytest.mark.slow),
    ],
    ids=words,
)
def test_launch(launch: Sequence[str], overrides: Sequence[str], comm: str, world_size: int, tmp_path: Path) -> None:
    done = run(tmp_path, *launch, MNIST, *overrides, *TINY)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Test accuracy: ") == 1
    check_run(only_run(tmp_path), comm, world_size)


def test_launch_threads(tmp_path: Path) -> None:
    done = run_python(tmp_path, MNIST, "comm=thread", "launch.nproc=3", *TINY)
    assert done.returncode == 0, done.stderr
    check_run(only_run(tmp_path), "thread", 3, rank_files=1)


IN_A_JOB = {
    "SLURM_JOB_ID": "5",
    "SLURM_JOBID": "5",
    "SLURM_NODELIST": "node[1-2]",
    "SLURM_JOB_NODELIST": "node[1-2]",
    "SLURM_NNODES": "2",
    "SLURM_TASKS_PER_NODE": "1(x2)",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_NUM_TASKS": "1",
    "SLURM_STEP_TASKS_PER_NODE": "1",
    "RANK": "0",
    "WORLD_SIZE": "1",
}


@pytest.mark.parametrize("comm", [pytest.param("gloo", marks=pytest.mark.slow), "mpi"])
def test_a_shell_in_a_job_starts_ranks_on_its_own_machine(
    comm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in IN_A_JOB.items():
        monkeypatch.setenv(name, value)
    done = run(tmp_path, "python", MNIST, f"comm={comm}", "launch.nproc=2", *TINY)
    assert done.returncode == 0, done.stderr
    check_run(only_run(tmp_path), comm, 2)


def test_the_number_of_ranks_is_the_launchers_where_there_is_one(tmp_path: Path) -> None:
    done = run_ranks(tmp_path, 1, MNIST, "launch.nproc=2", *TINY)
    assert done.returncode == 0, done.stderr
    assert "launch.nproc=2 has no effect: torchrun has started the ranks, and their number is 1; leave" in done.stderr
    check_run(only_run(tmp_path), "gloo", 1)


def test_the_other_experiment(tmp_path: Path) -> None:
    done = run_python(tmp_path, str(ROOT / "experiments" / "cifar10.py"), *TINY, "optim.nesterov=false")
    assert done.returncode == 0, done.stderr
    check_run(only_run(tmp_path), "gloo", 1)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_sweep_with_a_fresh_world_per_job(tmp_path: Path) -> None:
    command = ("python", MNIST, "-m", "comm=gloo,ring,mpi", "launch.nproc=2,4", *TINY)
    done = subprocess.run(
        command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=580, check=False
    )
    assert done.returncode == 0, done.stderr
    check_sweep(tmp_path, done.stdout, [(comm, size) for comm in ("gloo", "ring/gloo", "mpi") for size in (2, 4)])


def test_sweep_inside_one_world(tmp_path: Path) -> None:
    done = run_ranks(tmp_path, 2, MNIST, "-m", "comm=gloo,ring", *TINY)
    assert done.returncode == 0, done.stderr
    check_sweep(tmp_path, done.stderr, [("gloo", 2), ("ring/gloo", 2)])


def check_sweep(directory: Path, stdout: str, jobs: list[tuple[str, int]]) -> None:
    sweep = only_run(directory, "multirun/*")
    for number, (comm, world_size) in enumerate(jobs):
        check_run(sweep / str(number), comm, world_size)
    with (sweep / "sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["comm"], int(row["world_size"])) for row in rows] == jobs
    lines = stdout.splitlines()
    header = next(number for number, line in enumerate(lines) if line.startswith("job "))
    assert lines[header].split()[-6:] == ["comm", "world_size", "loss", "accuracy", "samples_per_s", "comm_share"]
    assert [line.split()[1] for line in lines[header + 1 : header + 1 + len(jobs)]] == [comm for comm, _ in jobs]


# Mistakes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("engine.epochs=0",), "error: engine.epochs must be at least 1, got 0"),
        (("engine.epoch=1",), "error: engine.epoch is not a setting; engine has epochs, accumulation_steps"),
        (("engine.epochs=two",), "error: engine.epochs: Value 'two' of type 'str' could not be converted to Integer"),
        (("comm=telepathy",), "error: comm=telepathy is not there to choose; comm is one of auto, binomial,"),
        (
            ("comm=[gloo,ring]",),
            "error: comm must be one choice, got [gloo,ring]; to run each of them: -m comm=gloo,ring",
        ),
        (("model=[mlp]",), "error: model must be one choice, got [mlp]"),
        (("comm=ring", "comm/transport=[gloo,mpi]"), "error: comm/transport must be one choice, got [gloo,mpi]"),
        (("comm=gloo,ring",), "error: Ambiguous value for argument 'comm=gloo,ring'; add -m to run each of them"),
        (("comm=serial",), "error: launch.nproc=2: backends.serial.SerialCommunicator is one rank alone;"),
        (("comm.colour=red",), "error: comm.colour is not a setting; comm has timeout_s, segment_bytes"),
        (("comm", "ring"), "error: comm ring: a setting and its value are one word, joined by =; write comm=ring"),
        (
            ("comm=swing", "comm.schedules.all_reduce=no.such.schedule"),
            "error: comm.schedules.all_reduce=no.such.schedule cannot be imported: ",
        ),
        (("model._target_=no.such.model",), "error: model._target_=no.such.model cannot be imported: "),
        (("ddp/hook=top_k", "ddp.hook.fraction=1.5"), "error: ddp.hook: TopK: fraction must be above 0 and at most 1,"),
        (("ddp/hook=power_sgd", "ddp.hook.rank=0"), "error: ddp.hook: PowerSGD: rank must be a whole number of at le"),
        (("method=diloco", "method.period=0"), "error: method.period must be at least 1, got 0"),
        (("method=diloco", "method.outer_lr=inf"), "error: method.outer_lr must be finite, got inf"),
        (
            ("method=streaming_diloco", "method.num_fragments=9"),
            "error: method: StreamingDiLoCo: num_fragments is 9, and there are 8 parameters",
        ),
        (("method=gossip", "launch.nproc=1"), "error: method: Gossip: there is nobody to tell with one worker; use mo"),
    ],
    ids=words,
)
def test_mistakes_are_one_line_before_any_rank_starts(overrides: Sequence[str], message: str, tmp_path: Path) -> None:
    done = run_python(tmp_path, MNIST, "launch.nproc=2", *overrides)
    assert done.returncode == 2
    assert done.stderr.startswith(message)
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.rglob("rank1.log"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_nccl_without_a_gpu_is_one_line_before_any_rank_starts(tmp_path: Path) -> None:
    done = run_python(tmp_path, MNIST, "comm=nccl", "launch.nproc=2")
    assert done.returncode == 1
    assert done.stderr.startswith("error: nccl needs")
    assert done.stderr.count("\n") == 1


def test_mpi_under_torchrun_is_said_once(tmp_path: Path) -> None:
    done = run_ranks(tmp_path, 2, MNIST, "comm=mpi", *TINY)
    assert done.returncode != 0
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "mpirun" in line


def test_an_unwritable_data_directory_ends_all_ranks(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = run_ranks(tmp_path, 2, MNIST, f"data.root={tmp_path}/file/data")
    assert done.returncode != 0
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert line.startswith(f"error: data.root={tmp_path}/file/data cannot be written (Not a directory)")


# Ends and new beginnings ------------------------------------------------------------------------

LONG = (*TINY, "engine.epochs=100000", "engine.log_every=1", "launch.nproc=2")


@pytest.mark.parametrize("comm", ["gloo", pytest.param("mpi", marks=pytest.mark.slow)])
def test_ranks_die_with_the_one_who_started_them(comm: str, tmp_path: Path) -> None:
    with started(tmp_path, "python", MNIST, f"comm={comm}", *LONG) as process:
        process.kill()
        process.communicate(timeout=60)  # ends once the last of them has closed its standard output


def test_a_job_of_a_sweep_goes_on_from_itself_and_not_from_the_job_before(tmp_path: Path) -> None:
    sweep = (MNIST, "-m", "optim.lr=0.1,0.2", "engine.resume=true", *TINY)
    first = run_python(tmp_path, *sweep)
    assert first.returncode == 0, first.stderr
    assert first.stderr.count("no earlier run of this command has a checkpoint; starting anew") == 2
    directory = only_run(tmp_path, "multirun/*")
    time.sleep(1)  # runs are named by the second
    again = run_python(tmp_path, *sweep, "engine.epochs=2")
    assert again.returncode == 0, again.stderr
    for number in range(2):
        assert f"going on from {directory / str(number) / 'checkpoints'}" in again.stderr


def test_a_run_goes_on_from_its_own_command_and_not_from_the_last_one(tmp_path: Path) -> None:
    own, other = ((MNIST, f"optim.lr={lr}", *TINY) for lr in ("0.1", "0.2"))
    assert run_python(tmp_path, *own).returncode == 0
    first = only_run(tmp_path)
    assert run_python(tmp_path, *other).returncode == 0
    time.sleep(1)  # runs are named by the second
    again = run_python(tmp_path, *own, "engine.epochs=2", "engine.resume=true")
    assert f"going on from {first / 'checkpoints'}" in again.stderr, again.stderr


@pytest.mark.slow
def test_a_stop_saves_and_the_next_run_goes_on(tmp_path: Path) -> None:
    with started(tmp_path, "python", MNIST, *LONG) as process:
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=90)
    assert process.returncode == 128 + signal.SIGTERM, output
    first = only_run(tmp_path)
    results = json.loads((first / "results.json").read_text())
    assert results["stopped"]
    assert results["accuracy"] is None  # it was not measured, for which JSON has no NaN

    epochs = results["epochs"] + 1
    done = run(tmp_path, "python", MNIST, *LONG, f"engine.epochs={epochs}", "engine.resume=true")
    assert done.returncode == 0, done.stderr
    assert f"going on from {first / 'checkpoints'}" in done.stderr
    (second,) = (path for path in tmp_path.glob("outputs/*") if path != first)
    again = json.loads((second / "results.json").read_text())
    assert again["epochs"] == epochs
    assert again["steps"] > results["steps"]
