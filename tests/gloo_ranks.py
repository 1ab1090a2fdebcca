"""One rank of a world in which test_gloo.py lets ranks disagree: ``python -m tests.gloo_ranks ring``."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import torch

from backends.torch_dist.gloo import GlooCommunicator
from minidist.communicator import Communicator, ReduceOp
from minidist.errors import CommError, MismatchError
from tests.zoo import make

Call = Callable[[Communicator], object]


def others(numel: int) -> list[tuple[str, Call, Call]]:
    """Return what rank 0 and what the other ranks call, by name."""
    a, b = numel, 2 * numel

    def gather(comm: Communicator, size: int, root: int) -> None:
        output = torch.zeros(comm.world_size * size) if comm.rank == root else None
        comm.gather(output, torch.ones(size), root)

    def scatter(comm: Communicator, size: int, root: int) -> None:
        comm.scatter(torch.ones(size), torch.zeros(comm.world_size * size) if comm.rank == root else None, root)

    def blocks(comm: Communicator, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.ones(comm.world_size * size), torch.ones(size)

    return [
        ("sizes", lambda c: c.all_reduce(torch.ones(a)), lambda c: c.all_reduce(torch.ones(b))),
        ("sizes, the other way", lambda c: c.all_reduce(torch.ones(b)), lambda c: c.all_reduce(torch.ones(a))),
        ("dtypes", lambda c: c.all_reduce(torch.ones(a)), lambda c: c.all_reduce(torch.ones(a).double())),
        ("dtypes of one size", lambda c: c.all_reduce(torch.ones(a)), lambda c: c.all_reduce(torch.ones(a).int())),
        ("ops", lambda c: c.all_reduce(torch.ones(a)), lambda c: c.all_reduce(torch.ones(a), ReduceOp.MAX)),
        ("kinds", lambda c: c.all_reduce(torch.ones(a)), lambda c: c.broadcast(torch.ones(b), 0)),
        ("nothing but a barrier", lambda c: c.barrier(), lambda c: c.all_gather(*blocks(c, a))),
        ("objects", lambda c: c.all_gather_object("x" * a), lambda c: c.broadcast_object("x" * a, 0)),
        ("reduce", lambda c: c.reduce(torch.ones(a), 0), lambda c: c.reduce(torch.ones(b), 0)),
        ("reduce, roots", lambda c: c.reduce(torch.ones(a), 0), lambda c: c.reduce(torch.ones(a), 1)),
        ("broadcast", lambda c: c.broadcast(torch.ones(a), 0), lambda c: c.broadcast(torch.ones(b), 0)),
        ("broadcast, roots", lambda c: c.broadcast(torch.ones(a), 0), lambda c: c.broadcast(torch.ones(a), 1)),
        ("all_gather", lambda c: c.all_gather(*blocks(c, a)), lambda c: c.all_gather(*blocks(c, b))),
        ("gather", lambda c: gather(c, a, 0), lambda c: gather(c, b, 0)),
        ("gather, roots", lambda c: gather(c, a, 0), lambda c: gather(c, a, 1)),
        ("scatter", lambda c: scatter(c, b, 0), lambda c: scatter(c, a, 0)),
        ("scatter, roots", lambda c: scatter(c, a, 0), lambda c: scatter(c, a, 1)),
        (
            "reduce_scatter",
            lambda c: c.reduce_scatter(*reversed(blocks(c, a))),
            lambda c: c.reduce_scatter(*reversed(blocks(c, b))),
        ),
        (
            "all_to_all",
            lambda c: c.all_to_all(blocks(c, a)[0], blocks(c, a)[0]),
            lambda c: c.all_to_all(blocks(c, b)[0], blocks(c, b)[0]),
        ),
        (
            "behind an operation that is right",
            lambda c: (c.all_reduce(torch.ones(b), async_op=True), c.all_reduce(torch.ones(a))),
            lambda c: (c.all_reduce(torch.ones(b), async_op=True), c.all_reduce(torch.ones(b))),
        ),
    ]


def say(line: str) -> None:
    """Write a line in one piece, as the ranks write into one file."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def attempt(comm: Communicator, call: Call) -> str:
    """Return what became of a call."""
    try:
        call(comm)
    except MismatchError as error:
        return "named" if f"rank {comm.rank} calls" in str(error) and str(error).count(" calls ") >= 2 else str(error)
    except CommError as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def disagree(kind: str) -> None:
    """Let rank 0 call something else than the others; the last rank agrees with rank 0 where there are more than 2."""
    for numel in (10, 100_000):
        for name, first, second in others(numel):
            comm = GlooCommunicator(timeout_s=20) if kind == "gloo" else make(f"{kind}/gloo")
            usual = comm.rank == 0 or (comm.rank > 1 and comm.rank == comm.world_size - 1)
            say(f"{numel} {name}, rank {comm.rank}: {attempt(comm, first if usual else second)}")
            comm.close()


def send_others(kind: str) -> None:
    """Send messages that their receives do not expect, in both directions at once."""
    with GlooCommunicator(timeout_s=20) as whole:
        for sent, expected in ((10, 20), (20, 10), (100_000, 7), (7, 100_000), (100_001, 100_000), (0, 5), (5, 0)):
            comm = GlooCommunicator(timeout_s=20) if kind == "gloo" else make(f"{kind}/gloo")
            peer = 1 - comm.rank
            works = [comm.irecv(torch.zeros(expected), peer), comm.isend(torch.ones(sent), peer)]
            try:
                works[0].wait()
                say("no error")
            except MismatchError:
                say("named")
            whole.barrier()  # what a rank has that leaves can be lost
            comm.abort("the message was wrong")


def leave_at_once(kind: str) -> None:
    """Make a communicator and leave it, again and again: a rank may still be making its connections to this one."""
    for _ in range(150):
        GlooCommunicator(timeout_s=60).abort("not needed")
    say("left and named")


def give_up(kind: str) -> None:
    """Give up a collective that nobody else comes to, as if it hung in Gloo."""
    comm = GlooCommunicator(timeout_s=60)
    comm.barrier()
    if comm.rank == 0:
        work = comm.all_reduce(torch.ones(3), async_op=True)  # given up
        while comm.recorder.waits_in is None:
            time.sleep(1e-3)
        comm._give_up()
        for each in (work.wait, comm.barrier):
            try:
                each()
            except CommError as error:
                say(f"{type(error).__name__}: {error}")
        comm._store.set("given up", "")
    else:
        comm._store.wait(["given up"])
    comm.abort("the test is over")


WHATS = {one.__name__: one for one in (disagree, send_others, leave_at_once, give_up)}

if __name__ == "__main__":
    WHATS[sys.argv[1]](sys.argv[2])
