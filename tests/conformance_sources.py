"""What every communicator must do with a receive that leaves open whom it comes from; see conformance.py.

Where it cannot, it has to say so, and each of these checks sees to that.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from minidist.communicator import Communicator, Work
from minidist.errors import CommError, CommTimeoutError, MismatchError, PeerLostError
from tests.conformance_faults import LIMIT_S, Meet, expected
from tests.inputs import assert_same, needs, tensor

NUMELS = (1, 1000, 2**20)


def where_it_can(check: Callable[..., None]) -> Callable[..., None]:
    """Run a check, apart from all others, whose messages it could receive; or see that no source can be left open."""

    @functools.wraps(check)
    def run(comm: Communicator, *meet: Meet) -> None:
        if not comm.receives_from_any:
            _ensure_refused(comm)
            return
        comm.barrier()
        check(comm, *meet)
        if not meet:
            comm.barrier()

    return run


def _ensure_refused(comm: Communicator) -> None:
    """That is said before anything is posted, and the communicator goes on."""
    for start in (comm.recv, comm.irecv):
        with pytest.raises(ValueError, match=r"src is None, but .* cannot receive from any source; name the rank"):
            start(torch.zeros(3), None)
    comm.barrier()


def _others(comm: Communicator) -> list[int]:
    return [rank for rank in range(comm.world_size) if rank != comm.rank]


def _send(comm: Communicator, numel: int, tag: int, num_messages: int = 1) -> list[Work]:
    """Start to send to every other rank; the k-th message to each has the salt k."""
    return [
        comm.isend(tensor(comm.rank, numel, salt=salt), rank, tag)
        for salt in range(num_messages)
        for rank in _others(comm)
    ]


def _wait(works: list[Work]) -> None:
    for work in works:
        work.wait()


def _peer(work: Work) -> int:
    assert work.peer is not None, "a message that has come has come from somebody"
    return work.peer


@needs(ranks=2)
@where_it_can
def check_any_source_of_messages_of_all_sizes(comm: Communicator) -> None:
    for tag, numel in enumerate(NUMELS):
        sends = _send(comm, numel, tag)
        assert [work.peer for work in sends] == _others(comm)
        sources = []
        for _ in _others(comm):
            data = torch.zeros(numel)
            source = comm.recv(data, None, tag)
            assert_same(data, tensor(source, numel), "from any source, in fact", source)
            sources.append(source)
        assert sorted(sources) == _others(comm)
        _wait(sends)


@needs(ranks=2)
@where_it_can
def check_any_source_keeps_the_order_of_each(comm: Communicator) -> None:
    for tag, numel in enumerate(NUMELS):
        sends = _send(comm, numel, tag, num_messages=4)
        seen: Counter[int] = Counter()
        for _ in sends:
            data = torch.zeros(numel)
            source = comm.recv(data, None, tag)
            assert_same(data, tensor(source, numel, salt=seen[source]), "message", seen[source], "from", source)
            seen[source] += 1
        assert seen == dict.fromkeys(_others(comm), 4)
        _wait(sends)


@needs(ranks=2)
@where_it_can
def check_any_source_of_ranks_that_come_one_by_one(comm: Communicator) -> None:
    """Each rank but the first answers when its predecessor's message has come, the last rank first."""
    for numel in NUMELS:
        if comm.rank == 0:
            for rank in reversed(_others(comm)):
                comm.send(torch.zeros(1), rank, tag=1)
                data = torch.zeros(numel)
                assert comm.recv(data, None, tag=2) == rank
                assert_same(data, tensor(rank, numel), "from", rank)
        else:
            assert comm.recv(torch.zeros(1), None, tag=1) == 0
            comm.send(tensor(comm.rank, numel), 0, tag=2)


@needs(ranks=2)
@where_it_can
def check_any_source_of_many_outstanding_receives(comm: Communicator) -> None:
    """All are posted at once, before or after the messages, and waited for backwards."""
    for number, numel in enumerate(NUMELS):
        for receives_first in (True, False):
            tag = 2 * number + receives_first
            sends = [] if receives_first else _send(comm, numel, tag, num_messages=2)
            received = [torch.zeros(numel) for _ in range(2 * len(_others(comm)))]
            works = [comm.irecv(data, None, tag) for data in received]
            sends = sends or _send(comm, numel, tag, num_messages=2)
            _wait([*reversed(works), *sends])
            seen: Counter[int] = Counter()
            for data, source in zip(received, map(_peer, works), strict=True):
                assert_same(data, tensor(source, numel, salt=seen[source]), "message", seen[source], "from", source)
                seen[source] += 1
            assert seen == dict.fromkeys(_others(comm), 2)


