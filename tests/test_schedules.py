"""Every schedule on 1 to 9 ranks: it is proved, what it costs is that of theory, and real runs cost the same."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest
import torch

from backends import ring, schedules
from backends.ring import RingCommunicator
from backends.scheduled import ScheduledCommunicator
from backends.thread import ThreadCommunicator, run_threads, spawn_threads
from minidist.communicator import Communicator, ReduceOp
from minidist.prove import prove
from minidist.schedule import Step
from minidist.work import Work

WORLD_SIZES = range(1, 10)


@pytest.mark.parametrize("n", WORLD_SIZES)
@pytest.mark.parametrize(
    ("schedule", "num_steps"),
    [(schedules.direct_all_reduce, lambda n: 2), (ring.ring_all_reduce, lambda n: 2 * (n - 1))],
)
def test_all_reduce(schedule: Callable[..., Iterator[Step]], num_steps: Callable[[int], int], n: int) -> None:
    counts = prove(schedule, "all_reduce", n)
    assert counts.messages == (2 * (n - 1),) * n  # of 1/n of the bytes each: 2 (n-1)/n in all
    assert counts.steps == (num_steps(n),) * n


@pytest.mark.parametrize("n", WORLD_SIZES)
@pytest.mark.parametrize(
    ("schedule", "num_steps"),
    [(schedules.direct_reduce_scatter, lambda n: 1), (ring.ring_reduce_scatter, lambda n: n - 1)],
)
def test_reduce_scatter(schedule: Callable[..., Iterator[Step]], num_steps: Callable[[int], int], n: int) -> None:
    counts = prove(schedule, "reduce_scatter", n)
    assert counts.messages == (n - 1,) * n
    assert counts.steps == (num_steps(n),) * n


@pytest.mark.parametrize("n", WORLD_SIZES)
@pytest.mark.parametrize(
    ("schedule", "num_steps"),
    [(schedules.direct_all_gather, lambda n: 1), (ring.ring_all_gather, lambda n: n - 1)],
)
def test_all_gather(schedule: Callable[..., Iterator[Step]], num_steps: Callable[[int], int], n: int) -> None:
    counts = prove(schedule, "all_gather", n)
    assert counts.messages == (n - 1,) * n
    assert counts.steps == (num_steps(n),) * n


@pytest.mark.parametrize("n", WORLD_SIZES)
def test_ring_talks_only_to_neighbours(n: int) -> None:
    for rank in range(n):
        for step in ring.ring_all_reduce(rank, n):
            send, arrival = step
            assert (send.peer, arrival.peer) == ((rank + 1) % n, (rank - 1) % n)


@pytest.mark.parametrize("n", WORLD_SIZES)
def test_broadcast_and_reduce_are_binomial_trees(n: int) -> None:
    depth = math.ceil(math.log2(n))
    for root in range(n):
        counts = prove(schedules.binomial_broadcast, "broadcast", n, root)
        assert sum(counts.messages) == n - 1
        assert max(counts.messages) == counts.messages[root] == depth
        assert max(counts.steps) == depth
        counts = prove(schedules.binomial_reduce, "reduce", n, root)
        assert counts.messages == tuple(int(rank != root) for rank in range(n))
        assert max(counts.steps) == depth


@pytest.mark.parametrize("n", WORLD_SIZES)
def test_gather_and_scatter_go_straight_to_and_from_the_root(n: int) -> None:
    for root in range(n):
        counts = prove(schedules.direct_gather, "gather", n, root)
        assert counts.messages == tuple(int(rank != root) for rank in range(n))
        counts = prove(schedules.direct_scatter, "scatter", n, root)
        assert counts.messages == tuple((n - 1) * (rank == root) for rank in range(n))


@pytest.mark.parametrize("n", WORLD_SIZES)
def test_all_to_all_sends_every_block_once(n: int) -> None:
    assert prove(schedules.direct_all_to_all, "all_to_all", n).messages == (n - 1,) * n


@pytest.mark.parametrize("n", WORLD_SIZES)
def test_barrier_hears_of_every_rank(n: int) -> None:
    """A token carries all that its sender has heard of; in the schedule itself it carries nothing."""
    heard = [{rank} for rank in range(n)]
    steps = [list(schedules.dissemination_barrier(rank, n)) for rank in range(n)]
    for number in range(math.ceil(math.log2(n))):
        before = [set(known) for known in heard]
        for rank in range(n):
            send, arrival = steps[rank][number]
            assert steps[arrival.peer][number][0].peer == rank
            assert send.chunk != arrival.chunk
            heard[rank] |= before[arrival.peer]
    assert heard == [set(range(n))] * n
    assert {len(own_steps) for own_steps in steps} == {math.ceil(math.log2(n))}


# Real runs ------------------------------------------------------------------------------------


class RecordingCommunicator(ThreadCommunicator):
    """Threads that write down what they send."""

    def __init__(self) -> None:
        super().__init__(timeout_s=30.0)
        self.sent: list[tuple[int, int]] = []

    def _isend(self, tensor: torch.Tensor, dst: int, tag: int, timeout_s: float) -> Work:
        self.sent.append((dst, tensor.nbytes))
        return super()._isend(tensor, dst, tag, timeout_s)


def _record(
    make: Callable[[RecordingCommunicator], Communicator], n: int, job: Callable[[Communicator], object]
) -> list:
    def rank_job() -> tuple[list[tuple[int, int]], int, int]:
        transport = RecordingCommunicator()
        with make(transport) as comm:
            num_sent, messages, nbytes = len(transport.sent), comm.traffic.messages, comm.traffic.bytes
            job(comm)
            return transport.sent[num_sent:], comm.traffic.messages - messages, comm.traffic.bytes - nbytes

    return spawn_threads(rank_job, n)


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_ring_sends_what_the_theory_says(n: int) -> None:
    nbytes = 12 * 1024 * 4
    results = _record(
        lambda transport: RingCommunicator(transport, segment_bytes=2048),
        n,
        lambda comm: comm.all_reduce(torch.ones(12 * 1024)),
    )
    for rank, (sent, messages, counted) in enumerate(results):
        assert {dst for dst, _ in sent} == ({(rank + 1) % n} if n > 1 else set())
        assert sum(size for _, size in sent) == counted == 2 * (n - 1) * nbytes // n
        assert len(sent) == messages == 2 * (n - 1) * math.ceil(nbytes / n / 2048)


@pytest.mark.parametrize("n", [1, 2, 3, 4])
@pytest.mark.parametrize(
    ("job", "messages", "nbytes"),
    [
        (lambda c: c.all_reduce(torch.ones(1200)), lambda n: 2 * (n - 1), lambda n: 2 * (n - 1) * 4800 // n),
        (
            lambda c: c.all_gather(torch.ones(c.world_size, 300), torch.ones(300)),
            lambda n: n - 1,
            lambda n: (n - 1) * 1200,
        ),
        (
            lambda c: c.reduce_scatter(torch.ones(300), torch.ones(c.world_size, 300)),
            lambda n: n - 1,
            lambda n: (n - 1) * 1200,
        ),
        (lambda c: c.all_to_all(torch.ones(1200), torch.ones(1200)), lambda n: n - 1, lambda n: (n - 1) * 4800 // n),
        (lambda c: c.barrier(), lambda n: math.ceil(math.log2(n)), lambda n: math.ceil(math.log2(n))),
    ],
    ids=["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "barrier"],
)
def test_default_schedules_send_what_their_table_says(
    job: Callable[[Communicator], object], messages: Callable[[int], int], nbytes: Callable[[int], int], n: int
) -> None:
    for sent, counted_messages, counted_bytes in _record(lambda transport: transport, n, job):
        assert len(sent) == counted_messages == messages(n)
        assert sum(size for _, size in sent) == counted_bytes == nbytes(n)


@pytest.mark.parametrize("segment_bytes", [16, 17, 40, 4096, 2**20])
def test_segments_of_any_size_give_the_same_result(segment_bytes: int) -> None:
    def job() -> torch.Tensor:
        with RingCommunicator(ThreadCommunicator(), segment_bytes=segment_bytes) as comm:
            data = torch.arange(101, dtype=torch.float64) * (comm.rank + 1)
            comm.all_reduce(data, ReduceOp.SUM)
            return data

    for data in spawn_threads(job, 3):
        assert torch.equal(data, torch.arange(101, dtype=torch.float64) * 6)


def test_scratch_memory_is_kept_between_calls() -> None:
    def job(comm: ScheduledCommunicator) -> bool:
        comm.all_reduce(torch.ones(1000))
        first = {name: memory.data_ptr() for name, memory in comm._scratch._memory.items()}
        comm.all_reduce(torch.ones(900))
        return bool(first) and first == {name: memory.data_ptr() for name, memory in comm._scratch._memory.items()}

    assert run_threads(job, 2) == [True, True]
