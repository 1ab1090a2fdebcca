"""A paced communicator is never faster than the model of its network, whatever the machine does meanwhile."""

from __future__ import annotations

import gc
import os
import random
import re
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from backends.algorithm import AlgorithmCommunicator
from backends.paced import PacedCommunicator
from backends.pacing import shared_network
from backends.pacing.page import IN_MEMORY
from backends.pacing.shared_network import SharedNetwork
from backends.pacing.stamps import NUM_STAMPS, Stamps
from backends.ring import ring_all_reduce
from backends.schedules.direct import two_shot_all_reduce
from backends.schedules.doubling import halving_doubling_all_reduce
from backends.serial import SerialCommunicator
from backends.thread import ThreadCommunicator, spawn_threads
from backends.two_level import two_level_all_reduce
from minidist.analysis.network import Flat, Hosts, Network
from minidist.analysis.simulate import simulate
from minidist.collective import Run
from minidist.errors import CommError, CommTimeoutError, PeerLostError
from minidist.schedule import Schedule
from tests.harness import run_forked

FLAT = Flat(alpha=1e-3, beta=2e-8)
SLOW = Flat(alpha=0.0, beta=1e-4)
"""A second for 10 KB."""
CARDS = Hosts(2, Flat(alpha=0.0, beta=0.0), SLOW)
SCHEDULES = (
    ring_all_reduce,
    two_shot_all_reduce,
    halving_doubling_all_reduce,
    partial(two_level_all_reduce, ranks_per_host=2),
)


def paced(network: Network, timeout_s: float = 20.0, jitter: float = 0.0) -> PacedCommunicator:
    return PacedCommunicator(ThreadCommunicator(timeout_s=timeout_s), network, jitter=jitter)


def seconds(run: Callable[[PacedCommunicator], object], network: Network, world_size: int) -> float:
    """Return what something takes from the first rank that begins to the last that ends."""

    def job() -> tuple[float, float]:
        with paced(network) as comm:
            comm.transport.barrier()
            started = time.monotonic()
            run(comm)
            return started, time.monotonic()

    starts, ends = zip(*spawn_threads(job, world_size), strict=True)
    return max(ends) - min(starts)


