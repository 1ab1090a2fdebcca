"""Chooses the algorithm of every operation by a model of the network and by its size."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from backends.algorithm import schedule_at
from backends.calibration import measured, slowest_median, tabled
from backends.executor.executor import Executor
from backends.wrapper import Wrapper
from minidist.analysis.network import Network, interpolated
from minidist.analysis.simulate import simulate
from minidist.collective import Run
from minidist.communicator import Communicator
from minidist.contract import checks
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


class AutoCommunicator(Wrapper):
    """Runs each collective by whatever is fastest for so many bytes: a schedule, or the transport's own way.

    What a schedule takes is simulated on the model of the network, what the transport's own way takes is measured. The
    choice is made once for each power of two of the size, alike on all ranks, as all have rank 0's measurements. A
    collective that is not named is left to the transport, and so is a split.

    Args:
        transport: see `AlgorithmCommunicator`.
        schedules: the schedules to choose from, or their dotted paths, by collective.
        network: the model, rank 0's; None measures the transport.
        timeout_s, segment_bytes: see `AlgorithmCommunicator`.
        budget_s: how long measuring takes, in seconds. Where the machine is too busy for all sizes, what the others
            take is interpolated, and extrapolated from two sizes at the least.

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
    ) -> None:
        super().__init__(transport, timeout_s)
        if not budget_s > 0:
            raise ValueError(f"budget_s must be greater than 0 seconds, got {budget_s}")
        if unknown := schedules.keys() - TIMED:
            raise ValueError(f"auto chooses between schedules of {', '.join(TIMED)}, not of {min(unknown)}")
        self.transport = transport
        self._segment_bytes = checks.segment_bytes(segment_bytes)
        self._choices = {name: list(self._right(name, some)) for name, some in schedules.items()}
        self._fastest = functools.cache(self._find_fastest)
        self._own: dict[str, list[float]] = {}
        if self.world_size > 1:
            rows, own = self._measured(network is None, budget_s)
            model = network if network is not None else tabled(self.world_size, rows).network()
            self._sizes = sorted(own)
            times = {name: [own[nbytes][name] for nbytes in self._sizes] for name in schedules}
            # All ranks have to choose alike, so they have what rank 0 has.
            self._network, self._own = transport.broadcast_object((model, times), 0)

    def _measured(self, with_exchanges: bool, budget_s: float) -> tuple[dict[int, Seconds], dict[int, Seconds]]:
        """Return what exchanges take at each size, and what the transport's own way of each collective takes."""
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
            if with_exchanges:
                rows[nbytes] = measured(self.transport, nbytes, iterations=3, limit_s=LIMIT_S)
            own[nbytes] = {name: own_seconds(self.transport, name, nbytes) for name in self._choices}
            took[nbytes] = time.monotonic() - started
        return rows, own

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
        executor = self._fastest(collective, _power_of_two(nbytes)) if collective in self._own else None
        if executor is None:
            return OWN
        return str(getattr(executor.schedules[collective], "__name__", executor.schedules[collective]))

    def _collective(self, name: str) -> Callable[..., None]:
        own = super()._collective(name)
        if name not in self._own:
            return own

        def run_fastest(*args: Any) -> None:
            nbytes = max(arg.nbytes for arg in args if isinstance(arg, Tensor))
            executor = self._fastest(name, _power_of_two(nbytes))
            hook = own if executor is None else getattr(executor, name)
            hook(*args)

        return run_fastest

    def _find_fastest(self, collective: str, nbytes: int) -> Executor | None:
        """Return what runs the fastest schedule; None where the transport's own way is faster."""
        own = interpolated(self._sizes, self._own[collective], nbytes) * MARGIN
        seconds: list[tuple[float, Executor | None]] = [(own, None)]
        for executor in self._choices[collective]:
            schedule = executor.schedules[collective]
            seconds.append(
                (simulate(schedule, Run(collective, self.world_size), nbytes, self._network).seconds, executor)
            )
        return min(seconds, key=lambda one: one[0])[1]


def _power_of_two(nbytes: int) -> int:
    """Return the next power of two, for which the choice is made."""
    return 1 << max(nbytes - 1, 0).bit_length()


def own_seconds(transport: Communicator, collective: str, nbytes: int) -> float:
    """Return what the transport's own way of one of TIMED takes; every rank calls it."""
    block = max(nbytes // 4 // transport.world_size, 1)
    large, other = (transport.empty(block * transport.world_size).zero_() for _ in range(2))
    calls: dict[str, Callable[[], object]] = {
        "all_reduce": lambda: transport.all_reduce(large),
        "all_gather": lambda: transport.all_gather(large, other[:block]),
        "reduce_scatter": lambda: transport.reduce_scatter(other[:block], large),
        "all_to_all": lambda: transport.all_to_all(other, large),
    }
    return slowest_median(transport, calls[collective], nbytes, iterations=5, limit_s=LIMIT_S)


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
