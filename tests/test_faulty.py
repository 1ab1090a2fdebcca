"""Faults on purpose: each happens where it was asked for, and what comes of it is what it should be."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from backends.faulty import DelayedCommunicator, KilledCommunicator, LossyCommunicator
from backends.thread import ThreadCommunicator, spawn_threads
from minidist.communicator import Communicator
from minidist.errors import CommError, CommTimeoutError, PeerLostError
from tests.harness import run_forked


def on_ranks(make: Callable[[], Communicator], job: Callable[[Communicator], object], world_size: int) -> list[object]:
    """Return what ``job`` returned on each rank, or the error that it raised."""

    def run() -> object:
        with make() as comm:
            try:
                return job(comm)
            except (CommError, RuntimeError) as error:
                return error

    return spawn_threads(run, world_size)


def total(comm: Communicator) -> list[float]:
    tensor = torch.arange(8.0) + comm.rank
    comm.all_reduce(tensor)
    return tensor.tolist()


def test_delays_are_of_their_rank_and_change_nothing_else() -> None:
    def job(comm: Communicator) -> list[object]:
        comm.barrier()
        began = time.monotonic()
        for _ in range(5):
            result = total(comm)
            if comm.rank < 2:
                comm.send(torch.ones(1), 1) if comm.rank == 0 else comm.recv(torch.ones(1), 0)
        return [result, time.monotonic() - began]

    def make() -> Communicator:
        return DelayedCommunicator(ThreadCommunicator(timeout_s=20), operation_s=0.02, message_s=0.01, rank=0)

    import random

    draws = random.Random("0 0")
    draws.expovariate(1 / 0.02)  # of the barrier
    expected = sum(draws.expovariate(1 / mean) for _ in range(5) for mean in (0.02, 0.03))
    for result, seconds in on_ranks(make, job, 3):  # type: ignore[misc]
        assert result == [3 * value + 3 for value in range(8)]
        assert seconds > 0.9 * (expected - 0.1), "the others wait for rank 0, but for what it sends last"


@pytest.mark.parametrize("message", [1, 3])
@pytest.mark.parametrize("fault", LossyCommunicator.FAULTS)
def test_a_message_that_goes_wrong(fault: str, message: int) -> None:
    def make() -> Communicator:
        return LossyCommunicator(ThreadCommunicator(timeout_s=2), fault, message=message, rank=1)

    def job(comm: Communicator) -> list[list[float]]:
        return [total(comm), total(comm)]

    found = on_ranks(make, job, 3)
    right = [[3 * value + 3.0 for value in range(8)]] * 2
    if fault == "flipped":
        assert found != [right] * 3, "numbers are wrong, and nobody says so"
    elif fault == "doubled":
        assert any(isinstance(each, CommError) or each != right for each in found)
    else:
        assert all(isinstance(each, CommError) for each in found), found
        assert any(isinstance(each, CommTimeoutError | PeerLostError) or "bytes" in str(each) for each in found)


def test_only_the_message_that_was_named_goes_wrong() -> None:
    def make() -> Communicator:
        return LossyCommunicator(ThreadCommunicator(timeout_s=20), "flipped", message=5, rank=1)

    def job(comm: Communicator) -> list[list[float]]:
        return [total(comm) for _ in range(3)]  # of 4 messages each

    right = [3 * value + 3.0 for value in range(8)]
    for results in on_ranks(make, job, 3):
        assert results[0] == results[2] == right  # type: ignore[index]
    assert any(results[1] != right for results in on_ranks(make, job, 3))  # type: ignore[index]


def test_a_rank_that_raises_is_named() -> None:
    def make() -> Communicator:
        return KilledCommunicator(ThreadCommunicator(timeout_s=20), rank=1, operation=3, how="raise")

    done = [0, 0, 0]

    def job(comm: Communicator) -> None:
        for _ in range(5):
            total(comm)
            done[comm.rank] += 1

    found = on_ranks(make, job, 3)
    assert done == [2, 2, 2]
    assert "ended on purpose before operation 3" in str(found[1])
    for other in (found[0], found[2]):
        assert isinstance(other, PeerLostError)
        assert other.peers == (1,)


@pytest.mark.parametrize(
    ("kind", "how"),
    [
        ("gloo", "kill"),
        pytest.param("gloo", "exit", marks=pytest.mark.slow),
        pytest.param("gloo", "stop", marks=pytest.mark.slow),
        pytest.param("shm", "kill", marks=pytest.mark.slow),
        pytest.param("shm", "exit", marks=pytest.mark.slow),
        pytest.param("shm", "stop", marks=pytest.mark.slow),
    ],
)
def test_a_process_that_ends_is_named(kind: str, how: str, tmp_path: Path) -> None:
    _, output = run_forked("tests.faulty_ranks", kind, how, world_size=3, output=tmp_path / "output.txt", limit_s=60)
    # Who stops is still there: that it takes no part is all that is known.
    error = "CommTimeoutError: .* did not take part" if how == "stop" else "PeerLostError: .* rank 1 is gone"
    for rank in (0, 2):
        assert re.search(rf"rank {rank} after 2 operations: {error}", output), output


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda comm: DelayedCommunicator(comm, operation_s=-1), r"delays must be at least 0 s"),
        (lambda comm: DelayedCommunicator(comm, rank=1), r"rank must be 0 to 0, or null for all of them, got 1"),
        (lambda comm: LossyCommunicator(comm, "burnt"), r"fault must be one of lost, .*, got 'burnt'"),
        (lambda comm: LossyCommunicator(comm, "lost", 0), r"message must be at least 1, got 0"),
        (lambda comm: KilledCommunicator(comm, how="softly"), r"how must be one of raise, .*, got 'softly'"),
        (lambda comm: KilledCommunicator(comm, operation=0), r"operation must be at least 1, got 0"),
    ],
)
def test_wrong_arguments(make: Callable[[Communicator], Communicator], message: str) -> None:
    with ThreadCommunicator() as comm, pytest.raises(ValueError, match=message):
        make(comm)
