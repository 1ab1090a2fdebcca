"""Kills ranks at random moments of a training, and looks at what is left: ``python -m tests.kills 100 --seed 1``.

Each kill has a run of experiments/mnist.py of its own, which SIGKILL meets within some step: one rank, or all ranks of
a host. Then the ranks that are left have to end within LIMIT_S, no process, temporary file or name in shared memory may
stay, and the same command, told to resume, has to end with the parameters, bit for bit, of a run that nobody disturbed.
Ranks that are threads have one process, which no rank outlives: they are left out.
"""

from __future__ import annotations

import argparse
import functools
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import psutil
import torch
from torch import Tensor

from tests import fork_server
from tests.harness import ROOT, command, end_launcher
from tests.hosts import Network
from tests.left_behind import holders, in_memory, orphans, processes_in, seconds_until_ended

MNIST = str(ROOT / "experiments" / "mnist.py")
LIMIT_S = 10.0
"""Within this time of the kill all other ranks have to have ended."""
RUN_LIMIT_S = 120.0
NUM_STEPS = 120
SETTINGS = (
    *("data=synthetic", "data.shape=[1,8,8]", "data.num_samples=96", "data.num_test_samples=40", "data.batch_size=8"),
    *("model=cnn", "model.width=8", "engine.log_every=1", "engine.checkpoint_every_steps=2", "engine.progress=false"),
)
"""A model with dropout and batches in random order."""
TWO_BY_TWO = (0, 0, 1, 1)
TORCHS_OWN = ("torchelastic_", "torchinductor_")
"""Temporary folders that torchrun and torch leave of every run, also of those that end well."""


class Started(NamedTuple):
    """What runs: what it has written, whether it has ended, and what returns its exit status, or None at a limit."""

    output: Callable[[], str]
    has_ended: Callable[[], bool]
    finish: Callable[[float], int | None]


class Kind(NamedTuple):
    """A communicator, in the words of its settings, and what starts its ranks: see `STARTS`."""

    comm: str
    launcher: str

    @property
    def world_size(self) -> int:
        return len(TWO_BY_TWO) if self.launcher == "hosts" else 2

    @property
    def settings(self) -> list[str]:
        """The arguments of the command, of as many steps on any number of ranks."""
        epochs = NUM_STEPS * 8 * self.world_size // 96
        return [*self.comm.split(), *SETTINGS, f"engine.epochs={epochs}"]


KINDS = (
    *(Kind(comm, launcher) for launcher in ("forked", "torchrun") for comm in ("comm=gloo", "comm=ring", "comm=shm")),
    *(Kind(comm, "mpirun") for comm in ("comm=mpi", "comm=ring comm/transport=mpi", "comm=shm")),
    *(Kind(comm, "nproc") for comm in ("comm=ring", "comm=shm", "comm=mpi")),
    *(Kind(comm, "hosts") for comm in ("comm=gloo", "comm=ring", "comm=hierarchical")),
    Kind("comm=hierarchical comm/inter=ring", "hosts"),
    Kind("comm=ring comm.checked=true", "forked"),
)


@dataclass(frozen=True)
class Kill:
    """One kill: of which ranks, and how long after which step was reported."""

    number: int
    kind: Kind
    ranks: tuple[int, ...]
    step: int
    after_s: float


@dataclass(frozen=True)
class Outcome:
    """What became of it; ``wrong`` says what should not have."""

    kill: Kill
    ended_s: float | None
    wrong: str

    def __str__(self) -> str:
        kill = self.kill
        who = f"rank{'s' * (len(kill.ranks) > 1)} {', '.join(map(str, kill.ranks))}"
        when = f"step {kill.step} + {kill.after_s * 1e3:.0f} ms"
        ended = "-" if self.ended_s is None else f"{self.ended_s:.1f} s"
        row = f"{kill.number:>4}  {kill.kind.comm:<34} {kill.kind.launcher:<9} {who:<11} {when:<18} {ended:>7}"
        return f"{row}  {self.wrong or 'same bits'}"


