"""Every schedule is proved at every world size, and every kind of mistake is found and said."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pytest

from backends.ring import ring_all_gather, ring_all_reduce, ring_reduce_scatter
from backends.schedules import double_tree
from backends.schedules.binomial import binomial_broadcast
from backends.schedules.swing import swing_all_reduce
from backends.two_level import two_level_all_reduce
from minidist.analysis.prove import MAX_WORLD_SIZE, Counts, prove
from minidist.collective import COLLECTIVES, Run
from minidist.errors import ScheduleError
from minidist.schedule import Recv, Reduce, Schedule, Send, Step, num_chunks
from tests.zoo import THEORY, Theory, two_level_theory

SIZES = [*range(1, 34), pytest.param(64, marks=pytest.mark.slow), pytest.param(100, marks=pytest.mark.slow)]


@pytest.mark.parametrize("world_size", SIZES)
@pytest.mark.parametrize("theory", THEORY, ids=lambda theory: theory.name)
def test_schedules_are_right_and_cost_what_the_theory_says(theory: Theory, world_size: int) -> None:
    roots = [0]
    if COLLECTIVES[theory.collective].is_rooted:
        roots = range(world_size) if world_size < 10 else [0, world_size // 2, world_size - 1]
    for root in roots:
        check_costs(theory, world_size, prove(theory.schedule, Run(theory.collective, world_size, root)))


@pytest.mark.parametrize(("num_hosts", "ranks_per_host"), [(1, 4), (4, 1), (2, 2), (2, 3), (3, 2), (4, 8), (5, 5)])
def test_two_levels(num_hosts: int, ranks_per_host: int) -> None:
    theory, world_size = two_level_theory(ranks_per_host), num_hosts * ranks_per_host
    check_costs(theory, world_size, prove(theory.schedule, Run("all_reduce", world_size)))


def test_two_levels_of_ranks_in_any_order_stay_inside_of_their_hosts() -> None:
    order = [0, 3, 5, 1, 2, 4]  # two hosts of three
    schedule = partial(two_level_all_reduce, ranks_per_host=3, order=order)
    check_costs(two_level_theory(3), 6, prove(schedule, Run("all_reduce", 6)))
    for rank in range(6):
        place = order.index(rank)
        mates = {order[place // 3 * 3 + other] for other in range(3)} | {order[(place + 3) % 6]}
        assert {move.peer for step in schedule(rank, 6) for move in step} <= mates


def check_costs(theory: Theory, world_size: int, counts: Counts) -> None:
    parts = (
        1
        if theory.collective == "barrier"
        else counts.num_chunks
        if COLLECTIVES[theory.collective].is_cut
        else world_size
    )
    assert max(counts.steps) == theory.steps(world_size)
    assert sum(counts.messages) == theory.messages(world_size)
    assert sum(counts.chunks) / parts == pytest.approx(theory.volume(world_size))


def test_counts_are_by_rank() -> None:
    assert prove(binomial_broadcast, Run("broadcast", 8, 3)).messages == (0, 0, 0, 3, 2, 1, 1, 0)
    assert prove(ring_all_reduce, Run("all_reduce", 5)).steps == (8,) * 5


def test_partners_of_swing_are_those_of_the_paper() -> None:
    """8 ranks: distances 1, -1, 3."""
    partners = [[step[0].peer for step in swing_all_reduce(rank, 8)][:3] for rank in (0, 1)]
    assert partners == [[1, 7, 3], [0, 2, 6]]


@pytest.mark.parametrize("n", range(1, 34))
def test_no_rank_is_an_inner_node_of_both_trees(n: int) -> None:
    inner = [{edge.parent for edge in double_tree._both_trees(n) if edge.tree == tree} for tree in (0, 1)]
    assert not inner[0] & inner[1]


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


def ring_of_partial_sums(rank: int, n: int) -> Iterator[Step]:
    """A ring that sends on what has been added up, which holds what was there before."""
    prev_rank, next_rank = neighbours(rank, n)
    for _ in range(n - 1):
        yield Send(next_rank, range(n)), Reduce(prev_rank, range(n))


@num_chunks(1)
def one_at_a_time_on_rank_0(rank: int, n: int) -> Iterator[Step]:
    peers = [peer for peer in range(n) if peer != rank]
    sends, reductions = tuple(Send(peer, 0) for peer in peers), tuple(Reduce(peer, 0) for peer in peers)
    if rank == 0:
        yield *sends, reductions[-1]
        yield reductions[:-1]
    else:
        yield sends + reductions


def one_chunk_twice(rank: int, n: int) -> Iterator[Step]:
    yield (Send((rank + 1) % n, [1, 1]),)


def chunks_that_overlap(rank: int, n: int) -> Iterator[Step]:
    if rank == 0:
        yield Reduce(1, range(2)), Reduce(2, range(1, 3))


def more_chunks_than_expected(rank: int, n: int) -> Iterator[Step]:
    prev_rank, next_rank = neighbours(rank, n)
    yield Send(next_rank, range(2)), Reduce(prev_rank, 0)


def not_a_step(rank: int, n: int) -> Iterator[Step]:
    yield Send((rank + 1) % n, rank)  # type: ignore[misc]


def half_a_chunk(rank: int, n: int) -> Iterator[Step]:
    yield (Send((rank + 1) % n, rank / 2),)  # type: ignore[arg-type]


@num_chunks(3)
def too_few_chunks(rank: int, n: int) -> Iterator[Step]:
    yield from ring_all_gather(rank, n)


@num_chunks(0)
def no_chunks(rank: int, n: int) -> Iterator[Step]:
    yield from ring_all_reduce(rank, n)


def overwrites_the_input(rank: int, n: int) -> Iterator[Step]:
    yield Send(rank ^ 1, rank ^ 1), Recv(rank ^ 1, rank)


def nothing_at_all(rank: int, n: int) -> Iterator[Step]:
    peers = [peer for peer in range(n) if peer != rank]
    yield *(Send(peer, []) for peer in peers), *(Recv(peer, []) for peer in peers)


def the_same_transfer_twice(rank: int, n: int) -> Iterator[Step]:
    receive = Recv(1, 0)
    if rank == 0:
        yield receive, receive


def half_a_rank(rank: int, n: int) -> Iterator[Step]:
    yield (Send(rank / 2, 0),)  # type: ignore[arg-type]


def chain_gather(rank: int, n: int, root: int) -> Iterator[Step]:
    if rank + 1 < n:
        yield (Recv(rank + 1, range(rank + 1, n)),)
    if rank > 0:
        yield (Send(rank - 1, range(rank, n)),)


def bounced_scatter(rank: int, n: int, root: int) -> Iterator[Step]:
    if rank == root:
        yield (Recv(1, 1),)
    elif rank == 1:
        yield (Send(root, 1),)


WRONG: list[tuple[Schedule, str, str]] = [
    (
        overwrites_the_input,
        "all_to_all",
        "rank 0, step 0: it receives chunk 0 from rank 1, but that is the input of the all_to_all, "
        "which stays as it is",
    ),
    (
        bounced_scatter,
        "scatter",
        "rank 0, step 0: it receives chunk 1 from rank 1, but that is the input of the scatter, which stays as it is",
    ),
    (
        chain_gather,
        "gather",
        "rank 1, step 0: it receives chunks 2 to 3 from rank 2, but of the chunks of a gather it has only its own",
    ),
    (nothing_at_all, "barrier", "rank 0, step 0: a transfer with rank 1 names no chunk"),
    (half_a_rank, "all_reduce", "rank 0, step 0: a rank is a whole number, got 0.0"),
    (
        the_same_transfer_twice,
        "all_reduce",
        "rank 0, step 0: it receives chunk 0 from rank 1 and it receives chunk 0 from rank 1 in one step, in an order "
        "that nobody knows",
    ),
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
    (reduces_into_nothing, "all_gather", "rank 1, step 0: it reduces into chunk 0, in which there is nothing yet"),
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
    (ring_of_partial_sums, "all_reduce", "rank 0, chunk 0: the contribution of rank 2 is in it 3 times"),
    (
        one_at_a_time_on_rank_0,
        "all_reduce",
        "rank 1, chunk 0: it is added up in another order than on rank 0, so that their bits can differ",
    ),
    (one_chunk_twice, "all_reduce", "rank 0, step 0: it sends chunks 1, 1 to rank 1, one of them twice"),
    (
        chunks_that_overlap,
        "all_reduce",
        "rank 0, step 0: it reduces chunks 1 to 2 from rank 2 and it reduces chunks 0 to 1 from rank 1 in one step; "
        "what is reduced together has to be the same chunks",
    ),
    (
        more_chunks_than_expected,
        "all_reduce",
        "rank 0, step 0: it sends chunks 0 to 1 to rank 1, where rank 1 in step 0 expects chunk 0; "
        "their sizes can differ",
    ),
    (not_a_step, "all_reduce", "rank 0, step 0: a step is a tuple of Send, Recv and Reduce, got Send(peer=1, chunk=0)"),
    (half_a_chunk, "all_reduce", "rank 0, step 0: it sends chunk 0.0 to rank 1, but the chunks are 0 to 3"),
    (too_few_chunks, "all_gather", "all_gather on 4 ranks has 4 chunks, got num_chunks(3)"),
    (no_chunks, "all_reduce", "all_reduce on 4 ranks has at least 1 chunks, got num_chunks(0)"),
]


@pytest.mark.parametrize(
    ("schedule", "collective", "sentence"), WRONG, ids=lambda value: getattr(value, "__name__", "")
)
def test_mistakes_are_found_and_said(schedule: Schedule, collective: str, sentence: str) -> None:
    with pytest.raises(ScheduleError) as caught:
        prove(schedule, Run(collective, 4))
    assert str(caught.value) == sentence


@pytest.mark.parametrize(
    ("collective", "world_size", "root", "message"),
    [
        ("all_reduce", 0, 0, f"world_size must be 1 to {MAX_WORLD_SIZE}, got 0"),
        ("all_reduce", 1_000_000, 0, "got 1000000"),
        ("all_recuce", 2, 0, "collective must be one of all_reduce, .*, got 'all_recuce'"),
        ("broadcast", 2, 2, "root must be a rank from 0 to 1, got 2"),
    ],
)
def test_wrong_questions_are_refused(collective: str, world_size: int, root: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prove(ring_all_reduce, Run(collective, world_size, root))
