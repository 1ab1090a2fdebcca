"""What ranks record, and what their errors say of who waits where for whom."""

from __future__ import annotations

import gc
import re
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from backends.hierarchical import HierarchicalCommunicator
from backends.ring import RingCommunicator
from backends.thread import ThreadCommunicator, run_threads
from minidist.communicator import Communicator, ReduceOp
from minidist.contract.standing import DONE, FAILED, Call, Standing
from minidist.errors import CommError, CommTimeoutError, MismatchError, PeerLostError
from tests.harness import run_forked

HERE = Path(__file__).name
LIMIT_S = 60.0


def line_of(mark: str) -> str:
    """Return where a comment stands in this file."""
    lines = Path(__file__).read_text().splitlines()
    return f"tests/{HERE}:{next(number for number, line in enumerate(lines, 1) if line.endswith(f'# {mark}'))}"


def without_rank_1(
    call: Callable[[Communicator], object], world_size: int = 2, first: Callable[[Communicator], object] = str
) -> list[str]:
    """Return what the other ranks are told by ``call``, which rank 1 does not come to before all of them were."""
    given_up = [threading.Event() for _ in range(world_size)]

    def job(comm: Communicator) -> str:
        comm.timeout_s = 20.0
        comm.all_reduce(torch.ones(3))
        first(comm)
        comm.timeout_s = 1.0
        if comm.rank == 1:
            comm.recorder.step = 17
            for rank in {*range(world_size)} - {1}:
                assert given_up[rank].wait(LIMIT_S)  # away
            return ""
        try:
            with pytest.raises(CommTimeoutError) as error:
                call(comm)
        finally:
            given_up[comm.rank].set()
        return str(error.value)

    return [text for text in run_threads(job, world_size) if text]


def test_a_timeout_names_the_rank_that_has_not_called_and_its_line() -> None:
    texts = without_rank_1(lambda comm: comm.all_reduce(torch.ones(4)), 3)  # missed
    for rank, text in zip((0, 2), texts, strict=True):
        assert text.startswith(f"[rank {rank}/3] all_reduce: no answer from rank ")
        assert (
            f"rank 1 is in wait of step 17 ({line_of('away')}) and has not called all_reduce #2, which ranks 0 and 2"
            in text
        )
        assert f"wait for at {line_of('missed')} since " in text


def test_an_operation_in_the_background_is_where_it_was_called() -> None:
    def call(comm: Communicator) -> None:
        work = comm.all_reduce(torch.ones(4), async_op=True)  # started
        work.wait()

    (text,) = without_rank_1(call)
    assert f"which rank 0 waits for at {line_of('started')} since" in text


def test_a_job_in_the_background_is_where_it_was_called() -> None:
    def call(comm: Communicator) -> None:
        sizes = [1, 2]
        output = torch.ones(3)
        comm.all_gather(output, torch.ones(1), async_op=True, sizes=sizes).wait()  # uneven

    (text,) = without_rank_1(call)
    assert re.search(rf"has not called broadcast #\d+, which rank 0 waits for at {line_of('uneven')} since", text)


def test_a_message_that_does_not_come() -> None:
    (text,) = without_rank_1(lambda comm: comm.recv(torch.ones(10), 1, tag=7))  # received
    assert f"rank 0 waits in irecv of 10 float32 from rank 1 with tag 7 at {line_of('received')} since" in text
    assert text.endswith(f"; rank 1 is in wait of step 17 ({line_of('away')})")


def test_what_is_made_around_a_transport_has_one_record_with_it() -> None:
    rings: dict[int, Communicator] = {}

    def call(comm: Communicator) -> None:
        rings[comm.rank].all_reduce(torch.ones(4), timeout_s=1.0)  # around

    def made(comm: Communicator) -> None:
        rings[comm.rank] = RingCommunicator(comm)

    (text,) = without_rank_1(call, first=made)
    assert re.search(rf"has not called all_reduce #\d+, which rank 0 waits for at {line_of('around')}", text), text


def test_of_two_levels_the_one_that_has_both_tells() -> None:
    levels: dict[int, Communicator] = {}

    def call(comm: Communicator) -> None:
        levels[comm.rank].all_reduce(torch.ones(4), timeout_s=1.0)  # on two levels

    def made(comm: Communicator) -> None:
        levels[comm.rank] = HierarchicalCommunicator(None, comm, host=str(comm.rank % 2))

    for text in without_rank_1(call, 3, first=made):
        assert text.count(" has not called ") == 1, text
        assert "rank 1 is in wait of step 17" in text
        assert re.search(rf"which ranks? .* wait.* for at {line_of('on two levels')}", text), text


