"""Every schedule on 1 to 9 ranks: what it computes, shown symbolically, and what it costs, against theory."""

from __future__ import annotations

import math
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest
import torch

from backends import ring, schedules
from backends.ring import RingCommunicator
from backends.scheduled import ScheduledCommunicator
from backends.thread import ThreadCommunicator, run_threads, spawn_threads
from minidist.communicator import Communicator, ReduceOp
from minidist.schedule import Recv, Reduce, Send, Step
from minidist.work import Work

Contents = frozenset[tuple[int, int]] | None
"""What a chunk holds: (rank, chunk) of every contribution in it; None before anything arrived."""
WORLD_SIZES = range(1, 10)


@dataclass
class Run:
    """What a simulated run left and cost."""

    memory: list[dict[int, Contents]]
    steps: list[int]
    sent: list[Counter[int]] = field(default_factory=list)
    """By rank, how often it sent each chunk index."""

    def messages(self) -> list[int]:
        return [sum(counter.values()) for counter in self.sent]


def simulate(steps: list[Iterator[Step]], memory: list[dict[int, Contents]]) -> Run:
    """Run all ranks' steps, in lockstep with nothing but their messages; refuse whatever is not well-defined."""
    n = len(steps)
    current: list[Step | None] = [next(s, None) for s in steps]
    run = Run(memory, [int(step is not None) for step in current], [Counter() for _ in range(n)])
    network: dict[tuple[int, int], deque[Contents]] = defaultdict(deque)
    for rank in range(n):
        _post(rank, current[rank], run, network)
    progressed = True
    while progressed and any(step is not None for step in current):
        progressed = False
        for rank, step in enumerate(current):
            if step is not None and _complete(rank, step, memory[rank], network):
                current[rank] = next(steps[rank], None)
                run.steps[rank] += current[rank] is not None
                _post(rank, current[rank], run, network)
                progressed = True
    assert all(step is None for step in current), f"deadlock: {current}"
    assert not any(network.values()), "messages that nobody receives"
    return run


def _post(rank: int, step: Step | None, run: Run, network: dict[tuple[int, int], deque[Contents]]) -> None:
    sends = [transfer for transfer in step or () if isinstance(transfer, Send)]
    written = [transfer.chunk for transfer in step or () if isinstance(transfer, Recv)]
    assert len(written) == len(set(written)), f"rank {rank} overwrites a chunk twice in {step}"
    for send in sends:
        assert send.peer != rank
        assert all(t.chunk != send.chunk for t in step or () if not isinstance(t, Send)), f"{send} changes in {step}"
        network[rank, send.peer].append(run.memory[rank][send.chunk])
        run.sent[rank][send.chunk] += 1


def _complete(
    rank: int, step: Step, memory: dict[int, Contents], network: dict[tuple[int, int], deque[Contents]]
) -> bool:
    arrivals = [transfer for transfer in step if not isinstance(transfer, Send)]
    wanted = Counter(transfer.peer for transfer in arrivals)
    if any(len(network[peer, rank]) < count for peer, count in wanted.items()):
        return False
    for transfer in arrivals:
        contents = network[transfer.peer, rank].popleft()
        if isinstance(transfer, Reduce):
            mine = memory[transfer.chunk]
            assert not mine & contents, f"rank {rank}: {transfer} adds {mine & contents} a second time"
            contents = mine | contents
        memory[transfer.chunk] = contents
    return True


def run_schedule(schedule: Callable[..., Iterator[Step]], memory: list[dict[int, Contents]], *root: int) -> Run:
    n = len(memory)
    return simulate([schedule(rank, n, *root) for rank in range(n)], memory)


def own(rank: int, chunks: range) -> dict[int, Contents]:
    """Return chunks that hold nothing but their rank's contribution."""
    return {chunk: frozenset({(rank, chunk)}) for chunk in chunks}


def total(n: int, chunk: int) -> Contents:
    return frozenset((rank, chunk) for rank in range(n))


