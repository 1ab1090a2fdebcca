"""What algorithms cost by the size of the tensor and by the number of ranks, and where the fastest one changes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from minidist.analysis.network import Network
from minidist.analysis.simulate import simulate
from minidist.collective import Run
from minidist.schedule import Schedule

_TIE = 1 + 1e-9
"""Times that agree to this factor differ by rounding."""


@dataclass(frozen=True)
class Crossover:
    """Where the fastest algorithm changes.

    Attributes:
        x: the size in bytes, or the number of ranks; between two samples it is interpolated, both axes logarithmic.
        seconds: what both take there.
        before, after: which algorithm is the fastest below x and above it.
    """

    x: float
    seconds: float
    before: str
    after: str


@dataclass(frozen=True)
class Curves:
    """Seconds of several algorithms at the same sizes, or on the same numbers of ranks.

    Attributes:
        xs: sizes in bytes, or numbers of ranks, ascending.
        seconds: by algorithm, one time per x, greater than 0.
    """

    xs: Sequence[float]
    seconds: dict[str, list[float]]

    def crossovers(self) -> list[Crossover]:
        """Return where the fastest algorithm changes, ascending; where two are equal, nothing changes."""
        found = []
        before = self.fastest()
        for index in range(1, len(self.xs)):
            after = self._fastest(index, before)
            if after != before:
                found.append(self._crossing(index, before, after))
            before = after
        return found

    def fastest(self) -> str:
        """Return which algorithm is the fastest at the first x; of several that are, the one that stays so longest."""
        names = list(self.seconds)
        for index in range(len(self.xs)):
            best = min(self.seconds[name][index] for name in names)
            names = [name for name in names if self.seconds[name][index] <= best * _TIE]
        return names[0]

    def _fastest(self, index: int, incumbent: str) -> str:
        best = min(self.seconds, key=lambda name: self.seconds[name][index])
        tied = self.seconds[incumbent][index] <= self.seconds[best][index] * _TIE
        return incumbent if tied else best

    def _crossing(self, index: int, before: str, after: str) -> Crossover:
        """Cut the two straight lines that join the samples before and at ``index`` in logarithms."""
        x0, x1 = (math.log(x) for x in self.xs[index - 1 : index + 1])
        old, new = ([math.log(time) for time in self.seconds[name][index - 1 : index + 1]] for name in (before, after))
        ahead = new[0] - old[0]
        behind = old[1] - new[1]
        part = max(ahead, 0.0) / (max(ahead, 0.0) + behind)
        return Crossover(math.exp(x0 + part * (x1 - x0)), math.exp(old[0] + part * (old[1] - old[0])), before, after)


SchedulesBySize = Mapping[str, Callable[[int], Schedule]]
"""By algorithm, what gives its schedule for a number of ranks."""


def over_sizes(
    algorithms: SchedulesBySize, world_size: int, sizes: Sequence[int], network: Network, collective: str, root: int
) -> Curves:
    """Return what the algorithms take at each size in bytes, on one number of ranks; see `simulate` for the rest."""

    def seconds(schedule: Schedule) -> list[float]:
        return [simulate(schedule, Run(collective, world_size, root), size, network).seconds for size in sizes]

    return Curves(sizes, {name: seconds(schedule_of(world_size)) for name, schedule_of in algorithms.items()})


def over_ranks(
    algorithms: SchedulesBySize, counts: Sequence[int], nbytes: float, network: Network, collective: str, root: int
) -> Curves:
    """Return what the algorithms take on each number of ranks, at one size; see `simulate` for the rest."""

    def seconds(schedule_of: Callable[[int], Schedule]) -> list[float]:
        return [simulate(schedule_of(count), Run(collective, count, root), nbytes, network).seconds for count in counts]

    return Curves(counts, {name: seconds(schedule_of) for name, schedule_of in algorithms.items()})