def drawn(count: int, seed: int, kinds: Sequence[Kind] = KINDS) -> Iterator[Kill]:
    """Yield kills of all kinds in turn, each at another moment."""
    draw = random.Random(seed)
    for number in range(count):
        kind = kinds[number % len(kinds)]
        ranks: tuple[int, ...] = (draw.randrange(kind.world_size),)
        if kind.launcher == "hosts" and draw.random() < 0.5:
            host = draw.randrange(2)
            ranks = tuple(rank for rank, on in enumerate(TWO_BY_TWO) if on == host)
        yield Kill(number, kind, ranks, draw.randrange(20, NUM_STEPS - 20), draw.uniform(0, 0.05))


# Starting ---------------------------------------------------------------------------------------


def forked(kind: Kind, directory: Path, arguments: list[str]) -> Iterator[Started]:
    """Start forks of a process that has imported everything."""
    output = directory / "output.txt"
    output.touch()
    order = fork_server.Order(MNIST, arguments, kind.world_size, str(directory), str(output), environment(directory))
    running = fork_server.server().start(order)
    try:
        yield Started(output.read_text, lambda: running.has_ended(0), running.finish)
    finally:
        running.finish(0)


def launched(kind: Kind, directory: Path, arguments: list[str]) -> Iterator[Started]:
    """Start a launcher, or what starts one."""
    if kind.launcher == "nproc":
        whole = [sys.executable, MNIST, f"launch.nproc={kind.world_size}", *arguments]
    else:
        whole = command(kind.launcher, kind.world_size, MNIST, *arguments)
    with (directory / "output.txt").open("w") as output:
        process = subprocess.Popen(
            whole, cwd=directory, env=environment(directory), stdout=output, stderr=output, start_new_session=True
        )

    def finish(limit_s: float) -> int | None:
        try:
            return process.wait(limit_s)
        except subprocess.TimeoutExpired:
            return None

    try:
        yield Started((directory / "output.txt").read_text, lambda: process.poll() is not None, finish)
    finally:
        if process.poll() is None:
            end_launcher(process)


def on_hosts(kind: Kind, directory: Path, arguments: list[str]) -> Iterator[Started]:
    """Start forks on two hosts of two ranks."""
    with (
        Network(2, mbit_per_s=1000) as network,
        network.start(
            MNIST, *arguments, on=TWO_BY_TWO, environment={"TMPDIR": str(directory / "tmp")}, directory=directory
        ) as ranks,
    ):

        def finish(limit_s: float) -> int | None:
            ranks.end(limit_s)
            return ranks.status

        yield Started(lambda: ranks.output, ranks.has_ended, finish)


STARTS = {
    "forked": contextmanager(forked),
    "torchrun": contextmanager(launched),
    "mpirun": contextmanager(launched),
    "nproc": contextmanager(launched),
    "hosts": contextmanager(on_hosts),
}


