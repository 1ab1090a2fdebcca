"""How processes meet: the key-value store of their world, whatever started them.

Each process connects once and keeps the connection, the one module-level state of the project: a second
rendezvous of the same processes would read what the first one left behind.
"""

from __future__ import annotations

import functools
import json
import os
import secrets
import socket
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta

import torch.distributed as dist

from backends.processes.attempt import agreed_attempt
from minidist import launch
from minidist.communicator import Communicator
from minidist.contract import addresses
from minidist.contract.forks import Maker, kept_in_forks
from minidist.contract.place import Place, from_everyone
from minidist.errors import BackendUnavailableError, CommTimeoutError

CONNECT_S = 300.0
CONNECT_TIMEOUT = timedelta(seconds=CONNECT_S)
ANSWER_S = 5.0
"""How long one of rank 0's addresses may take to answer, before the next one is tried."""


@dataclass
class Meeting:
    """The processes of this world, once they have met.

    Attributes:
        world: this process among them.
        host: an address of rank 0's host that all of them reach.
        port: of the store on that host; 0 where it is in this process alone.
        store: the key-value store that they share; that of torchrun's agent is the same before and after a restart.
        attempt: a name of this start of the ranks, where the store may hold what earlier ones have left.
        address: of this process, by which those of other hosts reach it.
    """

    world: launch.World
    host: str
    port: int
    store: dist.Store
    attempt: str = "attempt"
    address: str = addresses.LOOPBACK
    maker: Maker = field(default_factory=Maker, init=False)
    is_located: bool = field(default=False, init=False)
    _num_jobs: int = field(default=0, init=False)

    @property
    def one_host(self) -> bool:
        """Whether all processes run on this host."""
        return self.world.local_world_size == self.world.world_size

    @functools.cached_property
    def run_id(self) -> str:
        """What rank 0 calls this run."""
        if self.world.rank == 0:
            name = f"{time.strftime('%Y-%m-%d_%H-%M-%S')}_{secrets.token_hex(2)}"
            return self.store.compare_set("run_id", "", name).decode()
        return self.store.get("run_id").decode()

    def locate(self, timeout_s: float) -> None:
        """Find out which ranks share a host, and by which address this one is reached; all ranks call it."""
        world = self.world
        store = dist.PrefixStore(f"{self.attempt}/hosts", self.store)
        mine = launch.host_id(), addresses.towards(self.host)
        everyone = from_everyone(store, world.rank, world.world_size, json.dumps(mine), timeout_s)
        hosts, theirs = zip(*map(json.loads, everyone), strict=True)
        self.address = addresses.reachable(mine[1], hosts, theirs, world.rank)
        self.world = launch.located(world, hosts)
        self.is_located = True

    def job_store(self) -> dist.Store:
        """Return an empty store for one communicator; all ranks call it in the same order."""
        self._num_jobs += 1
        return dist.PrefixStore(f"{self.attempt}/job{self._num_jobs}", self.store)

    def place(self) -> Place:
        """Return the place of one communicator of all processes; all ranks call it in the same order."""
        world = self.world
        here = world.local_world_size
        return Place(world.rank, world.world_size, self.job_store(), self.host, here, here, self.address)


_meetings: list[Meeting] = []
"""That of this process, once it has met the others."""


def meet(timeout_s: float = CONNECT_S) -> Meeting:
    """Return the meeting of this process's world; the first call connects.

    Args:
        timeout_s: for each of two steps: to connect, and for all ranks to say which host they are on.

    Raises:
        CommTimeoutError: there was no answer, or not all ranks said so, in time.
        CommError: this process is a fork of one of that world, which holds the one place and the one connection.
    """
    meeting = _meeting(timeout_s)
    now = launch.detect()
    if not meeting.maker.is_here:
        if now.launcher != "alone" and (now.rank, now.world_size) == (meeting.world.rank, meeting.world.world_size):
            meeting.maker.ensure_here(f"[rank {now.rank}/{now.world_size}] rendezvous")
        _meetings.clear()  # the fork is alone, or was told to be another rank
        meeting = _meeting(timeout_s)
    if not (meeting.is_located or (meeting.world.knows_host and meeting.one_host)):
        meeting.locate(timeout_s)
    return meeting


