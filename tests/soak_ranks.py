"""One rank of a world on hosts that does random things for long, as `tests.soak` starts it.

Random collectives, messages and splits with ranks that are late (`tests.stress_ranks`), and between them objects,
steps of training, and a checkpoint that is written and read back. Results have a closed form, or are one on all ranks.
"""

from __future__ import annotations

import gc
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from minidist.communicator import Communicator
from minidist.training.checkpoint import Checkpoints, State
from tests import stress_ranks, training_checks
from tests.host_ranks import MAKE, say
from tests.shm_ranks import footprint

SLICE_S = 2.0
WARM_UP_S = 20.0
"""After that everything has been made that is made once."""
TELL_S = 30.0


class Held(NamedTuple):
    """What a process has, in the order in which `held` counts it."""

    files: int
    heaps: int
    threads: int
    bytes: int


def held() -> Held:
    """Count what this process has now, without what only waits to be collected."""
    gc.collect()
    files, heaps, resident = footprint()
    return Held(files, heaps, len(os.listdir("/proc/self/task")), resident)


def objects(comm: Communicator, draw: random.Random) -> None:
    """Gather objects of many sizes, and broadcast one."""
    sizes = [int(2 ** draw.uniform(0, 16)) for _ in range(comm.world_size)]
    root = draw.randrange(comm.world_size)
    gathered = comm.all_gather_object({"rank": comm.rank, "text": "x" * sizes[comm.rank]})
    assert [one["rank"] for one in gathered] == list(range(comm.world_size))
    assert [len(one["text"]) for one in gathered] == sizes
    assert comm.broadcast_object([comm.rank] * sizes[root], root) == [root] * sizes[root]


def training(comm: Communicator, directory: Path) -> Iterator[None]:
    """Train some steps at a time; save, go on, and come back to what was saved, to the bit."""
    ddp = training_checks.wrapped(training_checks.CASES["mlp"], comm)
    optimizer = training_checks.sgd(ddp)
    checkpoints = Checkpoints(directory, comm, resume=True)
    for step in range(10**9):
        for _ in range(3):
            training_checks.train(ddp, optimizer, step % 100)
        saved = [parameter.detach().clone() for parameter in ddp.parameters()]
        checkpoints.save(State(step, {"model": "mlp"}, {"model": ddp.module.state_dict()}, {"rank": comm.rank}))
        training_checks.train(ddp, optimizer, step % 100)
        state = checkpoints.load({"model": "mlp"})
        assert state is not None
        assert (state.step, state.local) == (step, {"rank": comm.rank})
        ddp.module.load_state_dict(state.shared["model"])
        assert all(torch.equal(one, other) for one, other in zip(ddp.parameters(), saved, strict=True))
        training_checks.assert_replicas_identical(ddp)
        yield


def soak(comm: Communicator, seconds: float, directory: Path) -> None:
    """Do all of it for so long, and say what the process has at the begin and at the end."""
    draw = random.Random(2026)
    steps = training(comm, directory)
    count = rounds = 0
    for phase, length_s in (("begins", WARM_UP_S), ("ends", seconds)):
        started = time.monotonic()
        told_at = started
        while comm.broadcast_object(time.monotonic() - started, 0) < length_s:
            count += stress_ranks.run(comm, draw.randrange(2**30), SLICE_S, -1)
            objects(comm, draw)
            next(steps)
            rounds += 1
            if time.monotonic() > told_at + TELL_S:
                told_at = time.monotonic()
                say(f"has {held()} after {count} operations")
        say(f"{phase} with {held()} after {count} operations and {rounds} checkpoints")
    steps.close()


def main(kind: str, seconds: str, directory: str) -> None:
    with MAKE[kind]() as comm:
        soak(comm, float(seconds), Path(directory))
    say("left")


if __name__ == "__main__":
    torch.set_num_threads(1)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a rank that fails does not end the others before they see it
    try:
        main(*sys.argv[1:])
    except Exception:
        say(traceback.format_exc())
        sys.exit(1)
