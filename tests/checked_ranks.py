"""Ranks that call different things on a checked communicator: ``python -m tests.checked_ranks ring/gloo``."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from backends.checked import CheckedCommunicator
from minidist.communicator import Communicator, ReduceOp
from minidist.errors import CommError
from tests.table import made_by

Mistake = Callable[[Communicator], object]
TRANSPORTS = {
    "gloo": "backends.torch_dist.GlooCommunicator",
    "shm": "backends.shm.ShmCommunicator",
    "mpi": "backends.mpi.MpiCommunicator",
}


def shape(comm: Communicator) -> None:
    if comm.rank == 1:
        comm.all_reduce(torch.ones(2, 2))  # shape: rank 1
    else:
        comm.all_reduce(torch.ones(3))  # shape: others


def dtype(comm: Communicator) -> None:
    if comm.rank == 1:
        comm.all_reduce(torch.ones(3, dtype=torch.int32), async_op=True).wait()  # dtype: rank 1
    else:
        comm.all_reduce(torch.ones(3))  # dtype: others


def op(comm: Communicator) -> None:
    if comm.rank == 1:
        comm.all_reduce(torch.ones(3), ReduceOp.AVG)  # op: rank 1
    else:
        comm.all_reduce(torch.ones(3))  # op: others


def root(comm: Communicator) -> None:
    if comm.rank == 1:
        comm.broadcast(torch.ones(3), 1)  # root: rank 1
    else:
        comm.broadcast(torch.ones(3), 0)  # root: others


def collective(comm: Communicator) -> None:
    if comm.rank == 1:
        comm.barrier()  # collective: rank 1
    else:
        comm.all_reduce(torch.ones(3))  # collective: others


def order(comm: Communicator) -> None:
    """Both calls are of one shape."""
    reductions = [lambda: reduce_first(comm), lambda: reduce_second(comm)]
    for reduce in reversed(reductions) if comm.rank == 1 else reductions:
        reduce()


def reduce_first(comm: Communicator) -> None:
    comm.all_reduce(torch.ones(3))  # order: first


def reduce_second(comm: Communicator) -> None:
    comm.all_reduce(torch.zeros(3))  # order: second


MISTAKES: dict[str, Mistake] = {one.__name__: one for one in (shape, dtype, op, root, collective, order)}


def at(mark: str, file: str = __file__) -> str:
    """Return where a file, this one by default, has the line with a mark."""
    lines = Path(file).read_text().splitlines()
    (number,) = (number for number, line in enumerate(lines, 1) if line.endswith(f"# {mark}"))
    return f"{file}:{number}"


def told(transport: Communicator, every: int = 1) -> dict[str, str]:
    """Return what this rank is told of each mistake; each is made on a communicator of its own."""
    said = {}
    for name, mistake in MISTAKES.items():
        comm = CheckedCommunicator(transport, every)
        try:
            for _ in range(every):
                mistake(comm)
            said[name] = "nothing"
        except CommError as error:
            said[name] = f"{type(error).__name__} {error}"
        transport.barrier()
    return said


def main(spec: str) -> None:
    name, _, beneath = spec.rpartition("/")
    transport = made_by(TRANSPORTS[beneath])()
    if name:
        from tests.zoo import around

        transport = around(name, transport)
    with transport:
        sys.stdout.write(json.dumps(told(transport)) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
