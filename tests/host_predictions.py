"""Predictions against the clock on hosts: ``python -m tests.host_predictions``, as root, on a quiet machine.

For each network it prints what every all-reduce takes at every size, in milliseconds, as predicted by a model that was
measured on it, and as measured; then the geometric mean error, and how much longer the model's choice takes than the
best. Names of networks may follow: ``python -m tests.host_predictions 4x1``.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import sys
from collections.abc import Mapping
from statistics import median
from typing import Any, NamedTuple

import torch

from backends.algorithm import AlgorithmCommunicator
from backends.calibration import Tables
from backends.clock import Clock
from backends.host_calibration import HostTables, measured_hosts, placement
from backends.ring import ring_all_reduce
from backends.schedules.binomial import binomial_all_reduce
from backends.schedules.direct import two_shot_all_reduce
from backends.schedules.doubling import halving_doubling_all_reduce
from backends.torch_dist.gloo import GlooCommunicator
from backends.two_level import two_level_all_reduce
from minidist.analysis.simulate import simulate
from minidist.collective import Run
from minidist.launch import detect
from minidist.schedule import Schedule
from tests.hosts import Network

MESSAGES = [1024 * 4**power for power in range(1, 8)]
"""The sizes of messages that are measured, in bytes: 4 KB to 16 MB, as far as the time goes."""
BUDGET_S = 5.0
TIMEOUT_S = 120.0
LIMIT_S = 900.0
MEGABYTE = 2**20
Times = Mapping[str, Mapping[int, float]]
"""Seconds by algorithm and size."""


class World(NamedTuple):
    """A network of hosts, and what is run on it.

    Attributes:
        on: the host of each rank.
        mbit_per_s: of each host's line.
        sizes: of the tensors, in bytes.
        rounds: how often the model and the algorithms are measured, in turn.
        calls: how often an algorithm is run in a round, besides those that line the ranks up.
    """

    on: tuple[int, ...]
    mbit_per_s: float
    sizes: tuple[int, ...] = tuple(MEGABYTE * 4**power // 4 for power in range(4))
    rounds: int = 3
    calls: int = 4


WORLDS = {
    "4x1": World((0, 1, 2, 3), 500),
    "2x2": World((0, 0, 1, 1), 1000),
    "4x2": World((0, 0, 1, 1, 2, 2, 3, 3), 500),
    "8x1": World((0, 1, 2, 3, 4, 5, 6, 7), 200, sizes=(MEGABYTE // 4, MEGABYTE, 4 * MEGABYTE)),
    "small": World((0, 0, 1, 1), 1000, sizes=(MEGABYTE // 4, MEGABYTE), rounds=1),
}


def algorithms(world: World) -> dict[str, Schedule]:
    """Return the all-reduces that are compared."""
    found: dict[str, Schedule] = {
        "ring": ring_all_reduce,
        "two_shot": two_shot_all_reduce,
        "halving_doubling": halving_doubling_all_reduce,
        "binomial": binomial_all_reduce,
    }
    if world.on.count(0) > 1:
        found["two_level"] = functools.partial(two_level_all_reduce, ranks_per_host=world.on.count(0))
    return found


def measure(world: World) -> tuple[HostTables, Times]:
    """Return what the ranks of this world find: the tables of the model, and what the algorithms take."""
    tables: list[HostTables] = []
    seconds: dict[str, dict[int, list[float]]] = {
        name: {size: [] for size in world.sizes} for name in algorithms(world)
    }
    with GlooCommunicator(timeout_s=TIMEOUT_S) as comm:
        where = placement(comm)
        runs = {name: AlgorithmCommunicator(comm, {"all_reduce": one}) for name, one in algorithms(world).items()}
        for _ in range(world.rounds):
            tables.append(measured_hosts(comm, where, MESSAGES, Clock(comm, BUDGET_S)))
            clock = Clock(comm)
            for nbytes in world.sizes:
                tensor = comm.empty(nbytes // 4).zero_()
                for name, run in runs.items():
                    action = functools.partial(run.all_reduce, tensor)
                    seconds[name][nbytes].append(clock.median(action, 1 + world.calls))
    return HostTables.median(tables), {
        name: {nbytes: median(times) for nbytes, times in row.items()} for name, row in seconds.items()
    }


def predicted(world: World, tables: HostTables) -> Times:
    """Return what the model says of each algorithm and size."""
    network, run = tables.network(), Run("all_reduce", len(world.on))
    return {
        name: {nbytes: simulate(one, run, nbytes, network).seconds for nbytes in world.sizes}
        for name, one in algorithms(world).items()
    }


def error(model: Times, clock: Times) -> float:
    """Return the mean factor between prediction and measurement, less 1."""
    factors = [model[name][size] / seconds for name, row in clock.items() for size, seconds in row.items()]
    return math.exp(sum(abs(math.log(factor)) for factor in factors) / len(factors)) - 1


def behind(model: Times, clock: Times) -> list[float]:
    """Return by size how much longer the model's choice takes than the best."""
    found = []
    for size in next(iter(clock.values())):
        chosen = min(model, key=lambda name: model[name][size])
        found.append(clock[chosen][size] / min(row[size] for row in clock.values()) - 1)
    return found


def on_hosts(world: World, name: str) -> tuple[HostTables, Times]:
    """Return what the ranks of a world find that is made for it."""
    with (
        Network(max(world.on) + 1, mbit_per_s=world.mbit_per_s) as network,
        network.start("tests.host_predictions", "--rank", name, on=world.on) as ranks,
    ):
        output = ranks.end(LIMIT_S)
    assert ranks.status == 0, output
    (line,) = (line for line in output.splitlines() if line.startswith("{"))
    return read(json.loads(line))


def read(found: dict[str, Any]) -> tuple[HostTables, Times]:
    """Return what a rank has written."""
    tables, clock = found["tables"], found["clock"]
    inside = None if tables["inside"] is None else Tables(**tables["inside"])
    times = {name: {int(size): seconds for size, seconds in row.items()} for name, row in clock.items()}
    return HostTables(**{**tables, "inside": inside}), times


def shown(model: Times, clock: Times) -> str:
    """Return a line per algorithm, and what comes of all."""
    lines = []
    for name, row in clock.items():
        cells = (f"{model[name][size] * 1e3:8.1f} / {seconds * 1e3:6.1f}" for size, seconds in row.items())
        lines.append(f"{name:18}{''.join(cells)}")
    late = ", ".join(f"{part:.0%}" for part in behind(model, clock))
    return "\n".join([*lines, f"geometric mean error {error(model, clock):.0%}; the choice is behind by {late}"])


def main(names: list[str]) -> None:
    """Measure and print, or be a rank of what is measured."""
    torch.set_num_threads(1)
    if names[:1] == ["--rank"]:
        tables, clock = measure(WORLDS[names[1]])
        if detect().rank == 0:
            print(json.dumps({"tables": dataclasses.asdict(tables), "clock": clock}) + "\n", end="", flush=True)
        return
    for name in names or ["4x1", "2x2", "4x2"]:
        world = WORLDS[name]
        tables, clock = on_hosts(world, name)
        sizes = "".join(f"{size // 1024:>14} KB" for size in world.sizes)
        print(f"{name} at {world.mbit_per_s:g} Mbit/s, predicted / measured ms\n{'':18}{sizes}")
        print(shown(predicted(world, tables), clock), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
