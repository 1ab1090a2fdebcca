"""Chooses the algorithm of every operation by a model of the network and by its size."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from backends.algorithm import schedule_at
from backends.calibration import measured, slowest_median, tabled
from backends.clock import Clock
from backends.executor.executor import Executor
from backends.hierarchical import HierarchicalCommunicator
from backends.host_calibration import filled, in_turn, measured_hosts, placement
from backends.levels import Placement
from backends.two_level import two_level_on
from backends.wrapper import Wrapper
from minidist.analysis.network import Network, interpolated
from minidist.analysis.simulate import simulate
from minidist.collective import Run
from minidist.communicator import Communicator, Device, Shape
from minidist.contract import checks
from minidist.contract.inner import Inner
from minidist.errors import ScheduleError
from minidist.schedule import Schedule

log = logging.getLogger(__name__)
Seconds = dict[str, float]
SIZES = tuple(4096 * 4**power for power in range(7))
"""What is measured, in bytes: 4 KB to 16 MB."""
LIMIT_S = 0.04
"""How long one thing is measured at one size; 12 things at 7 sizes take 3.4 s, and the ranks start together."""
MARGIN = 0.85
"""A schedule is taken if the model has it at this part of the transport's own time, as the model errs by some 15 %."""
TIMED = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")
"""The collectives that there is a choice for."""
OWN = "its own"
"""What a transport does without a schedule."""
HIERARCHY = "hierarchical"
"""What is made of one communicator in each host, and one between them."""
Times = dict[str, dict[str, list[float]]]
"""Seconds by collective, by what was measured, and by size."""


class Way(NamedTuple):
    """One way of a collective.

    Attributes:
        name: of it.
        run: its hook.
    """

    name: str
    run: Callable[..., None]


class AutoCommunicator(Wrapper):
    """Runs each collective by whatever is fastest for so many bytes: a schedule, or the transport's own way.

    What a schedule takes is simulated on the model of the network, what the transport's own way takes is measured. The
    choice is made once for each power of two of the size, alike on all ranks, as all have rank 0's measurements. A
    collective that is not named is left to the transport, and so is a split.

    On several hosts of several ranks there is more to choose from: a hierarchy of ``intra`` and the transport, which is
    measured as well; and where the hosts have equally many ranks, two levels of rings.

    Args:
        transport: see `AlgorithmCommunicator`.
        schedules: the schedules to choose from, or their dotted paths, by collective.
        network: the model, rank 0's; None measures the transport.
        timeout_s, segment_bytes: see `AlgorithmCommunicator`.
        budget_s: how long measuring takes, in seconds. Where the machine or the line is too slow for all sizes, what
            the others take is interpolated, and extrapolated; on one host from two sizes at the least.
        intra: see `HierarchicalCommunicator`, for memory of the host; None leaves hierarchies out.

    Raises:
        ValueError: there is no choice for one of the collectives, or ``budget_s`` is not above 0.
    """

    def __init__(
        self,
        transport: Communicator,
        schedules: Mapping[str, Sequence[Schedule | str]],
        network: Network | None = None,
        timeout_s: float | None = None,
        segment_bytes: int = 2**22,
        budget_s: float = 5.0,
        intra: Callable[..., Communicator] | None = None,
    ) -> None:
        super().__init__(transport, timeout_s)
        if not budget_s > 0:
            raise ValueError(f"budget_s must be greater than 0 seconds, got {budget_s}")
        if unknown := schedules.keys() - TIMED:
            raise ValueError(f"auto chooses between schedules of {', '.join(TIMED)}, not of {min(unknown)}")
        self.transport = transport
        self._segment_bytes = checks.segment_bytes(segment_bytes)
        self._fastest = functools.cache(self._find_fastest)
        clock, where = Clock(transport, budget_s), placement(transport)
        more = {"all_reduce": [two_level_on(where.ranks_of)]} if where.has_levels and where.is_even else {}
        self._choices = {
            name: list(self._right(name, [*some, *more.get(name, [])])) for name, some in schedules.items()
        }
        # What is measured, and not simulated; memory of the host is none of a device.
        self._others: dict[str, Communicator] = {OWN: transport}
        if where.has_levels and intra is not None and self.device_type == "cpu":
            self._others[HIERARCHY] = HierarchicalCommunicator(intra, transport, timeout_s)
        self._seconds: Times = {}
        if self.world_size > 1:
            if len(where.ranks_of) == 1:
                found = self._measured(network, budget_s)
            else:
                found = self._measured_on_hosts(network, where, clock, budget_s / 2)
            # All ranks have to choose alike, so they have what rank 0 has.
            self._network, self._sizes, self._seconds = transport.broadcast_object(found, 0)

    def _measured(self, network: Network | None, budget_s: float) -> tuple[Network, Sequence[int], Times]:
        """Return the model, and what the transport's own way of each collective takes at each size."""
        rows = dict[int, Seconds]()
        own = dict[int, Seconds]()
        took = dict[int, float]()
        began = time.monotonic()
        for nbytes in in_order(SIZES):
            if not self.transport.broadcast_object(fits(took, nbytes, budget_s), 0):
                if self.rank == 0:
                    log.info("auto measured %d of %d sizes in %g s", len(own), len(SIZES), time.monotonic() - began)
                break
            started = time.monotonic()
            if network is None:
                rows[nbytes] = measured(self.transport, nbytes, iterations=3, limit_s=LIMIT_S)
            own[nbytes] = {name: own_seconds(self.transport, name, nbytes) for name in self._choices}
            took[nbytes] = time.monotonic() - started
        sizes = sorted(own)
        times = {name: {OWN: [own[nbytes][name] for nbytes in sizes]} for name in self._choices}
        return tabled(self.world_size, rows).network() if network is None else network, sizes, times

    def _measured_on_hosts(
        self, network: Network | None, where: Placement, clock: Clock, model_s: float
    ) -> tuple[Network, Sequence[int], Times]:
        """Do the same for several hosts and for all that is measured; the model has ``model_s`` from the start."""
        if network is None:
            network = measured_hosts(self.transport, where, SIZES, clock.within(model_s)).network()
        times: Times = {}
        found = {(name, other): dict[int, float]() for name in self._choices for other in self._others}
        for nbytes in in_turn(SIZES):
            for name, other in found:
                prepare = functools.partial(own_action, self._others[other], name, nbytes)
                seconds = clock.seconds(f"{name} {other}", nbytes, prepare)
                if seconds is not None:
                    found[name, other][nbytes] = seconds
        for (name, other), row in found.items():
            times.setdefault(name, {})[other] = filled(row, SIZES)
        return network, SIZES, times

    def _right(self, collective: str, schedules: Sequence[Schedule | str]) -> Iterator[Executor]:
        """Yield what runs each of the schedules that are right on so many ranks."""
        for path in schedules:
            found = {collective: schedule_at(collective, path)}
            executor = Executor(self._inner, found, self._schedule_tag, self._segment_bytes, proves=True)
            try:
                executor.plan(collective)
            except ScheduleError as error:
                if self.rank == 0:
                    log.warning("auto leaves out %s: %s", path, error)
            else:
                yield executor

    def choice(self, collective: str, nbytes: int) -> str:
        """Return the name of what runs ``collective`` on so many bytes, those of its larger tensor."""
        return self._fastest(collective, _power_of_two(nbytes)).name if collective in self._seconds else OWN

    def empty(self, shape: Shape, dtype: torch.dtype = torch.float32, device: Device = None) -> Tensor:
        return self._others.get(HIERARCHY, self.transport).empty(shape, dtype, device)

    def _collective(self, name: str) -> Callable[..., None]:
        if name not in self._seconds:
            return super()._collective(name)

        def run_fastest(*args: Any) -> None:
            nbytes = max(arg.nbytes for arg in args if isinstance(arg, Tensor))
            self._fastest(name, _power_of_two(nbytes)).run(*args)

        return run_fastest

    def _find_fastest(self, collective: str, nbytes: int) -> Way:
        """Return the fastest way; a schedule only where it is clearly faster than what was measured."""
        seconds: list[tuple[float, Way]] = []
        for name, row in self._seconds[collective].items():
            way = Way(name, Inner(self._others[name]).collective(collective))
            seconds.append((interpolated(self._sizes, row, nbytes) * MARGIN, way))
        for executor in self._choices[collective]:
            schedule = executor.schedules[collective]
            run = Run(collective, self.world_size)
            way = Way(_name(schedule), getattr(executor, collective))
            seconds.append((simulate(schedule, run, nbytes, self._network).seconds, way))
        return min(seconds, key=lambda one: one[0])[1]

    def _close(self) -> None:
        for other in reversed(self._others.values()):  # a hierarchy closes the transport too
            other.close()

    def _abort(self, reason: str) -> None:
        for other in self._others.values():
            other.abort(reason)