@pytest.mark.parametrize("n", WORLD_SIZES)
@pytest.mark.parametrize(
    ("schedule", "num_steps"),
    [(schedules.direct_all_reduce, lambda n: 2), (ring.ring_all_reduce, lambda n: 2 * (n - 1))],
)
def test_all_reduce(schedule: Callable[..., Iterator[Step]], num_steps: Callable[[int], int], n: int) -> None:
    run = run_schedule(schedule, [own(rank, range(n)) for rank in range(n)])
    assert run.memory == [{chunk: total(n, chunk) for chunk in range(n)}] * n
    assert run.messages() == [2 * (n - 1)] * n  # of 1/n of the bytes each: 2 (n-1)/n in all
    assert run.steps == [num_steps(n)] * n


@pytest.mark.parametrize("n", WORLD_SIZES)
@pytest.mark.parametrize(
    ("schedule", "num_steps"),
    [(schedules.direct_reduce_scatter, lambda n: 1), (ring.ring_reduce_scatter, lambda n: n - 1)],
)
def test_reduce_scatter(schedule: Callable[..., Iterator[Step]], num_steps: Callable[[int], int], n: int) -> None:
    run = run_schedule(schedule, [own(rank, range(n)) for rank in range(n)])
    assert [run.memory[rank][rank] for rank in range(n)] == [total(n, rank) for rank in range(n)]
    assert run.messages() == [n - 1] * n
    assert run.steps == [num_steps(n)] * n


@pytest.mark.parametrize("n", WORLD_SIZES)
@pytest.mark.parametrize(
    ("schedule", "num_steps"),
    [(schedules.direct_all_gather, lambda n: 1), (ring.ring_all_gather, lambda n: n - 1)],
)
def test_all_gather(schedule: Callable[..., Iterator[Step]], num_steps: Callable[[int], int], n: int) -> None:
    run = run_schedule(schedule, [dict.fromkeys(range(n)) | own(rank, range(rank, rank + 1)) for rank in range(n)])
    assert run.memory == [{chunk: frozenset({(chunk, chunk)}) for chunk in range(n)}] * n
    assert run.messages() == [n - 1] * n
    assert run.steps == [num_steps(n)] * n


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
        run = run_schedule(schedules.binomial_broadcast, [own(rank, range(1)) for rank in range(n)], root)
        assert run.memory == [{0: frozenset({(root, 0)})}] * n
        assert sum(run.messages()) == n - 1
        assert max(run.messages()) == run.messages()[root] == depth
        assert max(run.steps) == depth
        run = run_schedule(schedules.binomial_reduce, [own(rank, range(1)) for rank in range(n)], root)
        assert run.memory[root] == {0: total(n, 0)}
        assert run.messages() == [int(rank != root) for rank in range(n)]
        assert max(run.steps) == depth


@pytest.mark.parametrize("n", WORLD_SIZES)
def test_gather_and_scatter_go_straight_to_and_from_the_root(n: int) -> None:
    for root in range(n):
        run = run_schedule(schedules.direct_gather, [own(rank, range(n)) for rank in range(n)], root)
        assert run.memory[root] == {chunk: frozenset({(chunk, chunk)}) for chunk in range(n)}
        assert run.messages() == [int(rank != root) for rank in range(n)]
        run = run_schedule(schedules.direct_scatter, [own(rank, range(n)) for rank in range(n)], root)
        assert [run.memory[rank][rank] for rank in range(n)] == [frozenset({(root, rank)}) for rank in range(n)]
        assert run.messages() == [(n - 1) * (rank == root) for rank in range(n)]


@pytest.mark.parametrize("n", WORLD_SIZES)
def test_all_to_all_sends_every_block_once(n: int) -> None:
    memory = [own(rank, range(n)) | {n + rank: frozenset({(rank, rank)})} for rank in range(n)]
    run = run_schedule(schedules.direct_all_to_all, memory)
    for rank in range(n):
        assert [run.memory[rank][n + src] for src in range(n)] == [frozenset({(src, rank)}) for src in range(n)]
    assert run.messages() == [n - 1] * n


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
