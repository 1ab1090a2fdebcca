"""Receives that leave open whom they come from: envelopes, wrappers, and who can."""

from __future__ import annotations

import pytest
import torch

from backends.mpi import MpiCommunicator
from backends.ring import RingCommunicator
from backends.shm import ShmCommunicator
from backends.thread import ThreadCommunicator, run_threads, spawn_threads
from backends.torch_dist import GlooCommunicator, NcclCommunicator
from backends.traced import TracedCommunicator
from minidist.communicator import Communicator
from minidist.contract import envelope
from minidist.errors import CommError
from tests import conformance_sources
from tests.inputs import Needs

REPEATABLE = [
    name
    for name, check in vars(conformance_sources).items()
    if name.startswith("check_") and not getattr(check, "needs", Needs()).fresh
]


class Enveloped(ThreadCommunicator):
    """Threads that leave it to envelopes to tell what a message is, as MPI does."""

    checks_dtypes = False
    tag_bits = 15


@pytest.mark.parametrize("name", REPEATABLE)
def test_envelopes_tell_the_source_of_their_pieces(name: str) -> None:
    def job() -> None:
        with Enveloped(timeout_s=20) as comm:
            getattr(conformance_sources, name)(comm)

    spawn_threads(job, 3)


def test_many_open_receives_are_waited_for_backwards() -> None:
    """More than the depth to which functions may call each other."""

    def job() -> None:
        with Enveloped(timeout_s=60) as comm:
            if comm.rank == 1:
                works = [comm.isend(torch.ones(1), 0) for _ in range(1500)]
            else:
                works = [comm.irecv(torch.zeros(1), None) for _ in range(1500)]
            for work in reversed(works):
                work.wait()

    spawn_threads(job, 2)


def test_a_channel_whose_tags_would_be_those_of_pieces_is_refused() -> None:
    def job() -> None:
        comm = Enveloped(timeout_s=10)
        comm._channel = envelope.MAX_CHANNEL
        with pytest.raises(CommError, match="messages need one of the first 4096 channels"):
            comm.isend(torch.ones(1), 1 - comm.rank)

    spawn_threads(job, 2)


def test_wrappers_know_whom_a_message_came_from() -> None:
    def job() -> list[int]:
        with TracedCommunicator(RingCommunicator(ThreadCommunicator(timeout_s=10))) as comm:
            if comm.rank > 0:
                comm.send(torch.ones(3), 0)
                return []
            sources = [comm.recv(torch.zeros(3), None) for _ in range(2)]
            assert [entry.peer for entry in comm.log] == sources
            return sorted(sources)

    assert spawn_threads(job, 3)[0] == [1, 2]


def test_who_is_alone_receives_from_nobody() -> None:
    with pytest.raises(ValueError, match="src is None, any other rank, but this rank is the only one"):
        ThreadCommunicator().recv(torch.zeros(1), None)


def test_who_can_leave_the_source_open() -> None:
    def job(comm: Communicator) -> tuple[bool, bool, bool]:
        group = comm.split(0)
        assert group is not None
        return comm.receives_from_any, RingCommunicator(comm).receives_from_any, group.receives_from_any

    assert run_threads(job, 2) == [(True, True, False)] * 2
    assert ShmCommunicator.receives_from_any
    assert MpiCommunicator.receives_from_any
    assert not GlooCommunicator.receives_from_any
    assert not NcclCommunicator.receives_from_any