def _told(call: Callable[[], object]) -> str:
    with pytest.raises(CommTimeoutError) as error:
        call()
    return str(error.value)


def test_a_part_of_the_ranks_counts_for_itself() -> None:
    given_up = threading.Event()

    def job(comm: Communicator) -> str:
        comm.barrier()
        part = comm.split(0 if comm.rank != 1 else None)
        if comm.rank == 0:
            assert given_up.wait(LIMIT_S)  # elsewhere
        if part is None or comm.rank == 0:
            return ""
        try:
            return _told(lambda: part.barrier(timeout_s=1.0))
        finally:
            given_up.set()

    text = run_threads(job, 3)[2]
    assert text.startswith("[rank 1/2] barrier: no answer")
    assert f"rank 0 is in wait ({line_of('elsewhere')}) and has not called barrier #1, which rank 1 waits for" in text


def test_a_mismatch_names_both_calls_and_their_lines_once() -> None:
    met = threading.Barrier(2)

    def job(comm: Communicator) -> str:
        def call() -> None:
            if comm.rank == 0:
                comm.all_reduce(torch.ones(3))  # three
            else:
                comm.all_reduce(torch.ones(4))  # four

        with pytest.raises(CommError) as error:
            call()
        met.wait(LIMIT_S)
        assert isinstance(error.value, MismatchError)
        return str(error.value)

    of_0 = f"rank 0 calls all_reduce of 3 float32 with op SUM at {line_of('three')}"
    of_1 = f"rank 1 calls all_reduce of 4 float32 with op SUM at {line_of('four')}"
    for rank, text in enumerate(run_threads(job, 2, timeout_s=20)):
        said = f"[rank {rank}/2] all_reduce: {of_0}; {of_1}; every rank has to call the same as its collective #1"
        assert text == said


def test_a_rank_that_raised_is_named_with_its_line() -> None:
    def job(comm: Communicator) -> None:
        comm.barrier()
        comm.recorder.step = 3
        if comm.rank == 1:
            raise ValueError("boom")  # raised
        comm.barrier()  # needed

    texts: list[str] = []

    def both(comm: Communicator) -> None:
        with comm:
            try:
                job(comm)
            except PeerLostError as error:
                texts.append(str(error))

    with pytest.raises(ValueError, match="boom"):
        run_threads(both, 2, timeout_s=20)
    where = f"at {line_of('raised')} in step 3, after barrier #1"
    own = f"rank 0 calls barrier at {line_of('needed')}"
    assert texts == [f"[rank 0/2] barrier: rank 1 is gone: ValueError: boom {where}; {own}"]


@pytest.mark.parametrize("operation", ["all_reduce", "isend"])
def test_a_rank_that_hears_of_a_loss_before_its_next_call_is_told_the_line_of_that(operation: str) -> None:
    gone = threading.Event()

    def job(comm: Communicator) -> str:
        if comm.rank == 1:
            comm.abort("no more data")
            gone.set()
            return ""
        assert gone.wait(LIMIT_S)
        with pytest.raises(PeerLostError) as error:
            comm.all_reduce(torch.ones(3)) if operation == "all_reduce" else comm.isend(torch.ones(3), 1)  # too late
        refused = comm.recorder.standing().calls[-1]
        assert (refused.number, refused.state, refused.where) == (None, FAILED, line_of("too late"))
        return str(error.value)

    told = f"[rank 0/2] {operation}: rank 1 is gone: no more data; rank 0 calls {operation} at {line_of('too late')}"
    assert run_threads(job, 2, timeout_s=20) == [told, ""]


def test_a_message_that_does_not_come_is_named_with_its_line() -> None:
    def job(comm: Communicator) -> str:
        if comm.rank == 1:
            return ""
        with pytest.raises(PeerLostError) as error:
            comm.irecv(torch.ones(3), 1, tag=7).wait()  # message
        return str(error.value)

    text = run_threads(job, 2, timeout_s=20)[0]
    assert text.endswith(f"; rank 0 calls irecv of 3 float32 from rank 1 with tag 7 at {line_of('message')}")


