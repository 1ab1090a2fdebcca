"""What every communicator must do: operations in order, messages, groups. See conformance.py."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

import torch
from torch import Tensor

from minidist.communicator import Communicator, ReduceOp, Work
from minidist.contract import checks
from tests.inputs import assert_same, needs, operand, reduced, tensor

# Async ----------------------------------------------------------------------------------------


def check_async_operations_waited_for_backwards(comm: Communicator) -> None:
    n = comm.world_size
    cases = [(dtype, numel) for numel in (1000, 1, 70000, n) for dtype in (torch.float32, torch.int64)]
    tensors = [operand(comm.rank, numel, dtype, ReduceOp.SUM, n) for dtype, numel in cases]
    works = [comm.all_reduce(data, async_op=True) for data in tensors]
    for (dtype, numel), data, work in reversed(list(zip(cases, tensors, works, strict=True))):
        work.wait()
        assert work.is_done()
        assert work.exception() is None
        work.wait()
        assert_same(data, reduced(n, numel, dtype, ReduceOp.SUM), "async all_reduce", dtype, numel)


def check_async_operations_finish_in_order(comm: Communicator) -> None:
    works = [comm.all_reduce(torch.ones(50000), async_op=True), comm.all_reduce(torch.ones(1), async_op=True)]
    works.append(comm.barrier(async_op=True))
    works[-1].wait()
    assert all(work.is_done() for work in works)


def check_async_mixed_with_sync(comm: Communicator) -> None:
    n = comm.world_size
    first, second, third = (tensor(comm.rank, 3000, salt=salt) for salt in range(3))
    pending = comm.all_reduce(first, async_op=True)
    comm.broadcast(second, n - 1)
    assert_same(second, tensor(n - 1, 3000, salt=1), "broadcast after async all_reduce")
    gathered = torch.zeros(n * 3000)
    also_pending = comm.all_gather(gathered, third, async_op=True)
    comm.barrier()
    pending.wait()
    also_pending.wait()
    assert_same(first, reduced(n, 3000, torch.float32, ReduceOp.SUM), "async all_reduce")
    assert_same(gathered, torch.cat([tensor(r, 3000, salt=2) for r in range(n)]), "async all_gather")


def check_async_keeps_its_tensors(comm: Communicator) -> None:
    work = comm.all_reduce(torch.ones(100000), async_op=True)
    noise = [torch.full((100000,), -1.0) for _ in range(5)]  # takes the memory if it was freed
    work.wait()
    assert all((block == -1).all() for block in noise)


# Messages -------------------------------------------------------------------------------------


@needs(ranks=2)
def check_send_recv_around(comm: Communicator) -> None:
    prev_rank, next_rank = (comm.rank - 1) % comm.world_size, (comm.rank + 1) % comm.world_size
    for dtype in checks.DTYPES:
        data = torch.zeros(100, dtype=dtype)
        receive = comm.irecv(data.conj(), prev_rank)  # which is the tensor itself where it is real
        comm.send(tensor(comm.rank, 100, dtype).conj(), next_rank)
        receive.wait()
        assert receive.is_done()
        assert_same(data, tensor(prev_rank, 100, dtype), "recv", dtype)


@needs(ranks=2)
def check_send_recv_layouts(comm: Communicator) -> None:
    prev_rank, next_rank = (comm.rank - 1) % comm.world_size, (comm.rank + 1) % comm.world_size
    memory = torch.zeros(30, 20)
    receive = comm.irecv(memory.t()[::2], prev_rank)
    comm.send(tensor(comm.rank, 600).view(10, 60)[:, ::2], next_rank)
    receive.wait()
    assert_same(memory.t()[::2], tensor(prev_rank, 600).view(10, 60)[:, ::2], "recv into a strided, transposed view")
    assert not memory.t()[1::2].any()


@needs(ranks=2)
def check_messages_keep_their_order(comm: Communicator) -> None:
    prev_rank, next_rank = (comm.rank - 1) % comm.world_size, (comm.rank + 1) % comm.world_size
    received = [torch.zeros(1 + i) for i in range(20)]
    works = [comm.irecv(data, prev_rank) for data in received]
    works += [comm.isend(tensor(comm.rank, 1 + i, salt=i), next_rank) for i in range(20)]
    for work in works:
        work.wait()
    for i, data in enumerate(received):
        assert_same(data, tensor(prev_rank, 1 + i, salt=i), "message", i)


@needs(ranks=2)
def check_messages_are_told_apart_by_tag(comm: Communicator) -> None:
    prev_rank, next_rank = (comm.rank - 1) % comm.world_size, (comm.rank + 1) % comm.world_size
    tags = (0, 5, comm.max_tag)
    sends = [comm.isend(tensor(comm.rank, 10, salt=tag), next_rank, tag) for tag in tags]
    for tag in reversed(tags):
        data = torch.zeros(10)
        comm.recv(data, prev_rank, tag)
        assert_same(data, tensor(prev_rank, 10, salt=tag), "tag", tag)
    for send in sends:
        send.wait()


@needs(ranks=2)
def check_messages_large_in_both_directions(comm: Communicator) -> None:
    numel, others = 2**20, [rank for rank in range(comm.world_size) if rank != comm.rank]
    received = {rank: torch.zeros(numel) for rank in others}
    sends = [comm.isend(tensor(comm.rank, numel), rank) for rank in others]
    for work in [*(comm.irecv(received[rank], rank) for rank in others), *sends]:
        work.wait()
    for rank in others:
        assert_same(received[rank], tensor(rank, numel), "4 MB from", rank)


@needs(ranks=2)
def check_messages_beside_collectives(comm: Communicator) -> None:
    n = comm.world_size
    prev_rank, next_rank = (comm.rank - 1) % n, (comm.rank + 1) % n
    data, total = torch.zeros(100), operand(comm.rank, 100, torch.float32, ReduceOp.SUM, n)
    receive = comm.irecv(data, prev_rank)
    comm.all_reduce(total)
    comm.send(tensor(comm.rank, 100), next_rank)
    receive.wait()
    assert_same(data, tensor(prev_rank, 100), "recv posted before an all_reduce")
    assert_same(total, reduced(n, 100, torch.float32, ReduceOp.SUM), "all_reduce beside a pending irecv")


@needs(ranks=2)
def check_messages_of_all_sizes_that_are_polled(comm: Communicator) -> None:
    """Whoever asks is_done() often enough, and never waits, sees every message end."""
    prev_rank, next_rank = (comm.rank - 1) % comm.world_size, (comm.rank + 1) % comm.world_size
    numels = (0, 1, 512, 513, 70_001)
    received = [torch.zeros(numel) for numel in numels]
    works = [comm.irecv(data, prev_rank) for data in received]
    works += [comm.isend(tensor(comm.rank, numel), next_rank) for numel in numels]
    until = time.monotonic() + 20
    while not all(work.is_done() for work in works):
        assert time.monotonic() < until, f"is_done() of each: {[work.is_done() for work in works]}"
    for work in works:
        assert work.exception() is None
        work.wait()
    for numel, data in zip(numels, received, strict=True):
        assert_same(data, tensor(prev_rank, numel), "polled message of", numel)


@needs(fresh=True, ranks=2)
def check_a_receive_posted_before_a_collective_takes_its_message(comm: Communicator, meet: Callable[[], None]) -> None:
    """A send that waits for its receive does not need a receiver that looks."""
    data = torch.zeros(70_001)
    receive = comm.irecv(data, 0) if comm.rank == 1 else None
    if comm.rank == 0:
        comm.send(tensor(0, 70_001), 1, timeout_s=20)
    comm.barrier(timeout_s=20)
    if receive is not None:
        receive.wait()
        assert_same(data, tensor(0, 70_001), "received during a barrier")


@needs(ranks=2)
def check_messages_are_counted(comm: Communicator) -> None:
    prev_rank, next_rank = (comm.rank - 1) % comm.world_size, (comm.rank + 1) % comm.world_size
    messages, nbytes, seconds = comm.traffic.messages, comm.traffic.bytes, comm.traffic.seconds
    works = [comm.irecv(torch.zeros(10), prev_rank), comm.isend(torch.zeros(10), next_rank)]
    for work in [*works, comm.isend(torch.zeros(0), next_rank), comm.irecv(torch.zeros(0), prev_rank)]:
        work.wait()
    assert (comm.traffic.messages - messages, comm.traffic.bytes - nbytes) == (1, 40)
    assert comm.traffic.seconds > seconds
    comm.all_reduce(torch.zeros(100))
    assert comm.traffic.messages > messages + 1
    assert comm.traffic.bytes >= nbytes + 40 + 400 // comm.world_size


# Groups ---------------------------------------------------------------------------------------


@needs(fresh=True)
def check_split_ranks_and_colors(comm: Communicator, meet: Callable[[], None]) -> None:
    n = comm.world_size
    backwards = comm.split(7, key=-comm.rank)
    assert (backwards.rank, backwards.world_size) == (n - 1 - comm.rank, n)
    assert backwards.all_gather_object(comm.rank) == list(reversed(range(n)))
    halves = comm.split(comm.rank % 2)
    assert halves.all_gather_object(comm.rank) == list(range(comm.rank % 2, n, 2))
    nobody = comm.split(None)
    assert nobody is None
    rest = comm.split(None if comm.rank == 0 else 1)
    assert (rest is None) == (comm.rank == 0)
    if rest is not None:
        assert rest.all_gather_object(comm.rank) == list(range(1, n))
    comm.barrier()


@needs(fresh=True)
def check_split_is_independent(comm: Communicator, meet: Callable[[], None]) -> None:
    n, other = comm.world_size, comm.split(0)
    tensors = [tensor(comm.rank, 2000) for _ in range(6)]
    works = [(comm, other)[i % 2].all_reduce(data, async_op=True) for i, data in enumerate(tensors)]
    for data, work in reversed(list(zip(tensors, works, strict=True))):
        work.wait()
        assert_same(data, reduced(n, 2000, torch.float32, ReduceOp.SUM), "two communicators interleaved")
    # Each rank uses the two in another order: nothing of one may wait for, or meet, the other.
    mine, theirs = tensor(comm.rank, 10), tensor(comm.rank, 10, salt=1)
    jobs: list[Callable[[], Work]] = [
        lambda: comm.broadcast(mine, 0, async_op=True),
        lambda: other.broadcast(theirs, 0, async_op=True),
    ]
    for work in [job() for job in (jobs if comm.rank % 2 else reversed(jobs))]:
        work.wait()
    assert_same(mine, tensor(0, 10), "broadcast on the parent")
    assert_same(theirs, tensor(0, 10, salt=1), "broadcast on the child")


@needs(fresh=True, ranks=2)
def check_a_large_message_moves_while_a_split_is_waited_for(comm: Communicator, meet: Callable[[], None]) -> None:
    group = comm.split(0)
    assert group is not None
    sent = tensor(0, 300_000)
    with group:
        if comm.rank == 0:
            work = comm.isend(sent, 1)
            group.barrier(timeout_s=20)
            work.wait()
        else:
            if comm.rank == 1:
                target = torch.zeros_like(sent)
                comm.recv(target, 0, timeout_s=20)
                assert torch.equal(target, sent)
            group.barrier(timeout_s=20)


@needs(fresh=True)
def check_split_nested_and_closed(comm: Communicator, meet: Callable[[], None]) -> None:
    before = comm.traffic.with_splits().bytes, comm.traffic.bytes
    child = comm.split(0)
    grandchild = child.split(0, key=-child.rank)
    assert grandchild.broadcast_object(comm.rank, 0) == comm.world_size - 1
    grandchild.close()
    grandchild.close()
    assert child.broadcast_object(comm.rank, 0) == 0
    child.close()
    assert comm.all_gather_object(comm.rank) == list(range(comm.world_size))
    sent = comm.traffic.bytes - before[1] + child.traffic.bytes + grandchild.traffic.bytes
    assert comm.traffic.with_splits().bytes - before[0] == sent


# Everything at once ---------------------------------------------------------------------------


@needs(once=True)
def check_random_program(comm: Communicator) -> None:
    """Two hundred operations, drawn alike on all ranks, some outstanding and waited for out of order."""
    draw, pending = random.Random(2026), []
    for _ in range(200):
        pending.append(_random_operation(comm, draw))
        while pending and draw.random() < 0.6:
            pending.pop(draw.randrange(len(pending)))()
    for finish in pending:
        finish()


def check_random_delays(comm: Communicator) -> None:
    """The same with ranks that come late, each at other times."""
    draw, own = random.Random(7), random.Random(comm.rank)
    for _ in range(20):
        time.sleep(own.random() * 0.01)
        _random_operation(comm, draw)()


def _random_operation(comm: Communicator, draw: random.Random) -> Callable[[], None]:
    """Start an operation; return what waits for it and compares."""
    n, rank = comm.world_size, comm.rank
    numel, root, salt, async_op = (
        draw.choice((0, 1, 13, 1000)),
        draw.randrange(n),
        draw.randrange(7),
        draw.random() < 0.5,
    )
    dtype = draw.choice((torch.float32, torch.bfloat16, torch.int64))
    kind = draw.choice(("all_reduce", "broadcast", "all_gather", "all_to_all", "reduce_scatter"))
    data, many, one = tensor(rank, numel, dtype, salt), tensor(rank, n * numel, dtype), torch.zeros(numel, dtype=dtype)
    output = torch.zeros(n * numel, dtype=dtype)
    result: Tensor
    if kind == "all_reduce":
        work, result = comm.all_reduce(data, ReduceOp.MAX, async_op), data
        expected = torch.stack([tensor(r, numel, dtype, salt) for r in range(n)]).amax(0)
    elif kind == "broadcast":
        work, result, expected = comm.broadcast(data, root, async_op), data, tensor(root, numel, dtype, salt)
    elif kind == "all_gather":
        work, result = comm.all_gather(output, data, async_op), output
        expected = torch.cat([tensor(r, numel, dtype, salt) for r in range(n)])
    elif kind == "all_to_all":
        work, result = comm.all_to_all(output, many, async_op), output
        expected = torch.cat([tensor(r, n * numel, dtype).view(n, -1)[rank] for r in range(n)])
    else:
        work, result = comm.reduce_scatter(one, many, ReduceOp.SUM, async_op), one
        expected = torch.stack([tensor(r, n * numel, dtype) for r in range(n)]).sum(0).to(dtype).view(n, -1)[rank]

    def finish() -> None:
        work.wait()
        assert_same(result, expected, kind, dtype, numel, "root", root)

    return finish
