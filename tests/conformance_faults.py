"""What every communicator must do when something goes wrong: an error on every rank, and never a hang.

Every check has a communicator of its own; ``meet()`` joins the ranks without it. See conformance.py.
"""

from __future__ import annotations

import gc
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import pytest
import torch
from torch import Tensor

from minidist.communicator import Communicator
from minidist.errors import CommClosedError, CommError, CommTimeoutError, MismatchError, PeerLostError
from tests.inputs import assert_same, needs, tensor

Meet = Callable[[], None]
LIMIT_S = 20.0
"""Within this time every rank has to know."""


@contextmanager
def expected(kind: type[CommError], *words: str) -> Iterator[list[CommError]]:
    """Expect an error of ``kind`` with ``words`` in its message, within LIMIT_S; it is added to the list."""
    errors: list[CommError] = []
    started = time.monotonic()
    try:
        yield errors
    except kind as error:
        errors.append(error)
    seconds = time.monotonic() - started
    assert errors, f"no {kind.__name__} was raised"
    missing = [word for word in words if word not in str(errors[0])]
    assert not missing, f"{type(errors[0]).__name__} without {missing}: {errors[0]}"
    assert seconds < LIMIT_S, f"it took {seconds:.1f} s: {errors[0]}"


@needs(fresh=True)
def check_close_and_use_after_it(comm: Communicator, meet: Meet) -> None:
    work = comm.all_reduce(torch.ones(1000), async_op=True)
    comm.close()
    work.wait()
    comm.close()
    with expected(CommClosedError, "all_reduce", f"[rank {comm.rank}/", "closed"):
        comm.all_reduce(torch.ones(1))
    with expected(CommClosedError, "isend" if comm.world_size > 1 else "barrier"):
        comm.isend(torch.ones(1), (comm.rank + 1) % comm.world_size) if comm.world_size > 1 else comm.barrier()


@needs(fresh=True)
def check_abort_and_use_after_it(comm: Communicator, meet: Meet) -> None:
    meet()
    comm.abort("enough")
    comm.abort("again")
    comm.close()
    with expected(CommClosedError, "barrier", "enough"):
        comm.barrier()


@needs(fresh=True)
def check_context_manager_closes(comm: Communicator, meet: Meet) -> None:
    with comm as entered:
        assert entered is comm
        comm.barrier()
    with expected(CommClosedError, "barrier"):
        comm.barrier()


@needs(fresh=True, ranks=2)
def check_close_waits_for_what_is_received(comm: Communicator, meet: Meet) -> None:
    if comm.rank == 0:
        comm.isend(torch.arange(2.0**20), 1)
    if comm.rank == 1:
        data = torch.empty(2**20)
        comm.recv(data, 0)
        assert torch.equal(data, torch.arange(2.0**20))
    comm.close()


@needs(fresh=True, ranks=2)
def check_close_names_what_nobody_receives(comm: Communicator, meet: Meet) -> None:
    """A transport that keeps a message itself is done with it at once, and has nothing to name."""
    comm.timeout_s = 1.0
    if comm.rank == 0 and not comm.isend(torch.ones(2**20), 1, 7).is_done():
        with pytest.warns(UserWarning, match=r"close: not received within 1 s.* 1048576 float32 to rank 1 with tag 7"):
            comm.close()
    meet()
    comm.close()


@needs(fresh=True, ranks=3)
def check_close_waits_for_no_leaving_rank(comm: Communicator, meet: Meet) -> None:
    """Rank 1 leaves without what rank 0 has sent it; rank 2, which needs neither, hears no alarm."""
    sent = comm.rank == 0 and not comm.isend(torch.ones(2**20), 1, 7).is_done()
    meet()
    if comm.rank == 1:
        comm.close()
    meet()
    if comm.rank == 0:
        started = time.monotonic()
        with pytest.warns(UserWarning, match="not received") if sent else nullcontext():
            comm.close()
        assert time.monotonic() - started < LIMIT_S
    meet()
    if comm.rank > 1:
        for _ in range(50):  # an alarm may take a moment
            comm.ensure_usable("send")
            time.sleep(0.01)
    meet()


# A fork of a rank ------------------------------------------------------------------------------


