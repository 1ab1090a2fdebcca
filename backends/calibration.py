"""Measures what a transport takes, so that `minidist.network.Measured` can say what schedules over it will take.

Four patterns of messages, each of them a schedule of some steps, run on chunks of every size: one message back and
forth between two ranks with nobody else about (one way), an exchange, in which every rank sends one to the next, and
both of these with a reduction.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from backends.algorithm import AlgorithmCommunicator
from minidist.analysis.network import Measured
from minidist.communicator import Communicator
from minidist.schedule import Recv, Reduce, Schedule, Send, Step, num_chunks

FEW = 1
MANY = 4
"""Steps of two runs; their difference is what steps take, the rest what it takes to begin."""
FLOOR_S = 1e-9
"""What a step takes at least, so that a model of it takes time at all; so little is what noise has hidden."""
BUDGET_BYTES = 2**23
"""Small messages are measured more often, up to so many bytes at once."""


@dataclass(frozen=True)
class Tables:
    """What was measured: the arguments of `Measured`, in seconds by size."""

    ranks: int
    start: float
    nbytes: list[float]
    one_way: list[float]
    exchange: list[float]
    reduce: list[float]
    reduce_all: list[float]

    @classmethod
    def median(cls, several: Sequence[Tables]) -> Tables:
        """Return the medians of several measurements of the same sizes."""
        medians = np.median([tables.columns() for tables in several], axis=0).tolist()
        start = statistics.median(tables.start for tables in several)
        return cls(several[0].ranks, start, several[0].nbytes, *medians)

    def columns(self) -> tuple[list[float], ...]:
        """Return one_way, exchange, reduce and reduce_all."""
        return self.one_way, self.exchange, self.reduce, self.reduce_all

    def network(self) -> Measured:
        """Return the model."""
        return Measured(**asdict(self))

    def model(self) -> dict[str, Any]:
        """Return the model as a preset of the group ``network``."""
        return {"_target_": "minidist.analysis.network.Measured", **asdict(self)}

    def alpha_beta_gamma(self) -> dict[str, float]:
        """Return the alpha, beta and gamma that come nearest to the exchange between all ranks, by relative error."""
        alpha, beta = fitted(self.nbytes, self.exchange)
        _, gamma = fitted(self.nbytes, self.reduce_all)
        return {"alpha": alpha, "beta": beta, "gamma": gamma}


def fitted(nbytes: Sequence[float], seconds: Sequence[float]) -> tuple[float, float]:
    """Return alpha and beta, neither below 0, with the least squares of (alpha + beta m) / seconds - 1.

    What noise has hidden is left out: as the shortest of all times it would decide alone.
    """
    known = [(m, t) for m, t in zip(nbytes, seconds, strict=True) if t > FLOOR_S]
    if not known:
        return 0.0, 0.0
    rows = np.array([(1 / t, m / t) for m, t in known])
    both, *_ = np.linalg.lstsq(rows / rows.max(axis=0), np.ones(len(rows)), rcond=None)
    both = both / rows.max(axis=0)
    if len(known) > 1 and min(both) >= 0:
        return float(both[0]), float(both[1])
    # Else the best is where one of them is 0, as in any least squares of two values that may not be negative.
    alone = rows.sum(axis=0) / (rows * rows).sum(axis=0)
    misses = ((rows * alone - 1) ** 2).sum(axis=0)
    return (float(alone[0]), 0.0) if misses[0] < misses[1] else (0.0, float(alone[1]))


def calibrate(transport: Communicator, sizes: Sequence[int], iterations: int = 5) -> Tables:
    """Measure ``transport``; every rank calls it, and all get what the slowest of them saw.

    Args:
        transport: on two ranks or more.
        sizes: of messages, in bytes, rising.
        iterations: how often everything is measured; the medians count.

    Raises:
        ValueError: there is one rank.
    """
    if transport.world_size < 2:
        raise ValueError("there is nothing to measure on one rank")
    return tabled(transport.world_size, {nbytes: measured(transport, nbytes, iterations) for nbytes in sizes})


def tabled(world_size: int, rows: Mapping[int, Mapping[str, float]]) -> Tables:
    """Return what was `measured` at two sizes or more."""
    sizes = sorted(rows)
    columns = {name: [rows[size][name] for size in sizes] for name in rows[sizes[0]]}
    starts = columns.pop("start")
    start = statistics.median(starts[: len(starts) // 2 + 1])  # of large messages it is what noise is
    reduces = {"reduce": ("one_way_reduce", "one_way"), "reduce_all": ("exchange_reduce", "exchange")}
    for name, (both, alone) in reduces.items():
        columns[name] = [max(b - a, 0.0) for b, a in zip(columns.pop(both), columns[alone], strict=True)]
    return Tables(world_size, max(start, 0.0), [float(size) for size in sizes], **columns)


def measured(transport: Communicator, nbytes: int, iterations: int, limit_s: float = math.inf) -> dict[str, float]:
    """Return the seconds of a step of each pattern, and those of a collective besides its steps.

    Every rank calls it; see `slowest_median`.
    """
    memory = transport.empty(2 * max(nbytes // 4, 1)).zero_()  # two chunks, one to send and one to receive

    def seconds(schedule: Schedule) -> float:
        comm = AlgorithmCommunicator(transport, {"all_reduce": schedule}, proves=False)  # exchanges, no all-reduce
        return slowest_median(transport, lambda: comm.all_reduce(memory), nbytes, iterations, limit_s)

    # What a run takes to begin is in both of them, and falls out of the difference.
    few, many = ({name: seconds(make(steps)) for name, make in _PATTERNS.items()} for steps in (FEW, MANY))
    steps = {name: max((many[name] - few[name]) / (MANY - FEW), FLOOR_S) for name in _PATTERNS}
    return {"start": few["exchange"] - FEW * steps["exchange"], **steps}


def slowest_median(
    transport: Communicator, action: Callable[[], object], nbytes: int, iterations: int, limit_s: float = math.inf
) -> float:
    """Return the median seconds of an action on so many bytes, on the slowest rank; every rank calls it.

    It is run less often where it would take longer than ``limit_s`` in all, but a few times in any case.
    """
    repeats = max(1, min(20, BUDGET_BYTES // nbytes))
    if limit_s < math.inf:
        times = max(2, int(limit_s / _once(transport, action)))
        iterations = min(iterations, times // 2)
        repeats = max(1, min(repeats, times // iterations - 1))
    seconds = []
    for _ in range(iterations):
        action()  # lines the ranks up
        started = time.perf_counter()
        for _ in range(repeats):
            action()
        seconds.append((time.perf_counter() - started) / repeats)
    return float(max(transport.all_gather_object(statistics.median(seconds))))


def _once(transport: Communicator, action: Callable[[], object]) -> float:
    """Return the seconds of one action on the slowest rank, after a first one that prepares what is kept."""
    action()
    started = time.perf_counter()
    action()
    return float(max(transport.all_gather_object(time.perf_counter() - started)))


def _back_and_forth(kind: type[Recv | Reduce], steps: int) -> Schedule:
    def schedule(rank: int, world_size: int) -> Iterator[Step]:
        for step in range(steps):
            if rank < 2:  # two take turns: each step waits for the message of the one before
                yield (Send(1 - rank, 0) if rank == step % 2 else kind(1 - rank, 1),)

    return num_chunks(2)(schedule)


def _shift(kind: type[Recv | Reduce], steps: int) -> Schedule:
    def schedule(rank: int, world_size: int) -> Iterator[Step]:
        for _ in range(steps):
            yield Send((rank + 1) % world_size, 0), kind((rank - 1) % world_size, 1)

    return num_chunks(2)(schedule)


_PATTERNS: dict[str, Callable[[int], Schedule]] = {
    "one_way": lambda steps: _back_and_forth(Recv, steps),
    "exchange": lambda steps: _shift(Recv, steps),
    "one_way_reduce": lambda steps: _back_and_forth(Reduce, steps),
    "exchange_reduce": lambda steps: _shift(Reduce, steps),
}
