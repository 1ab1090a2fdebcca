"""Schedules on threads: what crosses the transport, how messages are cut, what is refused before it is sent."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch

from backends.algorithm import AlgorithmCommunicator
from backends.ring import RingCommunicator
from backends.scheduled import ScheduledCommunicator
from backends.schedules.binomial import binomial_broadcast
from backends.serial import SerialCommunicator
from backends.thread import ThreadCommunicator, run_threads, spawn_threads
from backends.two_level import TwoLevelCommunicator
from minidist.communicator import Communicator, ReduceOp
from minidist.contract.work import Work
from minidist.errors import ScheduleError
from minidist.schedule import Recv, Reduce, Send, Step, num_chunks
from tests.zoo import THEORY, Theory, two_level_theory

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


NUMEL = 16 * 3 * 5 * 7 * 9  # of the larger tensor: a multiple of every number of chunks


def run(theory: Theory, comm: Communicator) -> None:
    """Run the collective once, on a tensor of NUMEL elements, or of so many in all blocks together."""
    n, whole, block = comm.world_size, torch.ones(NUMEL), torch.ones(NUMEL // comm.world_size)
    at_root = whole if comm.rank == 0 else None
    calls: dict[str, Callable[[], object]] = {
        "all_reduce": lambda: comm.all_reduce(whole),
        "reduce": lambda: comm.reduce(whole, 0),
        "broadcast": lambda: comm.broadcast(whole, 0),
        "all_gather": lambda: comm.all_gather(whole[: n * block.numel()], block),
        "reduce_scatter": lambda: comm.reduce_scatter(block, whole[: n * block.numel()]),
        "gather": lambda: comm.gather(at_root, block, 0),
        "scatter": lambda: comm.scatter(block, at_root, 0),
        "all_to_all": lambda: comm.all_to_all(torch.empty(NUMEL), whole),
        "barrier": comm.barrier,
    }
    calls[theory.collective]()


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 7])
@pytest.mark.parametrize("theory", [*THEORY, two_level_theory(1)], ids=lambda theory: theory.name)
def test_what_crosses_the_transport_is_what_the_theory_says(theory: Theory, n: int) -> None:
    results = _record(
        lambda transport: AlgorithmCommunicator(transport, {theory.collective: theory.schedule}),
        n,
        lambda comm: run(theory, comm),
    )
    unit = 1 if theory.collective == "barrier" else NUMEL * 4
    assert sum(len(sent) for sent, _, _ in results) == sum(m for _, m, _ in results) == theory.messages(n)
    volume = sum(size for sent, _, _ in results for _, size in sent)
    assert volume == sum(counted for _, _, counted in results) == round(theory.volume(n) * unit)


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_ring_talks_to_its_next_neighbour_in_segments(n: int) -> None:
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


@pytest.mark.parametrize(("segment_bytes", "many"), [(16, 100), (4096, 600)])
@pytest.mark.parametrize("theory", THEORY, ids=lambda theory: theory.name)
def test_messages_are_cut_alike_on_both_ends(theory: Theory, segment_bytes: int, many: int) -> None:
    """Chunks that are packed, and chunks that are cut: a message that is not expected so would be an error."""

    def job() -> None:
        schedules = {theory.collective: theory.schedule}
        with AlgorithmCommunicator(ThreadCommunicator(timeout_s=30), schedules, segment_bytes=segment_bytes) as comm:
            for numel in (7, many):
                check_against_transport(theory.collective, comm, numel)

    spawn_threads(job, 6)


def check_against_transport(collective: str, comm: AlgorithmCommunicator, numel: int) -> None:
    """Compare a collective with that of the transport, on tensors whose values tell where they come from."""
    n = comm.world_size
    data = torch.arange(numel * n, dtype=torch.float64) + 1000 * comm.rank
    outputs = []
    for who in (comm, comm.transport):
        call = getattr(who, collective)
        match collective:
            case "all_reduce":
                output = data.clone()
                call(output)
            case "reduce" | "broadcast":
                output = data.clone()
                call(output, 1)
            case "gather":
                output = torch.zeros(n * n * numel, dtype=data.dtype)
                call(output if comm.rank == 1 else None, data, 1)
            case "scatter":
                output = torch.zeros(numel, dtype=data.dtype)
                call(output, data if comm.rank == 1 else None, 1)
            case "all_gather":
                output = torch.zeros(n * n * numel, dtype=data.dtype)
                call(output, data)
            case "reduce_scatter":
                output = torch.zeros(numel, dtype=data.dtype)
                call(output, data)
            case "all_to_all":
                output = torch.zeros_like(data)
                call(output, data)
            case "barrier":
                output = data
                call()
        outputs.append(output)
    assert torch.equal(*outputs)


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
        first = {name: memory.data_ptr() for name, memory in comm._executor.scratch._memory.items()}
        comm.all_reduce(torch.ones(900))
        return bool(first) and first == {
            name: memory.data_ptr() for name, memory in comm._executor.scratch._memory.items()
        }

    assert run_threads(job, 2) == [True, True]


def nobody_sends(rank: int, world_size: int) -> Iterator[Step]:
    if world_size == 3:
        yield (Recv((rank + 1) % 3, 0),)


def test_a_wrong_schedule_never_touches_a_tensor() -> None:
    def job() -> tuple[str, bool]:
        with AlgorithmCommunicator(ThreadCommunicator(), {"all_reduce": nobody_sends}) as comm:
            data = torch.ones(5)
            with pytest.raises(ScheduleError) as caught:
                comm.all_reduce(data)
            return str(caught.value), torch.equal(data, torch.ones(5))

    for rank, (sentence, untouched) in enumerate(spawn_threads(job, 3)):
        assert untouched
        assert sentence.startswith(
            f"[rank {rank}/3] all_reduce: the schedule is wrong on 3 ranks; deadlock: rank 0 in step 0 (it receives"
        )


def test_schedules_are_proved_once_for_each_root() -> None:
    calls: list[int] = []

    def counted(rank: int, world_size: int, root: int) -> Iterator[Step]:
        calls.append(root)
        return binomial_broadcast(rank, world_size, root)

    def job() -> None:
        with AlgorithmCommunicator(ThreadCommunicator(), {"broadcast": counted}) as comm:
            for root in (0, 1, 0, 1, 1):
                comm.broadcast(torch.ones(1), root)

    spawn_threads(job, 2)
    assert calls.count(0) == calls.count(1) == 2 * (2 + 1)  # on each of the two ranks: two in its proof, one to run


@pytest.mark.parametrize(
    ("schedules", "message"),
    [
        (
            {"all_recuce": "backends.ring.ring_all_reduce"},
            "all_recuce is not a collective; there are schedules",
        ),
        ({"all_reduce": "backends.ring.rong"}, "the schedule backends.ring.rong of all_reduce cannot be imported"),
        ({"all_reduce": "backends.ring"}, "backends.ring is not a schedule but <module"),
    ],
)
def test_what_is_no_schedule_is_refused(schedules: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AlgorithmCommunicator(SerialCommunicator(), schedules)


def test_what_has_no_schedule_is_left_to_the_transport() -> None:
    def job() -> list[tuple[int, int]]:
        transport = RecordingCommunicator()
        with AlgorithmCommunicator(transport, {"all_reduce": None, "barrier": None}) as comm:
            transport.sent.clear()
            comm.all_reduce(torch.ones(1200))
            return transport.sent

    assert spawn_threads(job, 3)[0] == [(1, 1600), (2, 1600), (1, 1600), (2, 1600)]


@pytest.mark.parametrize("ranks_per_host", [0, 2, 4])
def test_two_levels_need_hosts_of_one_size(ranks_per_host: int) -> None:
    with pytest.raises(ValueError, match=f"ranks_per_host must divide the 3 ranks, got {ranks_per_host}"):
        run_threads(lambda comm: TwoLevelCommunicator(comm, ranks_per_host), 3)


@num_chunks(4)
def one_list_again_and_again(rank: int, world_size: int, root: int) -> Iterator[Step]:
    part: list[int] = []
    for chunk in range(4):
        part.clear()
        part.append(chunk)
        yield (Send(1, part) if rank == 0 else Recv(0, part),)


def test_a_schedule_can_use_its_list_again() -> None:
    def job() -> torch.Tensor:
        with AlgorithmCommunicator(ThreadCommunicator(), {"broadcast": one_list_again_and_again}) as comm:
            data = torch.arange(8.0) * (1 - comm.rank)
            comm.broadcast(data, 0)
            return data

    assert torch.equal(spawn_threads(job, 2)[1], torch.arange(8.0))


def test_a_split_of_two_levels_is_one_of_its_transport() -> None:
    def job() -> float:
        with TwoLevelCommunicator(ThreadCommunicator(), 2) as comm:
            half = comm.split(comm.rank % 2)
            assert half is not None
            data = torch.ones(3)
            half.all_reduce(data)
            return float(data[0])

    assert spawn_threads(job, 6) == [3.0] * 6


def test_settings_of_a_schedule_keep_its_chunks() -> None:
    @num_chunks(1)
    def star(rank: int, world_size: int, centre: int) -> Iterator[Step]:
        others = [peer for peer in range(world_size) if peer != centre]
        if rank == centre:
            yield tuple(Reduce(peer, 0) for peer in others)
            yield tuple(Send(peer, 0) for peer in others)
        else:
            yield (Send(centre, 0),)
            yield (Recv(centre, 0),)

    def job() -> float:
        with AlgorithmCommunicator(ThreadCommunicator(), {"all_reduce": partial(star, centre=2)}) as comm:
            data = torch.ones(3)
            comm.all_reduce(data)
            return float(data[0])

    assert spawn_threads(job, 3) == [3.0] * 3


@num_chunks(2)
def two_messages_into_one_chunk(rank: int, world_size: int) -> Iterator[Step]:
    """Rank 2 combines its first chunk with a part of one message and with all of another."""
    if rank == 2:
        yield Reduce(0, [0, 1]), Reduce(1, 0)
    else:
        yield (Send(2, [0, 1] if rank == 0 else 0),)


def test_a_chunk_is_found_by_itself_where_several_messages_are_combined_into_it() -> None:
    def job() -> torch.Tensor:
        schedules = {"all_reduce": two_messages_into_one_chunk}
        with AlgorithmCommunicator(ThreadCommunicator(timeout_s=30), schedules, proves=False) as comm:
            data = torch.full((4,), 10.0**comm.rank)
            comm.all_reduce(data)
            return data

    assert spawn_threads(job, 3)[2].tolist() == [111, 111, 101, 101]