@needs(fresh=True)
def check_a_fork_leaves_what_it_inherits_alone(comm: Communicator, meet: Meet) -> None:
    """To use it there is an error; to end, close or drop it there changes nothing for anybody."""
    held = [comm.empty(1000).fill_(1)]
    comm.all_reduce(held[0], async_op=True).wait()
    works = [comm.barrier(async_op=True)] if comm.rank > 0 else []  # it waits for rank 0, whose fork it does not

    def use_and_leave() -> None:
        operations = [comm.barrier, lambda: comm.all_reduce(torch.ones(3), async_op=True), *(w.wait for w in works)]
        if comm.world_size > 1:
            operations += [lambda: comm.isend(torch.ones(1), 1 - min(comm.rank, 1)), lambda: comm.split(0)]
        for operation in operations:
            with expected(CommError, f"[rank {comm.rank}/", "was forked from"):
                operation()
        assert all(work.is_done() for work in works), "polling never ends"
        comm.abort("a fork fails")
        comm.close()
        held.clear()
        gc.collect()

    ended = in_a_fork(use_and_leave)
    assert ended == 0, f"the fork ended with {ended}"
    meet()  # or the barrier of rank 0 would end those that other forks are to find unfinished
    if comm.rank == 0:
        works = [comm.barrier(async_op=True)]
    works[0].wait()
    comm.all_reduce(held[0])
    assert held[0].tolist() == [comm.world_size**2] * 1000


def in_a_fork(act: Callable[[], None]) -> int:
    """Return how a fork ended in which ``act`` runs; it is killed after LIMIT_S."""
    pid = os.fork()
    if pid == 0:
        try:
            act()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    until = time.monotonic() + LIMIT_S
    while (ended := os.waitpid(pid, os.WNOHANG)) == (0, 0):
        if time.monotonic() > until:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
    return os.waitstatus_to_exitcode(ended[1])


# A rank that does not come --------------------------------------------------------------------


@needs(fresh=True, ranks=2)
def check_timeout_of_all_reduce_names_it(comm: Communicator, meet: Meet) -> None:
    _others_time_out(comm, meet, "all_reduce", lambda: comm.all_reduce(torch.ones(1000), timeout_s=0.5))


@needs(fresh=True, ranks=2)
def check_timeout_of_an_async_operation_is_raised_by_wait(comm: Communicator, meet: Meet) -> None:
    def all_reduce() -> None:
        work = comm.all_reduce(torch.ones(1000), async_op=True, timeout_s=0.5)
        try:
            work.wait()
        finally:
            assert work.is_done()
            assert isinstance(work.exception(), CommTimeoutError)

    _others_time_out(comm, meet, "all_reduce", all_reduce)


@needs(fresh=True, ranks=2)
def check_timeout_of_barrier_names_it(comm: Communicator, meet: Meet) -> None:
    _others_time_out(comm, meet, "barrier", lambda: comm.barrier(timeout_s=0.5))


@needs(fresh=True, ranks=2)
def check_timeout_of_broadcast_names_it(comm: Communicator, meet: Meet) -> None:
    _others_time_out(comm, meet, "broadcast", lambda: comm.broadcast(torch.ones(1000), 0, timeout_s=0.5))


@needs(fresh=True, ranks=2)
def check_timeout_of_recv_names_it(comm: Communicator, meet: Meet) -> None:
    _others_time_out(comm, meet, "irecv", lambda: comm.recv(torch.ones(10), 0, timeout_s=0.5))


@needs(fresh=True, ranks=2)
def check_what_was_queued_behind_a_timeout_does_not_run(comm: Communicator, meet: Meet) -> None:
    """Out of step with the ranks that took no part in the first one, it would meet the wrong operation."""

    def both() -> None:
        first = comm.all_reduce(torch.ones(1000), async_op=True, timeout_s=0.5)
        second = comm.barrier(async_op=True)
        try:
            first.wait()
        finally:
            with expected(CommTimeoutError, "barrier", "unusable since"):
                second.wait()

    _others_time_out(comm, meet, "all_reduce", both)


@needs(fresh=True, ranks=2)
def check_polling_ends_when_the_sender_has_failed(comm: Communicator, meet: Meet) -> None:
    work = None if comm.rank == 1 else comm.irecv(torch.ones(10), 1)
    meet()
    if work is None:
        comm.abort("ValueError: boom")
        return
    until = time.monotonic() + LIMIT_S
    while not work.is_done():
        assert time.monotonic() < until, "is_done() does not say that wait() would raise"
        time.sleep(0.01)
    with expected(PeerLostError, "rank 1", "boom") as errors:
        work.wait()
    assert work.exception() is errors[0]


