"""One rank of a world that does random things on shared memory for a while: ``python -m tests.stress_ranks 1 10 -1``.

The arguments are a seed, seconds, and which rank is killed after about half of them, -1 for none. All ranks draw the
same program, each is late at times of its own, and every result has a closed form.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from backends.shm.communicator import ShmCommunicator
from minidist.communicator import Communicator, ReduceOp
from minidist.contract.checks import DTYPES
from minidist.errors import PeerLostError
from tests import inputs
from tests.inputs import combinable, operand, reduced, tensor
from tests.shm_ranks import footprint

ROUND = 50
"""Operations between two looks at the clock, which have to be of all ranks together."""
LEFT_OVER = 20, 8, 2**29
"""Files, heaps and bytes that the last operations may leave for a while; a leak is one for each of hundreds."""


@dataclass(frozen=True)
class Operation:
    """What all ranks do next.

    Attributes:
        in_heap: whether its tensors come from `empty`.
        shift: elements that they begin after the memory does, so that it is not aligned.
    """

    kind: str
    dtype: torch.dtype
    numel: int
    root: int
    op: ReduceOp
    in_heap: bool
    shift: int
    is_async: bool
    salt: int

    def new(self, comm: Communicator, values: Tensor) -> Tensor:
        """Return a copy of ``values`` where this operation wants it."""
        size = values.numel() + self.shift
        memory = comm.empty(size, self.dtype) if self.in_heap else torch.empty(size, dtype=self.dtype)
        return memory[self.shift :].copy_(values)


def drawn(draw: random.Random, world_size: int) -> Operation:
    """Draw an operation."""
    dtype = draw.choice(DTYPES)
    return Operation(
        draw.choice([*OPERATIONS, "all_reduce", "all_reduce"]),
        dtype,
        int(2 ** draw.uniform(0, 17)),
        draw.randrange(world_size),
        draw.choice(combinable(dtype)),
        draw.random() < 0.5,
        int(draw.random() < 0.2),
        draw.random() < 0.3,
        draw.randrange(5),
    )


def all_reduce(comm: Communicator, one: Operation) -> tuple[Tensor, Tensor]:
    """Run it, as all functions here; return what came of it, and what should."""
    n = comm.world_size
    result = one.new(comm, operand(comm.rank, one.numel, one.dtype, one.op, n))
    comm.all_reduce(result, one.op, one.is_async).wait()
    return result, reduced(n, one.numel, one.dtype, one.op)


def reduce(comm: Communicator, one: Operation) -> tuple[Tensor, Tensor]:
    n = comm.world_size
    mine = operand(comm.rank, one.numel, one.dtype, one.op, n)
    result = one.new(comm, mine)
    comm.reduce(result, one.root, one.op, one.is_async).wait()
    return result, reduced(n, one.numel, one.dtype, one.op) if comm.rank == one.root else mine


def reduce_scatter(comm: Communicator, one: Operation) -> tuple[Tensor, Tensor]:
    n = comm.world_size
    result = one.new(comm, _of(one, 9))
    many = one.new(comm, operand(comm.rank, n * one.numel, one.dtype, one.op, n))
    comm.reduce_scatter(result, many, one.op, one.is_async).wait()
    return result, reduced(n, n * one.numel, one.dtype, one.op).view(n, -1)[comm.rank]


def broadcast(comm: Communicator, one: Operation) -> tuple[Tensor, Tensor]:
    result = one.new(comm, _of(one, comm.rank))
    comm.broadcast(result, one.root, one.is_async).wait()
    return result, _of(one, one.root)


def all_gather(comm: Communicator, one: Operation) -> tuple[Tensor, Tensor]:
    n = comm.world_size
    result = one.new(comm, _of(one, 9, n))
    comm.all_gather(result, one.new(comm, _of(one, comm.rank)), one.is_async).wait()
    return result, torch.cat([_of(one, rank) for rank in range(n)])


def gather(comm: Communicator, one: Operation) -> tuple[Tensor, Tensor]:
    n = comm.world_size
    before = _of(one, 9, n)
    result = one.new(comm, before)
    is_root = comm.rank == one.root
    comm.gather(result if is_root else None, one.new(comm, _of(one, comm.rank)), one.root, one.is_async).wait()
    return result, torch.cat([_of(one, rank) for rank in range(n)]) if is_root else before


def scatter(comm: Communicator, one: Operation) -> tuple[Tensor, Tensor]:
    n = comm.world_size
    many = one.new(comm, _of(one, one.root, n)) if comm.rank == one.root else None
    result = one.new(comm, _of(one, 9))
    comm.scatter(result, many, one.root, one.is_async).wait()
    return result, _of(one, one.root, n).view(n, -1)[comm.rank]


def all_to_all(comm: Communicator, one: Operation) -> tuple[Tensor, Tensor]:
    n = comm.world_size
    result = one.new(comm, _of(one, 9, n))
    comm.all_to_all(result, one.new(comm, _of(one, comm.rank, n)), one.is_async).wait()
    return result, torch.cat([_of(one, rank, n).view(n, -1)[comm.rank] for rank in range(n)])


def message(comm: Communicator, one: Operation) -> tuple[Tensor, Tensor]:
    """Send to the next rank, and meet before the message is waited for, or not."""
    n = comm.world_size
    source = (comm.rank - 1) % n
    result = one.new(comm, _of(one, 9))
    sent = comm.isend(one.new(comm, _of(one, comm.rank)), (comm.rank + 1) % n, one.salt)
    received = comm.irecv(result, source, one.salt)
    if one.is_async:
        comm.barrier()
    received.wait()
    sent.wait()
    return result, _of(one, source)


def group(comm: Communicator, one: Operation) -> tuple[Tensor, Tensor]:
    """Make a communicator of every second rank, use it, and close it."""
    part = comm.split(comm.rank % 2)
    assert part is not None
    with part:
        result = one.new(comm, _of(one, comm.rank))
        part.broadcast(result, 0)
    return result, _of(one, comm.rank % 2)


OPERATIONS: dict[str, Callable[[Communicator, Operation], tuple[Tensor, Tensor]]] = {
    function.__name__: function
    for function in (
        *(all_reduce, reduce, reduce_scatter, broadcast, all_gather),
        *(gather, scatter, all_to_all, message, group),
    )
}


def _of(one: Operation, rank: int, num_blocks: int = 1) -> Tensor:
    return tensor(rank, num_blocks * one.numel, one.dtype, one.salt)


def run(comm: Communicator, seed: int, seconds: float, victim: int) -> int:
    """Do random things; return how many."""
    draw = random.Random(seed)
    own = random.Random(f"{seed} {comm.rank}")
    started = time.monotonic()
    count = 0
    while comm.broadcast_object(time.monotonic() - started, 0) < seconds:
        for _ in range(ROUND):
            one = drawn(draw, comm.world_size)
            if own.random() < 0.05:
                time.sleep(own.random() * 0.01)
            if victim == comm.rank and time.monotonic() - started > seconds / 2 and own.random() < 0.1:
                os.kill(os.getpid(), signal.SIGKILL)
            result, expected = OPERATIONS[one.kind](comm, one)
            assert torch.equal(result, expected), f"operation {count} of seed {seed}: {one}"
            count += 1
        inputs.forget()
    return count


def main() -> None:
    seed, seconds, victim = int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun asks the others to end when one has died
    comm = ShmCommunicator(timeout_s=60, kernels="compiled")
    run(comm, seed, 1.0, -1)  # what is made once, such as threads
    before = footprint()
    try:
        count = run(comm, seed + 1, seconds, victim)
    except PeerLostError as error:
        print(f"lost {error.peers}", flush=True)
        return
    after = footprint()
    for what, most, was, now in zip(("files", "heaps", "bytes"), LEFT_OVER, before, after, strict=True):
        assert now <= was + most, f"{what}: {was} before, {now} after {count} operations"
    comm.close()
    print(f"did {count}", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