@needs(ranks=2)
@where_it_can
def check_any_source_beside_receives_that_name_theirs(comm: Communicator) -> None:
    prev_rank, next_rank = (comm.rank - 1) % comm.world_size, (comm.rank + 1) % comm.world_size
    for numel in NUMELS:
        named, other, any_source = torch.zeros(numel), torch.zeros(7), torch.zeros(numel)
        works = [comm.irecv(any_source, None, 3), comm.irecv(named, prev_rank, 5), comm.irecv(other, None, 4)]
        sends = [
            comm.isend(tensor(comm.rank, 7, salt=4), next_rank, 4),
            comm.isend(tensor(comm.rank, numel, salt=5), next_rank, 5),
            comm.isend(tensor(comm.rank, numel, salt=3), next_rank, 3),
        ]
        _wait([*reversed(works), *sends])
        assert [work.peer for work in works] == [prev_rank] * 3
        for data, salt in ((any_source, 3), (named, 5), (other, 4)):
            assert_same(data, tensor(prev_rank, data.numel(), salt=salt), "with tag", salt)


@needs(ranks=2)
@where_it_can
def check_any_source_and_a_named_one_with_one_tag(comm: Communicator) -> None:
    """Which of two messages goes to which receive is open; that each goes to one, as a whole, is not."""
    prev_rank, next_rank = (comm.rank - 1) % comm.world_size, (comm.rank + 1) % comm.world_size
    for numel in NUMELS:
        for sources in ((None, prev_rank, prev_rank), (prev_rank, None, prev_rank), (prev_rank, prev_rank, None)):
            received = [torch.zeros(numel) for _ in sources]
            works = [comm.irecv(data, source) for data, source in zip(received, sources, strict=True)]
            assert [work.peer for work in works if work.peer != prev_rank] == [None]
            sends = [comm.isend(tensor(comm.rank, numel, salt=salt), next_rank) for salt in range(3)]
            _wait([*reversed(works), *sends])
            assert [work.peer for work in works] == [prev_rank] * 3
            found = [_salt_of(data, prev_rank) for data in received]
            assert sorted(found) == [0, 1, 2], found


def _salt_of(data: Tensor, source: int) -> int:
    """Return which message of ``source`` it is."""
    (salt,) = (salt for salt in range(3) if torch.equal(data, tensor(source, data.numel(), salt=salt)))
    return salt


@needs(ranks=2)
@where_it_can
def check_any_source_into_layouts_and_dtypes(comm: Communicator) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.uint16):
        memory = torch.zeros(30, 20, dtype=dtype)
        works = [comm.irecv(memory.t()[::2], None)]
        sends = [comm.isend(tensor(comm.rank, 300, torch.uint8).to(dtype), (comm.rank + 1) % comm.world_size)]
        _wait([*works, *sends])
        sent = tensor(_peer(works[0]), 300, torch.uint8).to(dtype)
        assert_same(memory.t()[::2].float(), sent.float(), "into a strided, transposed view")
        assert not memory.t()[1::2].float().any()


@needs(ranks=2)
@where_it_can
def check_any_source_of_messages_that_are_polled(comm: Communicator) -> None:
    """Whoever asks is_done() often enough, and never waits, sees every message end."""
    numels = (0, 513, 70_001)
    received = {tag: [torch.zeros(numel) for _ in _others(comm)] for tag, numel in enumerate(numels)}
    works = [comm.irecv(data, None, tag) for tag, several in received.items() for data in several]
    sends = [work for tag, numel in enumerate(numels) for work in _send(comm, numel, tag)]
    until = time.monotonic() + LIMIT_S
    while not all(work.is_done() for work in [*works, *sends]):
        assert time.monotonic() < until, f"is_done() of each: {[work.is_done() for work in works]}"
    _wait([*works, *sends])
    for data, work in zip((data for several in received.values() for data in several), works, strict=True):
        assert work.exception() is None
        assert_same(data, tensor(_peer(work), data.numel()), "polled, from", work.peer)