def _others_time_out(comm: Communicator, meet: Meet, operation: str, run: Callable[[], object]) -> None:
    """Rank 0 stays away until everybody else has given up."""
    if comm.rank > 0:
        if comm.world_size == 2 or operation != "broadcast" or comm.rank in (1, 2):
            with expected(CommTimeoutError, operation, f"[rank {comm.rank}/"):
                run()
        else:  # a rank further down the tree of a broadcast times out as well, or hears of it
            with expected(CommError, operation):
                run()
        with expected(CommError, "barrier", "unusable"):
            comm.barrier()
    meet()


# A message of another kind --------------------------------------------------------------------


def _message_is_refused(comm: Communicator, meet: Meet, sent: Tensor, target: Tensor, *before: int) -> None:
    """Rank 0 sends ``sent``, which rank 1 receives into ``target``, after right ones with the tags ``before``."""
    right = [tensor(0, 700 * (1 + i), salt=i) for i in range(len(before))]
    if comm.rank == 0:
        works = [comm.isend(data, 1, tag) for data, tag in zip(right, before, strict=True)]
        works.append(comm.isend(sent, 1, 3))
        meet()
        for work in works[:-1]:
            work.wait()
    if comm.rank == 1:
        received = [torch.zeros_like(data) for data in right]
        works = [comm.irecv(data, 0, tag) for data, tag in zip(received, before, strict=True)]
        works.append(comm.irecv(target, 0, 3, timeout_s=30))
        meet()
        for work, data, wanted in zip(works, received, right, strict=False):
            work.wait()
            assert_same(data, wanted, "a message before the wrong one")
        theirs = f"rank 0 sends {sent.numel()} elements of {str(sent.dtype).removeprefix('torch.')}, "
        mine = f"this rank receives {target.numel()} of {str(target.dtype).removeprefix('torch.')};"
        with expected(MismatchError, f"[rank 1/{comm.world_size}] irecv: ", theirs + mine) as errors:
            works[-1].wait()
        assert works[-1].is_done()
        assert works[-1].exception() is errors[0]
    if comm.rank > 1:
        meet()
    meet()


@needs(fresh=True, ranks=2)
def check_message_of_less_is_refused(comm: Communicator, meet: Meet) -> None:
    _message_is_refused(comm, meet, torch.ones(50), torch.zeros(100))


@needs(fresh=True, ranks=2)
def check_message_of_more_is_refused(comm: Communicator, meet: Meet) -> None:
    _message_is_refused(comm, meet, torch.ones(100), torch.zeros(50))


@needs(fresh=True, ranks=2)
def check_large_message_of_less_is_refused(comm: Communicator, meet: Meet) -> None:
    _message_is_refused(comm, meet, torch.ones(300_000), torch.zeros(500_000))


@needs(fresh=True, ranks=2)
def check_large_message_of_more_is_refused(comm: Communicator, meet: Meet) -> None:
    _message_is_refused(comm, meet, torch.ones(500_001), torch.zeros(300_000))


@needs(fresh=True, ranks=2)
def check_large_message_for_a_small_receive_is_refused(comm: Communicator, meet: Meet) -> None:
    _message_is_refused(comm, meet, torch.ones(500_001), torch.zeros(3))


@needs(fresh=True, ranks=2)
def check_small_message_for_a_large_receive_is_refused(comm: Communicator, meet: Meet) -> None:
    _message_is_refused(comm, meet, torch.ones(3), torch.zeros(500_001))


@needs(fresh=True, ranks=2)
def check_message_of_another_dtype_is_refused(comm: Communicator, meet: Meet) -> None:
    _message_is_refused(comm, meet, torch.ones(100), torch.zeros(100, dtype=torch.int32))


@needs(fresh=True, ranks=2)
def check_large_message_of_another_dtype_is_refused(comm: Communicator, meet: Meet) -> None:
    _message_is_refused(comm, meet, torch.ones(300_000, dtype=torch.float64), torch.zeros(600_000))


@needs(fresh=True, ranks=2)
def check_message_of_nothing_is_refused(comm: Communicator, meet: Meet) -> None:
    _message_is_refused(comm, meet, torch.ones(0), torch.zeros(100))


@needs(fresh=True, ranks=2)
def check_message_for_nothing_is_refused(comm: Communicator, meet: Meet) -> None:
    _message_is_refused(comm, meet, torch.ones(100), torch.zeros(0))


@needs(fresh=True, ranks=2)
def check_wrong_message_behind_others_is_refused(comm: Communicator, meet: Meet) -> None:
    _message_is_refused(comm, meet, torch.ones(50), torch.zeros(100), 3, 7, 3)


