"""Wrong arguments, life cycle and order of a communicator, on threads: what no backend has a part in."""

from __future__ import annotations

import threading
from collections.abc import Callable
from enum import Enum

import pytest
import torch

from backends.ring import RingCommunicator
from backends.serial import SerialCommunicator
from backends.thread import ThreadCommunicator, run_threads, spawn_threads
from minidist.communicator import Communicator, ReduceOp
from minidist.contract.forks import Maker
from minidist.contract.traffic import Traffic
from minidist.contract.work import DONE, Progress
from minidist.errors import BackendUnavailableError, CommError, CommTimeoutError, MismatchError, PeerLostError

ONES = torch.ones(4)


class OtherOp(Enum):
    """An operation as another library names it."""

    SUM = "sum"


def _refused(call: Callable[[Communicator], object]) -> tuple[type[Exception], str]:
    """Return what rank 1 of 2 is told; the communicator must work afterwards."""

    def job(comm: Communicator) -> tuple[type[Exception], str] | None:
        answer = None
        if comm.rank == 1:
            with pytest.raises((TypeError, ValueError)) as caught:
                call(comm)
            answer = type(caught.value), str(caught.value)
        assert comm.traffic.messages == 0
        comm.barrier()
        return answer

    return run_threads(job, 2, timeout_s=10)[1]