def _message_is_refused(comm: Communicator, meet: Meet, sent: Tensor, target: Tensor) -> None:
    """The last rank sends ``sent``, which rank 0 receives into ``target``."""
    last = comm.world_size - 1
    send = comm.isend(sent, 0) if comm.rank == last else None
    if comm.rank == 0:
        words = f"rank {last} sends {sent.numel()} elements of ", f"this rank receives {target.numel()} of "
        work = comm.irecv(target, None)
        with expected(MismatchError, f"[rank 0/{comm.world_size}] irecv: ", *words) as errors:
            work.wait()
        assert work.is_done()
        assert work.exception() is errors[0]
    meet()
    del send


@needs(fresh=True, ranks=2)
@where_it_can
def check_any_source_of_less_is_refused(comm: Communicator, meet: Meet) -> None:
    _message_is_refused(comm, meet, torch.ones(50), torch.zeros(100))


@needs(fresh=True, ranks=2)
@where_it_can
def check_any_source_of_large_messages_of_more_is_refused(comm: Communicator, meet: Meet) -> None:
    _message_is_refused(comm, meet, torch.ones(500_001), torch.zeros(300_000))


@needs(fresh=True, ranks=2)
@where_it_can
def check_any_source_of_another_dtype_is_refused(comm: Communicator, meet: Meet) -> None:
    _message_is_refused(comm, meet, torch.ones(300_000), torch.zeros(300_000, dtype=torch.int32))


@needs(fresh=True, ranks=2)
@where_it_can
def check_any_source_of_a_wrong_message_spoils_none_behind_it(comm: Communicator, meet: Meet) -> None:
    """Who waits for a right one behind the wrong one gets it or hears of that, and no pieces of another message."""
    if comm.rank == 1:
        works = [comm.isend(torch.ones(500_001), 0), comm.isend(torch.ones(300_000), 0)]
        with contextlib.suppress(CommError):  # it is received, or its receiver fails
            works[1].wait()
    if comm.rank == 0:
        data = torch.zeros(300_000)
        first, second = comm.irecv(torch.zeros(300_000), None), comm.irecv(data, None)
        with contextlib.suppress(MismatchError):
            second.wait()
            assert_same(data, torch.ones(300_000), "behind a wrong message")
        with expected(MismatchError, "rank 1 sends 500001 elements"):
            first.wait()
        comm.abort("it got a wrong message")
    meet()


@needs(fresh=True, ranks=2)
@where_it_can
def check_any_source_times_out(comm: Communicator, meet: Meet) -> None:
    if comm.rank == 0:
        with expected(CommTimeoutError, f"[rank 0/{comm.world_size}] irecv: no message from any rank within", "0.5 s"):
            comm.recv(torch.zeros(10), None, timeout_s=0.5)
    meet()


@needs(fresh=True, ranks=2)
@where_it_can
def check_any_source_within_its_own_time_behind_one_with_more(comm: Communicator, meet: Meet) -> None:
    if comm.rank == 0:
        patient = comm.irecv(torch.zeros(300_000), None)
        with expected(CommTimeoutError, "within the timeout of 0.5 s"):
            comm.recv(torch.zeros(300_000), 1, timeout_s=0.5)
        del patient
    meet()


@needs(fresh=True, ranks=2)
@where_it_can
def check_any_source_is_hopeless_when_a_rank_has_failed(comm: Communicator, meet: Meet) -> None:
    victim = comm.world_size - 1
    work = None if comm.rank == victim else comm.irecv(torch.zeros(10), None)
    meet()
    if work is None:
        comm.abort("ValueError: boom")
    else:
        with expected(PeerLostError, f"rank {victim}", "boom") as errors:
            work.wait()
        assert errors[0].peers == (victim,), f"peers {errors[0].peers}: {errors[0]}"
    meet()


@needs(fresh=True, ranks=2)
@where_it_can
def check_any_source_is_hopeless_when_all_others_have_left(comm: Communicator, meet: Meet) -> None:
    """Not before: the last one that stays still may send, and does."""
    last = comm.world_size - 1
    comm.barrier()
    work = comm.irecv(torch.zeros(10), None) if comm.rank == 0 else None
    meet()
    if 0 < comm.rank < last:
        comm.close()
    meet()
    if comm.rank == last:
        comm.send(torch.zeros(10), 0)
        comm.close()
    if work is not None:
        work.wait()
        assert work.peer == last
        with expected(PeerLostError, "is gone: it left the group while it was needed") as errors:
            comm.recv(torch.zeros(10), None)
        assert set(errors[0].peers) <= set(range(1, comm.world_size))
    meet()
