"""Measures a transport between hosts, so that `MeasuredHosts` can say what schedules over it will take.

Five patterns of messages, each of them a schedule of some steps on chunks of every size: between hosts one message back
and forth, an exchange with the next host, and a fan from every rank to all ranks of other hosts; inside of all hosts
at once one message back and forth, and an exchange with the next rank. Reductions are measured without messages.

All of it ends within a budget, however slow the line is: small sizes come first, and what is not expected to end in
time is left out, alike on all ranks, and extrapolated.
"""

from __future__ import annotations

import functools
import itertools
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from backends.calibration import Tables, calibrate, fitted
from backends.clock import LIMIT_S, Action, Clock
from backends.executor.executor import Executor
from backends.levels import Placement
from backends.wrapper import Wrapper
from minidist import launch
from minidist.analysis.measured_hosts import MeasuredHosts
from minidist.analysis.network import Network
from minidist.communicator import Communicator
from minidist.schedule import Recv, Schedule, Send, Step, num_chunks

Messages = Sequence[tuple[int, int]]
"""The sources and targets of messages that are sent at once."""
Pattern = Callable[[int], Messages]
"""The messages of a step, by its number."""
STEPS = 3
"""Of a run. It is measured again and again, and what it takes to begin is measured by itself."""
SEGMENT_BYTES = 2**22
LARGE_BYTES = 2**19
"""Messages that are so large are measured one step at a time, as what goes on beside them matters less."""
LATEST = 3
"""By so many sizes one knows what larger ones take."""


@dataclass(frozen=True)
class HostTables:
    """What was measured: the arguments of `MeasuredHosts`, in seconds by size, and the tables inside of hosts."""

    hosts: list[int]
    start: float
    nbytes: list[float]
    one_way: list[float]
    exchange: list[float]
    fan: list[float]
    reduce: list[float]
    inside: Tables | None

    @property
    def ranks(self) -> int:
        """How many ranks were measured."""
        return len(self.hosts)

    @classmethod
    def median(cls, several: Sequence[HostTables]) -> HostTables:
        """Return the medians of several measurements of the same sizes."""
        medians = np.median([tables.columns() for tables in several], axis=0).tolist()
        start = statistics.median(tables.start for tables in several)
        inside = [tables.inside for tables in several if tables.inside is not None]
        columns = dict(zip(("one_way", "exchange", "fan", "reduce"), medians, strict=True))
        first = several[0]
        return cls(first.hosts, start, first.nbytes, **columns, inside=Tables.median(inside) if inside else None)

    def columns(self) -> tuple[list[float], ...]:
        """Return one_way, exchange, fan and reduce."""
        return self.one_way, self.exchange, self.fan, self.reduce

    def network(self) -> Network:
        """Return the model."""
        inside = None if self.inside is None else self.inside.network()
        return MeasuredHosts(**{**asdict(self), "inside": inside})

    def model(self) -> dict[str, Any]:
        """Return the model as a preset of the group ``network``."""
        inside = None if self.inside is None else self.inside.model()
        return {"_target_": "minidist.analysis.measured_hosts.MeasuredHosts", **asdict(self), "inside": inside}

    def alpha_beta_gamma(self) -> dict[str, float]:
        """Return the alpha, beta and gamma of a flat network that come nearest to the exchange, by relative error."""
        alpha, beta = fitted(self.nbytes, self.exchange)
        _, gamma = fitted(self.nbytes, self.reduce)
        return {"alpha": alpha, "beta": beta, "gamma": gamma}


def measured_hosts(transport: Communicator, where: Placement, sizes: Sequence[int], clock: Clock) -> HostTables:
    """Measure a transport whose ranks are on several hosts; every rank calls it, and all get the same.

    Args:
        transport: what moves the messages.
        where: which rank is on which host.
        sizes: of messages, in bytes, rising; what there is no time for is extrapolated.
        clock: what is left of the time.
    """
    patterns = between(where) | (inside(where) if where.width > 1 else {})
    probe = _Probe(transport)
    start = clock.seconds("start", 1, lambda: probe.prepare(_steps(lambda number: [], 0), sizes[0])) or 0.0
    runs: dict[str, dict[int, tuple[float, int]]] = {name: {} for name in patterns}
    reduced = dict[int, float]()
    for nbytes in in_turn(sizes):
        steps = 1 if nbytes >= LARGE_BYTES else STEPS
        for name, step in patterns.items():
            prepare = functools.partial(probe.prepare, _steps(step, steps), nbytes)
            seconds = clock.seconds(name, nbytes * steps, prepare)
            if seconds is not None:
                runs[name][nbytes] = seconds, steps
        prepare = functools.partial(_reduction, transport, nbytes)
        seconds = clock.seconds("reduce", nbytes, prepare, LIMIT_S / 4)
        if seconds is not None:
            reduced[nbytes] = seconds
    # Noise can make a start longer than what begins with it.
    start = min(start, *(seconds / 2 for row in runs.values() for seconds, _ in row.values()))
    columns = {"reduce": filled(reduced, sizes)}
    for name, row in runs.items():
        columns[name] = filled({nbytes: (seconds - start) / steps for nbytes, (seconds, steps) in row.items()}, sizes)
    nbytes_of = [float(nbytes) for nbytes in sizes]
    near = None
    if where.width > 1:
        nothing = [0.0] * len(sizes)  # a reduction is apart from its message
        near = Tables(where.width, 0.0, nbytes_of, columns.pop("near"), columns.pop("around"), nothing, nothing)
    hosts = [where.of(rank)[0] for rank in range(transport.world_size)]
    return HostTables(hosts, start, nbytes_of, inside=near, **columns)