def _name(schedule: Schedule) -> str:
    while isinstance(schedule, functools.partial):
        schedule = schedule.func
    return str(getattr(schedule, "__name__", schedule))


def _power_of_two(nbytes: int) -> int:
    """Return the next power of two, for which the choice is made."""
    return 1 << max(nbytes - 1, 0).bit_length()


def own_seconds(transport: Communicator, collective: str, nbytes: int) -> float:
    """Return what the transport's own way of one of TIMED takes; every rank calls it."""
    action = own_action(transport, collective, nbytes)
    return slowest_median(transport, action, nbytes, iterations=5, limit_s=LIMIT_S)


def own_action(comm: Communicator, collective: str, nbytes: int) -> Callable[[], object]:
    """Return what calls one of TIMED on so many bytes."""
    block = max(nbytes // 4 // comm.world_size, 1)
    large, other = (comm.empty(block * comm.world_size).zero_() for _ in range(2))
    calls: dict[str, Callable[[], object]] = {
        "all_reduce": lambda: comm.all_reduce(large),
        "all_gather": lambda: comm.all_gather(large, other[:block]),
        "reduce_scatter": lambda: comm.reduce_scatter(other[:block], large),
        "all_to_all": lambda: comm.all_to_all(other, large),
    }
    return calls[collective]


def in_order(sizes: Sequence[int]) -> list[int]:
    """Return the sizes so that the first ones say most: the smallest, one past the middle, those between, the rest."""
    first, *between = sizes[: (len(sizes) + 1) // 2]
    second, *rest = sizes[(len(sizes) + 1) // 2 :]
    return [first, second, *between, *rest]


def fits(took: Mapping[int, float], nbytes: int, budget_s: float) -> bool:
    """Whether another size can be measured, after some that ``took`` so many seconds each; two are in any case."""
    if len(took) < 2:
        return True
    expected = max(took.values()) * max(nbytes / max(took), 1.0)
    return sum(took.values()) + expected < budget_s