@needs(fresh=True, ranks=2)
def check_wrong_message_is_seen_by_polling(comm: Communicator, meet: Meet) -> None:
    sent = comm.isend(torch.ones(50), 1) if comm.rank == 0 else None
    meet()
    if comm.rank == 1:
        work, until = comm.irecv(torch.zeros(100), 0), time.monotonic() + LIMIT_S
        while not work.is_done():
            assert time.monotonic() < until, "is_done() does not say that wait() would raise"
            time.sleep(0.01)
        assert isinstance(work.exception(), MismatchError)
        with expected(MismatchError, "rank 0 sends 50"):
            work.wait()
    meet()
    del sent


# A rank that is gone --------------------------------------------------------------------------


@needs(fresh=True, ranks=2)
def check_raising_rank_is_named(comm: Communicator, meet: Meet) -> None:
    victim = comm.world_size - 1
    comm.barrier()
    meet()  # a barrier that is over here may be going on elsewhere
    if comm.rank == victim:
        try:
            with comm:
                raise KeyError("no such thing")
        except KeyError:
            pass
    else:
        with expected(PeerLostError, f"rank {victim}", "no such thing") as errors:
            _until_it_fails(comm)
        assert victim in errors[0].peers, f"peers {errors[0].peers}: {errors[0]}"
    meet()


@needs(fresh=True, ranks=2)
def check_raising_rank_ends_async_operations(comm: Communicator, meet: Meet) -> None:
    comm.barrier()
    meet()
    if comm.rank == 0:
        meet()
        comm.abort("out of memory")
    else:
        works = [comm.all_reduce(torch.ones(100000), async_op=True) for _ in range(3)]
        meet()
        with expected(PeerLostError, "rank 0", "out of memory") as errors:
            works[0].wait()
        assert 0 in errors[0].peers, f"peers {errors[0].peers}: {errors[0]}"
        for work in works[1:]:
            with expected(CommError):
                work.wait()
    meet()


@needs(fresh=True, ranks=2)
def check_leaving_rank_is_named(comm: Communicator, meet: Meet) -> None:
    comm.barrier()
    meet()
    if comm.rank == 0:
        comm.close()
    else:
        with expected(PeerLostError, "rank 0"):
            _until_it_fails(comm)
    meet()


@needs(fresh=True, ranks=3)
def check_leaving_rank_that_is_waited_for_is_named(comm: Communicator, meet: Meet) -> None:
    """Rank 1 waits for the second one to leave, not for the first."""
    last = comm.world_size - 1
    comm.barrier()
    works = [comm.irecv(torch.ones(10), last)] if comm.rank == 1 else []
    meet()
    if comm.rank == 0:
        comm.close()
    meet()
    if comm.rank == last:
        comm.close()
    for work in works:
        with expected(PeerLostError, f"rank {last} is gone") as errors:
            work.wait()
        assert errors[0].peers == (last,), f"peers {errors[0].peers}: {errors[0]}"
    meet()


@needs(fresh=True, ranks=2)
def check_abort_ends_own_pending_operation(comm: Communicator, meet: Meet) -> None:
    """A rank that gives up, from its main thread, gets its waiting operation back."""
    comm.barrier()
    meet()
    if comm.rank == 0:
        work = comm.all_reduce(torch.ones(1000), async_op=True)
        comm.abort("changed my mind")
        with expected(CommError, "all_reduce"):
            work.wait()
    meet()


@needs(own_world=True, ranks=2)
def check_killed_rank_is_named(comm: Communicator, meet: Meet) -> None:
    _victim_ends(comm, lambda: os.kill(os.getpid(), signal.SIGKILL))


@needs(own_world=True, ranks=2)
def check_exiting_rank_is_named(comm: Communicator, meet: Meet) -> None:
    _victim_ends(comm, lambda: os._exit(0))


def _victim_ends(comm: Communicator, end: Callable[[], object]) -> None:
    comm.all_reduce(torch.ones(10))
    if comm.rank == 1:
        comm.all_reduce(torch.ones(2**20), async_op=True)  # in the middle of a collective
        end()
    with expected(PeerLostError, "rank 1") as errors:
        _until_it_fails(comm)
    assert 1 in errors[0].peers, f"peers {errors[0].peers}: {errors[0]}"


def _until_it_fails(comm: Communicator) -> None:
    """Run all-reduces, and leave as training would: telling the others why."""
    try:
        for _ in range(10):
            comm.all_reduce(torch.ones(2**20), timeout_s=30.0)
    except CommError as error:
        comm.abort(str(error))
        raise