@pytest.mark.parametrize("nbytes", [2**12, 2**18])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=("ring", "two_shot", "halving_doubling", "two_level"))
def test_an_all_reduce_is_no_faster_than_the_simulation(schedule: Schedule, nbytes: int) -> None:
    """Where no links are shared nothing depends on the order in which ranks happen to send."""

    def run(comm: PacedCommunicator) -> None:
        algorithm = AlgorithmCommunicator(comm, {"all_reduce": schedule})
        algorithm.all_reduce(total := torch.full((nbytes // 4,), float(comm.rank)))
        assert total.eq(6).all()

    model = simulate(schedule, Run("all_reduce", 4), nbytes, FLAT).seconds
    assert seconds(run, FLAT, 4) >= model


def test_collectives_are_paced_without_an_algorithm() -> None:
    """That takes messages; the transport's own collectives might not send any."""
    assert seconds(lambda comm: comm.all_reduce(torch.ones(250)), SLOW, 2) >= 0.1
    assert seconds(lambda comm: comm.barrier(), Flat(alpha=0.05, beta=0.0), 2) >= 0.05


def test_ranks_of_a_host_share_its_card() -> None:
    def run(comm: PacedCommunicator) -> None:
        if comm.rank < 2:
            comm.send(torch.ones(250), comm.rank + 2)
        else:
            comm.recv(torch.ones(250), comm.rank - 2)

    assert seconds(run, CARDS, 4) >= 0.2


def test_a_card_is_one_for_all_processes_of_its_host(tmp_path: Path) -> None:
    status, output = run_forked("tests.paced_ranks", world_size=3, output=tmp_path / "output.txt", limit_s=60)
    assert status == 0, output
    times = [tuple(map(float, found)) for found in re.findall(r"sent from ([\d.]+) to ([\d.]+)", output)]
    assert len(times) == 3, output
    assert max(end for _, end in times) - min(start for start, _ in times) >= 0.2


def test_messages_queue_for_the_links_that_they_share() -> None:
    """By the model: ranks 0 and 1 share the card of their host, out of it and into it, and nothing else."""

    def job() -> list[float]:
        with ThreadCommunicator(timeout_s=20) as comm:
            network = SharedNetwork(comm, Hosts(2, Flat(0.5, 0.25), Flat(1.0, 0.125)))
            among = network.among([3, 1])
            sends = {
                0: [(network, 0, 2), (network, 0, 1)],
                1: [(network, 1, 3), (network, 1, 0)],
                2: [(network, 2, 3), (network, 2, 0)],
                3: [(among, 0, 1)],  # from rank 3 to rank 1
            }
            ends = []
            for rank in range(4):
                for way, src, dst in sends[rank] if comm.rank == rank else ():
                    ends.append(way.send(src, dst, 8, begins=10.0)[0])
                comm.barrier()
            return ends

    assert spawn_threads(job, 4) == [[12.0, 12.5], [13.0, 12.5], [12.5, 12.0], [13.0]]


def test_a_split_has_the_places_of_its_ranks_on_the_network() -> None:
    """Ranks 0 and 2 are on two hosts, whatever their numbers in the split are, and share cards with the others."""

    def run(comm: PacedCommunicator) -> None:
        half = comm.split(comm.rank % 2)
        assert isinstance(half, PacedCommunicator)
        comm.transport.barrier()
        half.send(torch.ones(250), 1) if half.rank == 0 else half.recv(torch.ones(250), 0)

    assert seconds(run, CARDS, 4) >= 0.2


def test_a_message_that_takes_longer_than_its_timeout_does_not_arrive() -> None:
    def job() -> str:
        comm = paced(SLOW, timeout_s=0.3)
        with pytest.raises(CommTimeoutError) as caught:
            comm.recv(torch.ones(2500), 0) if comm.rank else comm.send(torch.ones(2500), 1)
        return str(caught.value)

    sent, received = spawn_threads(job, 2)
    assert sent.startswith("[rank 0/2] isend: no answer from rank 1 within the timeout of 0.3 s; it did not take part")
    assert received.startswith(
        "[rank 1/2] irecv: no answer from rank 0 within the timeout of 0.3 s; it did not take part"
    )


def test_who_waits_for_a_message_on_its_way_hears_of_a_lost_rank() -> None:
    all_made = threading.Barrier(3)

    def job() -> None:
        comm = paced(Flat(alpha=60.0, beta=0.0), timeout_s=100)
        all_made.wait(50)
        if comm.rank == 2:
            comm.abort("out of memory")
        elif comm.rank == 1:
            with pytest.raises(PeerLostError, match="rank 2 is gone: out of memory"):
                comm.send(torch.ones(1), 0)
        else:
            with pytest.raises(PeerLostError, match="rank 2 is gone: out of memory"):
                comm.recv(torch.ones(1), 1)

    started = time.monotonic()
    spawn_threads(job, 3)
    assert time.monotonic() - started < 50


def test_jitter_follows_its_seed() -> None:
    def run(comm: PacedCommunicator) -> None:
        for _ in range(4):
            comm.recv(torch.ones(1), 0) if comm.rank else comm.send(torch.ones(1), 1)

    jittered = partial(PacedCommunicator, network=Flat(alpha=0.01, beta=0.0), jitter=2.0, seed=3)
    numbers = random.Random("3 0")
    expected = sum(0.01 + 0.02 * numbers.expovariate(1.0) for _ in range(4))

    def job() -> float:
        with jittered(ThreadCommunicator(timeout_s=20)) as comm:
            comm.transport.barrier()
            started = time.monotonic()
            run(comm)
            return time.monotonic() - started

    assert max(spawn_threads(job, 2)) >= expected


def test_stamps_are_taken_by_tag_in_the_order_of_their_messages() -> None:
    def job() -> list[float | None]:
        with ThreadCommunicator(timeout_s=20) as comm:
            stamps = Stamps(comm)
            for tag, at in ((5, 1.0), (0, 2.0), (5, 3.0)) if comm.rank == 0 else ():
                stamps.put(1, tag, at)
            comm.barrier()
            return [stamps.take(0, tag) for tag in (0, 5, 5, 5)]

    assert spawn_threads(job, 2)[1] == [2.0, 1.0, 3.0, None]


def test_stamps_that_nobody_takes_are_refused_in_time() -> None:
    def job() -> None:
        with ThreadCommunicator(timeout_s=20) as comm:
            stamps = Stamps(comm)
            for round_ in range(2):
                for number in range(NUM_STAMPS) if comm.rank == 0 else ():
                    stamps.put(1, 0, float(number))
                comm.barrier()
                if comm.rank == 0 and round_ == 1:
                    with pytest.raises(CommError, match=f"{NUM_STAMPS} messages to rank 1 are on their way"):
                        stamps.put(1, 0, 0.0)
                if comm.rank == 1 and round_ == 0:
                    assert [stamps.take(0, 0) for _ in range(NUM_STAMPS)] == list(range(NUM_STAMPS))
                comm.barrier()

    spawn_threads(job, 2)


def test_ranks_on_several_hosts_are_refused_on_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_network, "host_id", lambda: threading.current_thread().name)

    def job() -> None:
        with ThreadCommunicator(timeout_s=20) as comm, pytest.raises(ValueError, match="but they are on 2; choose"):
            PacedCommunicator(comm, FLAT)

    spawn_threads(job, 2)


def test_settings_are_checked() -> None:
    with pytest.raises(ValueError, match="paced needs the model of a network; choose one with network=<name>"):
        PacedCommunicator(SerialCommunicator(), None)
    with pytest.raises(ValueError, match="jitter must be at least 0, got -1"):
        PacedCommunicator(SerialCommunicator(), FLAT, jitter=-1)


def test_nothing_stays_behind() -> None:
    def job() -> None:
        with paced(FLAT) as comm:
            comm.barrier()
            assert _open_pages()

    before = set(IN_MEMORY.glob("minidist-*"))
    spawn_threads(job, 2)
    assert set(IN_MEMORY.glob("minidist-*")) <= before
    gc.collect()
    assert not _open_pages()


def _open_pages() -> list[str]:
    paths = (f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd"))
    return [path for path in paths if os.path.islink(path) and f"{IN_MEMORY}/minidist-" in os.readlink(path)]