def calibrated(transport: Communicator, sizes: Sequence[int], iterations: int, budget_s: float) -> Tables | HostTables:
    """Measure a transport on one host, see `calibrate`, or on several, for ``budget_s`` seconds; every rank calls it.

    Raises:
        ValueError: there is one rank.
    """
    clock = Clock(transport, budget_s)
    where = placement(transport)
    if len(where.ranks_of) == 1:
        return calibrate(transport, sizes, iterations)
    return measured_hosts(transport, where, sizes, clock)


def medians(several: Sequence[Tables | HostTables]) -> Tables | HostTables:
    """Return the medians of what was measured several times on the same ranks."""
    of_hosts = [tables for tables in several if isinstance(tables, HostTables)]
    return HostTables.median(of_hosts) if of_hosts else Tables.median([t for t in several if isinstance(t, Tables)])


def in_turn(sizes: Sequence[int]) -> list[int]:
    """Return the sizes so that the first two lie apart, as all others may have to be told from them."""
    return [*sizes[:1], *sizes[2:], *sizes[1:2]]


def filled(seconds: Mapping[int, float], sizes: Sequence[int]) -> list[float]:
    """Return the seconds at all sizes: the known ones, and others on the line that fits the largest of those best.

    None is longer than that of a larger size, as noise only adds to what a message takes.
    """
    largest = sorted(seconds)[-LATEST:]
    alpha, beta = fitted(largest, [seconds[size] for size in largest])
    row = [seconds[size] if size in seconds else alpha + beta * size for size in sizes]
    return list(itertools.accumulate(reversed(row), min))[::-1]


def placement(transport: Communicator) -> Placement:
    """Return which rank is on which host; every rank calls it."""
    return Placement(transport.all_gather_object(launch.host_id()), transport.rank)


class _Probe(Wrapper):
    """Runs one pattern after the other on a channel of its own, in place of all-reduces."""

    def prepare(self, schedule: Schedule, nbytes: int) -> Action:
        """Return what runs a pattern on messages of so many bytes."""
        chunks = self.world_size + 1
        pattern = {"all_reduce": num_chunks(chunks)(schedule)}
        self._executor = Executor(self._inner, pattern, self._schedule_tag, SEGMENT_BYTES, proves=False)
        memory = self.empty(chunks * max(nbytes // 4, 1)).zero_()
        return lambda: self.all_reduce(memory)

    def _collective(self, name: str) -> Callable[..., None]:
        return self._executor.all_reduce


def _reduction(comm: Communicator, nbytes: int) -> Action:
    total, added = (torch.zeros(nbytes // 4, device=comm.device_type) for _ in range(2))
    return functools.partial(total.add_, added)


def _steps(step: Pattern, count: int) -> Schedule:
    def schedule(rank: int, world_size: int) -> Iterator[Step]:
        for number in range(count):
            if messages := step(number):  # chunk 0 is sent, and what rank r sends arrives in chunk r + 1
                sends = (Send(dst, 0) for src, dst in messages if src == rank)
                step_of_rank = (*sends, *(Recv(src, src + 1) for src, dst in messages if dst == rank))
                if step_of_rank:
                    yield step_of_rank

    return schedule


def between(where: Placement) -> dict[str, Pattern]:
    """Return the patterns between hosts."""
    hosts = where.ranks_of
    # The next host first, so that not all begin with the same one.
    others = [
        (ranks, hosts[(host + distance) % len(hosts)])
        for host, ranks in enumerate(hosts)
        for distance in range(1, len(hosts))
    ]
    following = others[:: len(hosts) - 1]
    exchange = [(src, other[local % len(other)]) for ranks, other in following for local, src in enumerate(ranks)]
    fan = [(src, dst) for ranks, other in others for src in ranks for dst in other]
    return {
        "one_way": _turns([(hosts[0][0], hosts[1][0])]),
        "exchange": lambda number: exchange,
        "fan": lambda number: fan,
    }


def inside(where: Placement) -> dict[str, Pattern]:
    """Return the patterns inside of hosts, of all of them at once."""
    hosts = [ranks for ranks in where.ranks_of if len(ranks) > 1]
    around = [(src, ranks[(local + 1) % len(ranks)]) for ranks in hosts for local, src in enumerate(ranks)]
    return {"near": _turns([(ranks[0], ranks[1]) for ranks in hosts]), "around": lambda number: around}


def _turns(pairs: Messages) -> Pattern:
    """Two ranks take turns: each step waits for the message of the one before."""
    return lambda number: pairs if number % 2 == 0 else [(dst, src) for src, dst in pairs]