@pytest.mark.parametrize(
    ("call", "kind", "words"),
    [
        (lambda c: c.broadcast(ONES, 2), ValueError, "broadcast: src must be a rank from 0 to 1, got 2"),
        (lambda c: c.broadcast(ONES, -1), ValueError, "got -1"),
        (lambda c: c.broadcast(ONES, "0"), TypeError, "src must be an int, got str"),
        (lambda c: c.reduce(ONES, True), TypeError, "dst must be an int, got bool"),
        (lambda c: c.gather(None, ONES, 5), ValueError, "gather: dst must be a rank"),
        (lambda c: c.gather(ONES, ONES, 0), ValueError, "output is for rank 0 (dst) alone; give None"),
        (lambda c: c.gather(None, ONES, 1), TypeError, "output must be a torch.Tensor, got NoneType"),
        (lambda c: c.scatter(ONES, ONES, 0), ValueError, "input is for rank 0 (src) alone; give None"),
        (lambda c: c.send(ONES, 1), ValueError, "isend: dst is this rank itself"),
        (lambda c: c.recv(ONES, 7), ValueError, "irecv: src must be a rank from 0 to 1, got 7"),
        (lambda c: c.send(ONES, 0, tag=-1), ValueError, "tag must be an int from 0 to 2147483645, got -1"),
        (lambda c: c.send(ONES, 0, tag=2**31 - 2), ValueError, "got 2147483646"),
        (lambda c: c.all_reduce([1.0]), TypeError, "tensor must be a torch.Tensor, got list"),
        (lambda c: c.broadcast(torch.empty(2, dtype=torch.bits8), 0), TypeError, "dtype torch.bits8"),
        (lambda c: c.all_gather(ONES, ONES, sizes=[4, 0, 0]), ValueError, "a size for each of the 2 ranks, got 3"),
        (lambda c: c.all_gather(ONES, ONES, sizes=[]), ValueError, "a size for each of the 2 ranks, got 0"),
        (lambda c: c.all_to_all(ONES, ONES, input_sizes=[2, 2]), ValueError, "give both output_sizes and input_sizes"),
        (lambda c: c.all_reduce(torch.ones(2, dtype=torch.uint64)), TypeError, "uint64 is moved, but not combined"),
        (
            lambda c: c.all_reduce(torch.ones(2), ReduceOp.BAND),
            TypeError,
            "op BAND is not defined for float32; use one of SUM",
        ),
        (
            lambda c: c.all_reduce(torch.ones(2, dtype=torch.complex64), ReduceOp.MAX),
            TypeError,
            "op MAX is not defined for complex64; use one of SUM, AVG",
        ),
        (
            lambda c: c.reduce_scatter(torch.ones(1).cfloat(), torch.ones(2).cfloat(), ReduceOp.PRODUCT),
            TypeError,
            "op PRODUCT is not defined for complex64",
        ),
        (lambda c: c.all_reduce(torch.eye(2).to_sparse()), TypeError, "use to_dense()"),
        (lambda c: c.all_reduce(torch.ones(1).expand(3)), ValueError, "use .clone()"),
        (lambda c: c.all_reduce(torch.ones(5).as_strided((3, 3), (1, 1))), ValueError, "tensor share memory"),
        (lambda c: c.all_reduce(torch.ones(5).as_strided((2, 3), (2, 1))), ValueError, "use .clone()"),
        (lambda c: c.broadcast(torch.ones(1, 3).expand(3, 3), 0), ValueError, "tensor share memory"),
        (lambda c: c.all_gather(torch.ones(4).expand(2, 4), ONES), ValueError, "elements of output share memory"),
        (lambda c: c.recv(torch.ones(1).expand(3), 0), ValueError, "irecv: elements of tensor share memory"),
        (lambda c: c.all_reduce(torch.ones(2, device="meta")), ValueError, "moves cpu tensors"),
        (
            lambda c: c.all_reduce(torch.ones(2, dtype=torch.int64), ReduceOp.AVG),
            TypeError,
            "op AVG is not defined for int64",
        ),
        (
            lambda c: c.all_reduce(torch.ones(2, dtype=torch.bool), ReduceOp.AVG),
            TypeError,
            "op AVG is not defined for bool",
        ),
        (lambda c: c.all_reduce(ONES, "sum"), TypeError, "op must be a ReduceOp, got 'sum'"),
        (lambda c: c.all_reduce(ONES, OtherOp.SUM), TypeError, "op must be a ReduceOp, got <OtherOp.SUM: 'sum'>"),
        (lambda c: c.all_reduce(ONES, timeout_s=0), ValueError, "timeout_s must be greater than 0"),
        (lambda c: c.all_reduce(ONES, timeout_s=-1), ValueError, "got -1"),
        (lambda c: c.all_gather(torch.ones(7), ONES), ValueError, "2 x 4 = 8 elements, got 7"),
        (lambda c: c.all_gather(torch.ones(8).double(), ONES), TypeError, "must have one dtype and one device"),
        (lambda c: c.reduce_scatter(ONES, torch.ones(9)), ValueError, "2 x 4 = 8 elements, got 9"),
        (lambda c: c.all_to_all(torch.ones(5), torch.ones(5)), ValueError, "world_size = 2 divides"),
        (lambda c: c.all_to_all(torch.ones(4), torch.ones(6)), ValueError, "got 4 and 6 elements"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_sent(
    call: Callable[[Communicator], object], kind: type[Exception], words: str
) -> None:
    refused, message = _refused(call)
    assert refused is kind
    assert message.startswith("[rank 1/2] ")
    assert words in message


def test_an_unusual_view_that_does_not_overlap_itself_is_taken() -> None:
    def job(comm: Communicator) -> list[float]:
        memory = torch.zeros(6)
        comm.all_reduce(memory.as_strided((2, 2), (3, 2)).fill_(1))  # places 0, 2, 3 and 5
        return memory.tolist()

    assert run_threads(job, 2) == [[2.0, 0, 2, 2, 0, 2]] * 2


@pytest.mark.parametrize("operation", ["all_reduce", "reduce"])
def test_a_refused_average_leaves_the_tensor_as_it_was(operation: str) -> None:
    """The division of an average comes before the operation, but after all checks."""

    def job(comm: Communicator) -> list[float]:
        data, where = torch.full((2,), 8.0), (0,) if operation == "reduce" else ()
        with pytest.raises(ValueError, match="timeout_s must be greater than 0"):
            getattr(comm, operation)(data, *where, op=ReduceOp.AVG, timeout_s=-1)
        return data.tolist()

    assert run_threads(job, 2) == [[8.0, 8.0]] * 2


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: ThreadCommunicator(timeout_s=0), "timeout_s must be greater than 0 seconds, got 0"),
        (lambda: ThreadCommunicator(segment_bytes=8), "segment_bytes must be at least 16, got 8"),
        (lambda: RingCommunicator(ThreadCommunicator(), segment_bytes=0), "segment_bytes must be at least 16, got 0"),
        (
            lambda: RingCommunicator(ThreadCommunicator(), timeout_s=0),
            "timeout_s must be greater than 0 seconds, got 0",
        ),
    ],
)
def test_wrong_settings_are_refused(make: Callable[[], Communicator], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()


def test_world_size_0_is_refused() -> None:
    class NobodysCommunicator(SerialCommunicator):
        def __init__(self) -> None:
            super(SerialCommunicator, self).__init__(0, 0)

    with pytest.raises(ValueError, match="world_size must be at least 1, got 0"):
        NobodysCommunicator()


def test_serial_refuses_to_be_one_of_several(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(BackendUnavailableError, match="torchrun started 2, and each would train alone"):
        SerialCommunicator()


def test_a_communicator_says_who_it_is() -> None:
    assert run_threads(repr, 2) == [f"ThreadCommunicator(rank={rank}, world_size=2)" for rank in range(2)]


def test_tensors_of_other_sizes_are_a_mismatch() -> None:
    def job(comm: Communicator) -> None:
        comm.broadcast(torch.ones(3 + comm.rank), 0)

    calls = (rf"rank {rank} calls broadcast of {3 + rank} float32 with root 0 at \S+:\d+; " for rank in range(2))
    with pytest.raises((MismatchError, PeerLostError), match=f"{''.join(calls)}every rank has to call the same"):
        run_threads(job, 2, timeout_s=10)


def test_the_first_failure_of_run_threads_is_raised() -> None:
    def job(comm: Communicator) -> None:
        if comm.rank == 2:
            raise KeyError("lost in thought")
        comm.barrier()

    with pytest.raises(KeyError, match="lost in thought"):
        run_threads(job, 3, timeout_s=10)


def test_a_timeout_is_a_timeout_error_and_the_last_operation() -> None:
    def job(comm: Communicator) -> None:
        if comm.rank == 0:
            with pytest.raises(PeerLostError, match="rank 1 is gone: CommTimeoutError"):
                comm.recv(torch.ones(1), 1)
            return
        with pytest.raises(TimeoutError):
            comm.all_reduce(ONES.clone(), timeout_s=0.1)
        comm.barrier()

    wanted = r"\[rank 1/2\] barrier: unusable since \[rank 1/2\] all_reduce: no answer from rank 0 within the timeout"
    with pytest.raises(CommTimeoutError, match=wanted):
        run_threads(job, 2, timeout_s=10)


def test_then_runs_once_in_the_thread_that_waits() -> None:
    def job(comm: Communicator) -> int:
        calls: list[int] = []
        work = comm.all_reduce(ONES.clone(), async_op=True).then(lambda: calls.append(1))
        work.wait()
        work.wait()
        return len(calls)

    assert run_threads(job, 2) == [1, 1]


def test_a_callback_that_failed_fails_every_wait() -> None:
    calls: list[int] = []

    def fail() -> None:
        calls.append(1)
        raise KeyError("not reduced")

    work = DONE.then(fail)
    chained = work.then(lambda: calls.append(2))
    assert work.exception() is None
    for one in (work, work, chained, chained):
        with pytest.raises(KeyError, match="not reduced"):
            one.wait()
    assert isinstance(work.exception(), KeyError)
    assert isinstance(chained.exception(), KeyError)
    assert calls == [1], "the callback runs once, and what follows it not at all"


def test_time_in_operations_is_counted() -> None:
    def job(comm: Communicator) -> None:
        work = comm.all_reduce(torch.ones(10000), async_op=True)
        work.wait()
        seconds, blocked = comm.traffic.seconds, comm.traffic.blocked_seconds
        assert seconds > 0
        comm.all_reduce(torch.ones(10000))
        assert comm.traffic.seconds > seconds
        assert comm.traffic.blocked_seconds > blocked

    run_threads(job, 2)


def test_a_split_serves_longer_than_a_channel_table() -> None:
    """Groups come and go in a long job: their number must not be limited by how many there ever were."""

    def job() -> int:
        with ThreadCommunicator(timeout_s=10) as comm:
            for _ in range(100):
                with comm.split(0) as group:
                    group.barrier()
            return comm.rank

    assert spawn_threads(job, 2) == [0, 1]


def test_an_interrupted_operation_leaves_the_communicator_unusable() -> None:
    class Interrupted(SerialCommunicator):
        def _barrier(self, timeout_s: float) -> None:
            raise KeyboardInterrupt

    comm = Interrupted()
    with pytest.raises(KeyboardInterrupt):
        comm.barrier()
    with pytest.raises(CommError, match=r"unusable since .* barrier: interrupted by KeyboardInterrupt"):
        comm.all_reduce(torch.ones(2))


def test_a_rank_that_left_has_its_number_of_the_group_that_waits_for_it() -> None:
    """Rank 2 is rank 0 of the group, and rank 2 again of a group of the group."""

    def job(comm: Communicator) -> list[tuple[int, ...]]:
        group = comm.split(0, key=-comm.rank)
        assert group is not None
        nested = group.split(0, key=(group.rank - 1) % 3)
        assert nested is not None
        if comm.rank != 1:
            return []
        peers = []
        for each, number in ((group, 0), (nested, 2)):
            with pytest.raises(PeerLostError, match=f"rank {number} is gone: it left the group while") as error:
                each.recv(torch.ones(1), number)
            peers.append(error.value.peers)
        return peers

    assert run_threads(job, 3, timeout_s=10)[1] == [(0,), (2,)]


def test_who_ends_a_thread_does_not_wait_for_a_job_that_is_given_up_meanwhile() -> None:
    progress = Progress("progress", Traffic(), Maker(""))
    begun, never = threading.Event(), threading.Event()

    def hang() -> None:
        begun.set()
        never.wait()

    pending = progress.submit(hang)
    assert begun.wait(20)
    ending = threading.Thread(target=progress.finish)
    ending.start()
    progress.give_up(lambda: PeerLostError("rank 1 is gone"))
    ending.join(20)
    assert not ending.is_alive()
    with pytest.raises(PeerLostError, match="rank 1 is gone"):
        pending.wait()
    never.set()