def _meeting(timeout_s: float) -> Meeting:
    if not _meetings:
        meeting = _met(launch.detect(), timeout_s)
        kept_in_forks(meeting.store)
        _meetings.append(meeting)
    return _meetings[0]


def _met(world: launch.World, timeout_s: float) -> Meeting:
    if world.launcher == "alone":
        return Meeting(world, addresses.LOOPBACK, 0, dist.HashStore())
    addresses.chosen()  # before ranks wait for each other: one whose choice is wrong would leave the others waiting
    if world.by_mpi:
        return _meet_over_mpi(world, timeout_s)
    if world.launcher == "slurm":
        os.environ.setdefault("MASTER_ADDR", _first_slurm_host())
        os.environ.setdefault("MASTER_PORT", str(20000 + int(os.environ["SLURM_JOB_ID"]) % 10000))
    return _meet_at_master(world, timeout_s)


def place_among(comm: Communicator) -> Place:
    """Return a place of the ranks of ``comm``, all on one host, for another communicator of theirs; all call it."""
    store = dist.TCPStore(addresses.LOOPBACK, 0, None, True, wait_for_workers=False) if comm.rank == 0 else None
    port = comm.broadcast_object(store.port if store else 0, 0)
    store = store or dist.TCPStore(addresses.LOOPBACK, port, None, False, wait_for_workers=False)
    of_job = max(comm.world_size, launch.detect().local_world_size)
    return Place(comm.rank, comm.world_size, kept_in_forks(store), addresses.LOOPBACK, comm.world_size, of_job)


def run_id() -> str:
    """Return a name for this run, the same on all ranks and after a restart; it sorts by time."""
    return meet().run_id


def _meet_at_master(world: launch.World, timeout_s: float) -> Meeting:
    try:
        # [::1] as in a URL
        host = os.environ["MASTER_ADDR"].strip("[]")
        port = int(os.environ["MASTER_PORT"])
    except KeyError as error:
        raise BackendUnavailableError(
            f"RANK and WORLD_SIZE are set but {error} is not; start with torchrun, or set it to rank 0's"
        ) from error
    of_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    serves = world.rank == 0 and not of_agent
    within = timedelta(seconds=timeout_s)
    try:
        store = dist.TCPStore(host, port, world.world_size, serves, within, wait_for_workers=False)
    except dist.DistNetworkError as error:
        raise CommTimeoutError(
            f"[rank {world.rank}/{world.world_size}] rendezvous: rank 0 could not be reached as {host}, port {port}, "
            f"within {timeout_s:g} s; MASTER_ADDR has to lead to its host from all hosts, by name or by address"
        ) from error
    store.set_timeout(CONNECT_TIMEOUT)
    ours = dist.PrefixStore("minidist", store)
    if not of_agent:
        return Meeting(world, host, port, ours)
    return Meeting(world, host, port, ours, agreed_attempt(ours, world.rank, world.world_size, timeout_s))


def _meet_over_mpi(world: launch.World, timeout_s: float) -> Meeting:
    from backends.mpi.process import from_rank_0

    store = None
    if world.rank == 0:
        store = dist.TCPStore("0.0.0.0", 0, None, True, CONNECT_TIMEOUT, wait_for_workers=False)
    one_host = world.local_world_size == world.world_size
    mine = ([addresses.LOOPBACK] if one_host else addresses.all_of_host(), store.port if store else 0)
    candidates, port = from_rank_0(mine)
    if store is not None:
        return Meeting(world, candidates[0], port, store)
    host = _first_that_answers(candidates, port, timeout_s)
    store = dist.TCPStore(host, port, None, False, CONNECT_TIMEOUT, wait_for_workers=False)
    return Meeting(world, host, port, store)


def _first_that_answers(candidates: Sequence[str], port: int, timeout_s: float) -> str:
    """Return the first of rank 0's addresses at which somebody listens: the name of its host may not be known here."""
    refusals = list[str]()
    for address in candidates:
        try:
            socket.create_connection((address, port), min(timeout_s, ANSWER_S)).close()
        except OSError as error:
            refusals.append(f"{address}: {error}")
        else:
            return address
    raise BackendUnavailableError(
        f"host {socket.gethostname()} reaches rank 0 at none of its addresses ({'; '.join(refusals)}); "
        f"set {addresses.VARIABLE} to an interface by which the hosts reach each other"
    )


def _first_slurm_host() -> str:
    command = ["scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