def environment(directory: Path) -> dict[str, str]:
    """Return that of this process, with a folder for temporary files that is the run's own."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(directory / "tmp")}


# A kill -----------------------------------------------------------------------------------------


class Training:
    """One command in a directory of its own, which may be run again to go on."""

    def __init__(self, kind: Kind, directory: Path) -> None:
        self.kind = kind
        self.directory = directory
        (directory / "tmp").mkdir(parents=True)

    @contextmanager
    def started(self, name: str, *more: str) -> Iterator[Started]:
        """Start it, with a directory for what it writes; it is gone in the end."""
        where = (f"hydra.run.dir={self.directory / name}", f"engine.checkpoint_dir={self.directory / 'checkpoints'}")
        with STARTS[self.kind.launcher](self.kind, self.directory, [*self.kind.settings, *where, *more]) as run:
            yield run

    def run_to_end(self, name: str, *more: str) -> str:
        """Return what it has written, if it ends well."""
        with self.started(name, *more) as run:
            status = run.finish(RUN_LIMIT_S)
            assert status == 0, f"{name}: exit status {status}\n{run.output()[-4000:]}"
            return run.output()

    def rank_process(self, run: str, rank: int) -> psutil.Process:
        """Return the process of a rank: the youngest that writes its log, which who started the ranks may have too."""
        found = holders(self.directory / run / f"rank{rank}.log", self.directory)
        return max(found, key=lambda process: process.pid)

    def parameters(self) -> dict[str, Tensor]:
        newest = max((self.directory / "checkpoints").glob("step_*.pt"))
        found: dict[str, Tensor] = torch.load(newest, weights_only=True)["shared"]["model"]
        return found


@functools.cache
def undisturbed(comm: str, world_size: int, launcher: str) -> dict[str, Tensor]:
    """Return the parameters of a run that nobody kills."""
    with tempfile.TemporaryDirectory() as directory:
        training = Training(Kind(comm, launcher), Path(directory) / "straight")
        training.run_to_end("run")
        return training.parameters()


def expected(kind: Kind) -> dict[str, Tensor]:
    """Return what a resumed run has to end with, whichever launcher has started it."""
    needs_mpi = "mpi" in kind.comm
    launcher = kind.launcher if kind.launcher == "hosts" else "mpirun" if needs_mpi else "forked"
    return undisturbed(kind.comm, kind.world_size, launcher)


def suffer(kill: Kill, directory: Path) -> Outcome:
    """Run, kill, look, and resume."""
    training, before = Training(kill.kind, directory), in_memory()
    ended_s: float | None = None
    try:
        with training.started("killed") as run:
            wait_for(run, "Step 1 |")
            everybody = [training.rank_process("killed", rank) for rank in range(kill.kind.world_size)]
            wait_for(run, f"Step {kill.step} |")
            time.sleep(kill.after_s)
            for rank in kill.ranks:
                everybody[rank].kill()
            survivors = [process for rank, process in enumerate(everybody) if rank not in kill.ranks]
            ended_s = seconds_until_ended(survivors, RUN_LIMIT_S)
            status, output = run.finish(RUN_LIMIT_S), run.output()[-4000:]
        assert ended_s is not None, f"survivors did not end\n{output}"
        assert ended_s < LIMIT_S, f"survivors took {ended_s} s\n{output}"
        assert status not in (0, None), f"exit status {status}\n{output}"
        look(directory, before)
        output = training.run_to_end("resumed", "engine.resume=true")
        assert "Step 1 |" not in output, f"it began again\n{output}"
        look(directory, before)
        compare(training.parameters(), expected(kill.kind))
    except AssertionError as error:
        return Outcome(kill, ended_s, str(error))
    return Outcome(kill, ended_s, "")


def wait_for(run: Started, text: str) -> None:
    until = time.monotonic() + RUN_LIMIT_S
    while text not in run.output():
        late = time.monotonic() > until or run.has_ended()
        assert not late, f"{text!r} did not come:\n{run.output()[-4000:]}"
        time.sleep(0.002)


def look(directory: Path, before: set[str]) -> None:
    """Raise AssertionError if a process, a temporary file or a name in shared memory is left."""
    left = [process.pid for process in processes_in(directory)]
    assert not left, f"processes {left} are left"
    files = [str(path) for path in (directory / "tmp").iterdir() if not path.name.startswith(TORCHS_OWN)]
    assert not files, f"files are left: {', '.join(files)}"
    names = orphans(before)
    assert not names, f"shared memory is left: {', '.join(sorted(names))}"


def compare(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    different = [name for name, value in wanted.items() if not torch.equal(value, found[name])]
    assert not different, f"other bits in {', '.join(different)}"


def main() -> None:
    """Print a row for each kill, and how many went well."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=int, nargs="?", default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--backend", help="only the kinds with this word in them, as ring, hosts or torchrun")
    given = parser.parse_args()
    kinds = [kind for kind in KINDS if given.backend is None or given.backend in " ".join(kind)]
    well = list[float]()
    for kill in drawn(given.runs, given.seed, kinds):
        with ExitStack() as stack:
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            outcome = suffer(kill, directory / "kill")
        print(outcome, flush=True)
        if not outcome.wrong and outcome.ended_s is not None:
            well.append(outcome.ended_s)
    slowest = f", the slowest survivor after {max(well):.1f} s" if well else ""
    print(f"{len(well)} of {given.runs} kills ended well{slowest}")
    sys.exit(len(well) < given.runs)


if __name__ == "__main__":
    main()
