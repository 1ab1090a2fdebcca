"""Every schedule is proved at every world size, and every kind of mistake is found and said."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from backends import schedules
from backends.ring import ring_all_gather, ring_all_reduce, ring_reduce_scatter
from minidist.errors import ScheduleError
from minidist.prove import MAX_WORLD_SIZE, prove
from minidist.schedule import Recv, Reduce, Schedule, Send, Step

RIGHT = {
    "ring_all_reduce": (ring_all_reduce, "all_reduce"),
    "ring_reduce_scatter": (ring_reduce_scatter, "reduce_scatter"),
    "ring_all_gather": (ring_all_gather, "all_gather"),
    "direct_all_reduce": (schedules.direct_all_reduce, "all_reduce"),
    "direct_reduce_scatter": (schedules.direct_reduce_scatter, "reduce_scatter"),
    "direct_all_gather": (schedules.direct_all_gather, "all_gather"),
    "direct_all_to_all": (schedules.direct_all_to_all, "all_to_all"),
    "dissemination_barrier": (schedules.dissemination_barrier, "barrier"),
}
ROOTED = {
    "direct_gather": (schedules.direct_gather, "gather"),
    "direct_scatter": (schedules.direct_scatter, "scatter"),
    "binomial_broadcast": (schedules.binomial_broadcast, "broadcast"),
    "binomial_reduce": (schedules.binomial_reduce, "reduce"),
}
SIZES = [*range(1, 34), pytest.param(64, marks=pytest.mark.slow), pytest.param(100, marks=pytest.mark.slow)]


@pytest.mark.parametrize("world_size", SIZES)
@pytest.mark.parametrize("name", RIGHT)
def test_schedules_are_right(name: str, world_size: int) -> None:
    prove(*RIGHT[name], world_size)


@pytest.mark.parametrize("world_size", SIZES)
@pytest.mark.parametrize("name", ROOTED)
def test_rooted_schedules_are_right_from_every_root(name: str, world_size: int) -> None:
    for root in range(world_size) if world_size < 10 else (0, world_size // 2, world_size - 1):
        prove(*ROOTED[name], world_size, root)


def test_counts_are_those_of_theory() -> None:
    for n in (1, 2, 3, 5, 8):
        assert prove(ring_all_reduce, "all_reduce", n).steps == (2 * (n - 1),) * n
        assert prove(ring_all_reduce, "all_reduce", n).messages == (2 * (n - 1),) * n
    assert prove(schedules.binomial_broadcast, "broadcast", 8, 3).messages == (0, 0, 0, 3, 2, 1, 1, 0)


# Wrong ones, on 4 ranks ---------------------------------------------------------------------------


def neighbours(rank: int, world_size: int) -> tuple[int, int]:
    return (rank - 1) % world_size, (rank + 1) % world_size


def off_by_one_chunk(rank: int, n: int) -> Iterator[Step]:
    prev_rank, next_rank = neighbours(rank, n)
    for step in range(n - 1):
        yield Send(next_rank, (rank - step) % n), Recv(prev_rank, (rank - step) % n)


def swapped_directions(rank: int, n: int) -> Iterator[Step]:
    _, next_rank = neighbours(rank, n)
    yield Send(next_rank, (rank - 1) % n), Reduce(next_rank, (rank - 2) % n)


def missing_last_step(rank: int, n: int) -> Iterator[Step]:
    steps = list(ring_all_reduce(rank, n))
    yield from steps[:-1]


def missing_last_step_of_rank_2(rank: int, n: int) -> Iterator[Step]:
    steps = list(ring_all_reduce(rank, n))
    yield from steps[:-1] if rank == 2 else steps


def double_reduction(rank: int, n: int) -> Iterator[Step]:
    yield from ring_all_reduce(rank, n)
    yield from ring_reduce_scatter(rank, n)
    yield from ring_all_gather(rank, n)


def everything_twice(rank: int, n: int) -> Iterator[Step]:
    peers = [peer for peer in range(n) if peer != rank]
    for _ in range(2):
        yield *(Send(peer, peer) for peer in peers), *(Reduce(peer, rank) for peer in peers)


def blocking_sends_in_a_cycle(rank: int, n: int) -> Iterator[Step]:
    prev_rank, next_rank = neighbours(rank, n)
    yield (Send(next_rank, rank),)
    yield (Recv(prev_rank, prev_rank),)


def receive_before_send(rank: int, n: int) -> Iterator[Step]:
    yield (Recv(rank ^ 1, rank ^ 1),)
    yield (Send(rank ^ 1, rank),)


def send_without_receive(rank: int, n: int) -> Iterator[Step]:
    if rank == 0:
        yield (Send(1, 0),)


def receive_without_send(rank: int, n: int) -> Iterator[Step]:
    if rank == 3:
        yield (Recv(1, 0),)


def overwritten_before_it_was_sent(rank: int, n: int) -> Iterator[Step]:
    for send, reduce in ring_reduce_scatter(rank, n):
        yield send, Recv(reduce.peer, reduce.chunk)


def overwritten_while_it_is_sent(rank: int, n: int) -> Iterator[Step]:
    prev_rank, next_rank = neighbours(rank, n)
    yield Send(next_rank, 0), Recv(prev_rank, 0)


def two_receives_into_one_chunk(rank: int, n: int) -> Iterator[Step]:
    if rank == 0:
        yield Recv(1, 1), Recv(2, 1)


def receive_and_reduce_in_one_step(rank: int, n: int) -> Iterator[Step]:
    if rank == 0:
        yield Reduce(1, 1), Recv(2, 1)


def sends_what_it_has_not(rank: int, n: int) -> Iterator[Step]:
    prev_rank, next_rank = neighbours(rank, n)
    yield Send(next_rank, next_rank), Recv(prev_rank, rank)


def reduces_into_nothing(rank: int, n: int) -> Iterator[Step]:
    prev_rank, next_rank = neighbours(rank, n)
    yield Send(next_rank, rank), Reduce(prev_rank, prev_rank)


def rank_out_of_range(rank: int, n: int) -> Iterator[Step]:
    yield (Send(rank + 1, rank),)


def sends_to_itself(rank: int, n: int) -> Iterator[Step]:
    yield Send(rank, 0), Recv(rank, 1)


def chunk_out_of_range(rank: int, n: int) -> Iterator[Step]:
    yield (Send((rank + 1) % n, n),)


def other_chunk_than_expected(rank: int, n: int) -> Iterator[Step]:
    if rank == 0:
        yield (Send(1, 2),)
    elif rank == 1:
        yield (Recv(0, 3),)


def never_ends(rank: int, n: int) -> Iterator[Step]:
    while True:
        yield ()


def own_block_only(rank: int, n: int) -> Iterator[Step]:
    return
    yield


def barrier_of_neighbours(rank: int, n: int) -> Iterator[Step]:
    prev_rank, next_rank = neighbours(rank, n)
    yield Send(next_rank, 0), Recv(prev_rank, 1)


WRONG: list[tuple[Schedule, str, str]] = [
    (
        off_by_one_chunk,
        "all_gather",
        "rank 0, step 0: it sends chunk 0 to rank 1 while it receives chunk 0 from rank 3",
    ),
    (
        swapped_directions,
        "reduce_scatter",
        "deadlock: rank 0 in step 0 (it sends chunk 3 to rank 1) waits for rank 1 in step 0 (it sends chunk 0 to rank "
        "2) waits for rank 2 in step 0 (it sends chunk 1 to rank 3) waits for rank 3 in step 0 (it sends chunk 2 to "
        "rank 0) waits for rank 0",
    ),
    (missing_last_step, "all_reduce", "rank 0, chunk 1: the contribution of rank 1 is missing"),
    (
        missing_last_step_of_rank_2,
        "all_reduce",
        "rank 1, step 5: it sends chunk 3 to rank 2, but rank 2 has finished and never does its part",
    ),
    (double_reduction, "all_reduce", "rank 0, chunk 0: the contribution of rank 0 is in it 4 times"),
    (everything_twice, "reduce_scatter", "rank 0, chunk 0: the contribution of rank 1 is in it 2 times"),
    (
        blocking_sends_in_a_cycle,
        "all_gather",
        "deadlock: rank 0 in step 0 (it sends chunk 0 to rank 1) waits for rank 1 in step 0 (it sends chunk 1 to rank "
        "2) waits for rank 2 in step 0 (it sends chunk 2 to rank 3) waits for rank 3 in step 0 (it sends chunk 3 to "
        "rank 0) waits for rank 0",
    ),
    (
        receive_before_send,
        "all_gather",
        "deadlock: rank 0 in step 0 (it receives chunk 1 from rank 1) waits for rank 1 in step 0 (it receives chunk 0 "
        "from rank 0) waits for rank 0",
    ),
    (
        send_without_receive,
        "all_reduce",
        "rank 0, step 0: it sends chunk 0 to rank 1, but rank 1 has finished and never does its part",
    ),
    (
        receive_without_send,
        "all_reduce",
        "rank 3, step 0: it receives chunk 0 from rank 1, but rank 1 has finished and never does its part",
    ),
    (
        overwritten_before_it_was_sent,
        "reduce_scatter",
        "rank 0, chunk 0: the contribution of rank 0 is missing; rank 0, step 2 overwrote it before it was sent",
    ),
    (
        overwritten_while_it_is_sent,
        "all_reduce",
        "rank 0, step 0: it sends chunk 0 to rank 1 while it receives chunk 0 from rank 3",
    ),
    (
        two_receives_into_one_chunk,
        "all_reduce",
        "rank 0, step 0: it receives chunk 1 from rank 2 and it receives chunk 1 from rank 1 in one step, in an order "
        "that nobody knows",
    ),
    (
        receive_and_reduce_in_one_step,
        "all_reduce",
        "rank 0, step 0: it receives chunk 1 from rank 2 and it reduces chunk 1 from rank 1 in one step, in an order "
        "that nobody knows",
    ),
    (sends_what_it_has_not, "all_gather", "rank 0, step 0: it sends chunk 1, in which there is nothing yet"),
    (reduces_into_nothing, "all_gather", "rank 3, step 0: it reduces into chunk 2, in which there is nothing yet"),
    (
        rank_out_of_range,
        "all_reduce",
        "rank 3, step 0: it sends chunk 3 to rank 4, but the other ranks are those of 0 to 3",
    ),
    (
        sends_to_itself,
        "all_reduce",
        "rank 0, step 0: it sends chunk 0 to rank 0, but the other ranks are those of 0 to 3",
    ),
    (chunk_out_of_range, "all_reduce", "rank 0, step 0: it sends chunk 4 to rank 1, but the chunks are 0 to 3"),
    (
        other_chunk_than_expected,
        "all_reduce",
        "rank 0, step 0: it sends chunk 2 to rank 1, where rank 1 in step 0 expects chunk 3; their sizes can differ",
    ),
    (never_ends, "all_reduce", "rank 0: it takes more than 100000 steps; does it end?"),
    (own_block_only, "all_gather", "rank 0, chunk 1: the contribution of rank 1 is missing"),
    (ring_reduce_scatter, "all_reduce", "rank 0, chunk 1: the contribution of rank 1 is missing"),
    (ring_all_reduce, "all_gather", "rank 0, step 0: it sends chunk 3, in which there is nothing yet"),
    (barrier_of_neighbours, "barrier", "rank 0: it leaves the barrier and rank 1 may not have come"),
]


@pytest.mark.parametrize(
    ("schedule", "collective", "sentence"), WRONG, ids=lambda value: getattr(value, "__name__", "")
)
def test_mistakes_are_found_and_said(schedule: Schedule, collective: str, sentence: str) -> None:
    with pytest.raises(ScheduleError) as caught:
        prove(schedule, collective, 4)
    assert str(caught.value) == sentence


@pytest.mark.parametrize(
    ("collective", "world_size", "root", "message"),
    [
        ("all_reduce", 0, 0, f"world_size must be 1 to {MAX_WORLD_SIZE} to be proved, got 0"),
        ("all_reduce", 1_000_000, 0, "got 1000000"),
        ("all_recuce", 2, 0, "collective must be one of all_reduce, .*, got 'all_recuce'"),
        ("broadcast", 2, 2, "root must be a rank from 0 to 1, got 2"),
    ],
)
def test_wrong_questions_are_refused(collective: str, world_size: int, root: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prove(ring_all_reduce, collective, world_size, root)
