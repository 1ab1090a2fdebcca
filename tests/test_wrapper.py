"""One communicator around another: what it changes, and what it leaves to the other one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch

from backends.ring import RingCommunicator
from backends.thread import ThreadCommunicator, spawn_threads
from backends.wrapper import Wrapper
from minidist.communicator import Communicator, ReduceOp, Work
from minidist.errors import CommClosedError, PeerLostError


class Counting(Wrapper):
    """Counts what runs through it."""

    def __init__(self, inner: Communicator) -> None:
        super().__init__(inner)
        self.calls: Counter[str] = Counter()

    def _collective(self, name: str) -> Callable[..., None]:
        run = super()._collective(name)

        def counted(*args: object) -> None:
            self.calls[name] += 1
            run(*args)

        return counted

    def _isend(self, tensor: torch.Tensor, dst: int, tag: int, timeout_s: float) -> Work:
        self.calls["isend"] += 1
        return super()._isend(tensor, dst, tag, timeout_s)


NESTS: dict[str, Callable[[Communicator], Communicator]] = {
    "around a transport": Counting,
    "around an algorithm": lambda comm: Counting(RingCommunicator(comm)),
    "around a wrapper": lambda comm: Counting(Counting(comm)),
    "beneath an algorithm": lambda comm: RingCommunicator(Counting(comm)),
    "on both sides": lambda comm: Counting(RingCommunicator(Counting(comm))),
}


def call_all(comm: Communicator) -> list[torch.Tensor]:
    """Run every collective, and return the results of this rank."""
    n, mine, blocks = comm.world_size, torch.arange(4.0) + comm.rank, torch.arange(12.0) + comm.rank
    at_root = blocks if comm.rank == 1 else None
    out = [torch.zeros(4 * n), torch.zeros(12 // n), torch.zeros(12), torch.zeros(12 // n)]
    comm.all_reduce(mine, ReduceOp.AVG)
    comm.reduce(kept := mine.clone(), 1)
    comm.broadcast(sent := mine * (comm.rank + 1), 2)
    comm.all_gather(out[0], mine)
    comm.reduce_scatter(out[1], blocks)
    comm.gather(gathered := torch.zeros(4 * n) if comm.rank == 1 else None, mine, 1)
    comm.all_to_all(out[2], blocks)
    comm.scatter(out[3], at_root, 1)
    comm.barrier()
    objects = comm.all_gather_object(comm.rank)
    return [mine, kept, sent, *out, *([] if gathered is None else [gathered]), torch.tensor(objects)]


@pytest.mark.parametrize("nest", NESTS.values(), ids=NESTS)
def test_wrapped_collectives_do_what_bare_ones_do(nest: Callable[[Communicator], Communicator]) -> None:
    def job() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        with ThreadCommunicator(timeout_s=20) as bare:
            expected = call_all(bare)
            with nest(ThreadCommunicator(timeout_s=20)) as comm:
                return call_all(comm), expected

    for results, expected in spawn_threads(job, 3):
        assert all(map(torch.equal, results, expected))
        assert len(results) == len(expected)


def test_a_wrapper_sees_every_operation_once() -> None:
    def job() -> tuple[Counter[str], Counter[str]]:
        with Counting(ThreadCommunicator(timeout_s=20)) as inner:
            outer = Counting(RingCommunicator(inner))
            inner.calls.clear()
            outer.all_reduce(torch.ones(6), async_op=True).wait()
            outer.barrier()
            outer.recv(torch.ones(1), 0) if outer.rank else outer.send(torch.ones(1), 1)
            return outer.calls, inner.calls

    for rank, (outer, inner) in enumerate(spawn_threads(job, 2)):
        sends = 1 if rank == 0 else 0
        # The ring sends two chunks; what it has no schedule for, and messages, come to the inner one as they are.
        assert outer == Counter(all_reduce=1, barrier=1, isend=sends)
        assert inner == Counter(barrier=1, isend=2 + sends)


def test_wrappers_around_one_transport_share_its_order_and_not_its_messages() -> None:
    def job() -> tuple[bool, torch.Tensor, list[torch.Tensor]]:
        transport = ThreadCommunicator(timeout_s=20)
        first, second = Counting(transport), RingCommunicator(transport)
        works = [comm.all_reduce(torch.ones(5), async_op=True) for comm in (first, second, transport, first)]
        received = [torch.zeros(1), torch.zeros(1)]
        if transport.rank == 0:
            second.send(torch.tensor([2.0]), 1)
            first.send(torch.tensor([1.0]), 1)
        else:
            messages = [first.irecv(received[0], 0), second.irecv(received[1], 0)]
            messages[1].wait()
            messages[0].wait()
        for work in works:
            work.wait()
        first.all_reduce(total := torch.ones(3))
        return first.traffic is transport.traffic, total, received

    results = spawn_threads(job, 2)
    assert all(shared and total.tolist() == [2.0] * 3 for shared, total, _ in results)
    assert [message.item() for message in results[1][2]] == [1.0, 2.0]


def test_closing_a_wrapper_closes_what_is_inside() -> None:
    def job() -> str:
        inner = ThreadCommunicator(timeout_s=20)
        Counting(Counting(inner)).close()
        with pytest.raises(CommClosedError) as caught:
            inner.barrier()
        return str(caught.value)

    assert all("it is closed" in message for message in spawn_threads(job, 2))


def test_a_lost_rank_is_named_through_wrappers() -> None:
    def job() -> str:
        comm = Counting(RingCommunicator(Counting(ThreadCommunicator(timeout_s=20))))
        if comm.rank == 2:
            comm.barrier()  # all have made theirs
            comm.abort("out of memory")
            return ""
        with pytest.raises(PeerLostError) as caught:
            _meet_and_reduce(comm)
        return str(caught.value)

    messages = spawn_threads(job, 3)
    assert all(": rank 2 is gone: out of memory; rank " in message for message in messages[:2]), messages


def _meet_and_reduce(comm: Communicator) -> None:
    """The abort of rank 2 may come before this rank has left the barrier."""
    comm.barrier()
    comm.all_reduce(torch.ones(5))


def test_a_split_is_one_of_the_communicator_inside() -> None:
    def job() -> float:
        with Counting(ThreadCommunicator(timeout_s=20)) as comm:
            group = comm.split(comm.rank % 2)
            assert group is not None
            assert not isinstance(group, Counting)
            group.all_reduce(total := torch.tensor(float(comm.rank)))
            return total.item()

    assert spawn_threads(job, 4) == [2.0, 4.0, 2.0, 4.0]