def test_the_second_of_two_threads_is_told_of_the_first_and_so_are_the_other_ranks() -> None:
    def reduce(comm: Communicator) -> None:
        with pytest.raises(CommError):
            comm.all_reduce(torch.ones(3))  # first thread

    def job(comm: Communicator) -> str:
        if comm.rank == 1:
            thread = threading.Thread(target=reduce, args=(comm,))
            thread.start()
            while comm.recorder.waits_in is None:
                time.sleep(1e-3)
        with pytest.raises(CommError) as error:
            comm.recv(torch.ones(1), 1) if comm.rank == 0 else comm.barrier()  # second thread
        if comm.rank == 1:
            comm.abort(str(error.value))
            thread.join(LIMIT_S)
        return str(error.value)

    first = f"rank 1 is in all_reduce of 3 float32 with op SUM at {line_of('first thread')} in another thread"
    texts = run_threads(job, 2, timeout_s=20)
    assert all(first in text for text in texts), texts
    assert texts[1].endswith(f"; rank 1 calls barrier at {line_of('second thread')}")


# What is kept ----------------------------------------------------------------------------------


def standing(comm: Communicator, num_calls: int = 300) -> Standing:
    return comm.recorder.standing(num_calls)


def test_calls_are_told_in_their_order_with_what_has_to_be_alike() -> None:
    with ThreadCommunicator() as comm:
        data = torch.ones(2, 3)
        comm.all_reduce(data, ReduceOp.AVG)  # first
        comm.broadcast(torch.ones(4, dtype=torch.int64), 0)
        comm.all_gather(torch.empty(6), torch.ones(6))
        comm.barrier()
        comm.all_reduce(torch.ones(0))
        told = standing(comm)
    assert [(call.number, call.what, call.state) for call in told.calls] == [
        (1, "all_reduce of 6 float32 with op AVG", DONE),
        (2, "broadcast of 4 int64 with root 0", DONE),
        (3, "all_gather of 6 float32", DONE),
        (4, "barrier", DONE),
        (None, "all_reduce of 0 float32 with op SUM", DONE),
    ]
    assert told.num_started == 4
    assert told.calls[0].where == line_of("first")
    assert all(call.took is not None and 0 <= call.took <= call.seconds for call in told.calls[:4])


def test_the_last_256_are_kept_and_no_more() -> None:
    with ThreadCommunicator() as comm:
        for _ in range(1000):
            comm.barrier()
        numbers = [call.number for call in standing(comm, 1000).calls]
    assert numbers == list(range(745, 1001))


def test_nothing_of_the_users_is_kept_alive() -> None:
    class Held:
        pass

    def call(comm: Communicator) -> list[weakref.ref[object]]:
        held, tensor = Held(), torch.ones(3)
        comm.all_reduce(tensor)
        return [weakref.ref(held), weakref.ref(tensor)]

    with ThreadCommunicator() as comm:
        dead = call(comm)
        gc.collect()
        assert [one() for one in dead] == [None, None]


def test_it_is_asked_while_another_thread_calls() -> None:
    with ThreadCommunicator() as comm:
        stop = threading.Event()
        seen: list[tuple[Call, ...]] = []
        asks = threading.Thread(target=lambda: [seen.append(standing(comm).calls) for _ in range(50)] and stop.set())
        asks.start()
        while not stop.is_set():
            comm.barrier()
        asks.join()
    for calls in seen:
        numbers = [call.number for call in calls if call.number is not None]
        assert numbers == sorted(numbers)


# Processes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind",
    [
        "ring/gloo",
        pytest.param("gloo", marks=pytest.mark.slow),
        pytest.param("shm", marks=pytest.mark.slow),
        pytest.param("hierarchical", marks=pytest.mark.slow),
    ],
)
def test_processes_are_asked_while_they_hang(kind: str, tmp_path: Path) -> None:
    """One hangs outside of communication, one is stopped; rank 1 is in neither."""
    returncode, output = run_forked(
        "tests.recorder_ranks", kind, world_size=3, output=tmp_path / "output.txt", limit_s=LIMIT_S
    )
    assert returncode == 0, output
    told = re.findall(r"rank (\d) \w+ after (.*) s: (.*)", output)
    assert len(told) == 4, output
    lines = (Path(__file__).parent / "recorder_ranks.py").read_text().splitlines()
    away, missed = (
        next(n for n, line in enumerate(lines, 1) if line.endswith(f"# {mark}")) for mark in ("away", "missed")
    )
    for rank, seconds, text in told[:2]:
        assert re.search(
            rf"rank 1 is in step 17 \(tests/recorder_ranks.py:{away}\) and has not called all_reduce #\d+, which ranks "
            rf"0 and 2 wait for at tests/recorder_ranks.py:{missed} since",
            text,
        ), f"rank {rank}: {text}"
        assert float(seconds) < 2 + 2 + 10
    for rank, _, text in told[2:]:
        assert "rank 1 does not answer: it is stopped, or its host is out of reach" in text, f"rank {rank}: {text}"
