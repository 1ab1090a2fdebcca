"""Schedules over a transport: the communicator of every algorithm."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Mapping

from backends.executor.executor import Executor
from backends.wrapper import Wrapper
from minidist.collective import COLLECTIVES
from minidist.communicator import Communicator
from minidist.contract import checks
from minidist.schedule import Schedule


class AlgorithmCommunicator(Wrapper):
    """Runs the collectives that it has schedules for; the transport does everything else. See `Wrapper`.

    A schedule is proved for the world size when it is first used, on every rank, before it touches a tensor. A split
    runs the same schedules over a split of the transport.

    Args:
        transport: the communicator that moves the bytes.
        schedules: a schedule, or the dotted path of one, by the name of its collective; None is the transport's own.
        timeout_s: None for the transport's.
        segment_bytes: see `ScheduledCommunicator`.
        proves: whether schedules are proved before they run; not for steps that are no collective, as in measurements.

    Raises:
        ValueError: a schedule cannot be found, or there is no such collective.
    """

    def __init__(
        self,
        transport: Communicator,
        schedules: Mapping[str, Schedule | str | None],
        timeout_s: float | None = None,
        segment_bytes: int = 2**22,
        proves: bool = True,
    ) -> None:
        super().__init__(transport, timeout_s)
        self.transport = transport
        self.segment_bytes = checks.segment_bytes(segment_bytes)
        self.schedules = {
            name: schedule_at(name, schedule) for name, schedule in schedules.items() if schedule is not None
        }
        self.executor = Executor(self._inner, self.schedules, self._schedule_tag, segment_bytes, proves)

    def _collective(self, name: str) -> Callable[..., None]:
        hook: Callable[..., None] = (
            getattr(self.executor, name) if name in self.schedules else super()._collective(name)
        )
        return hook

    def _split(self, groups: list[list[int]]) -> Communicator | None:
        child = self._inner.split(groups)
        return (
            None if child is None else AlgorithmCommunicator(child, self.schedules, self.timeout_s, self.segment_bytes)
        )


def schedule_at(collective: str, schedule: Schedule | str) -> Schedule:
    """Return what a dotted path names; a schedule is returned as it is.

    Raises:
        ValueError: there is nothing of that name, or no such collective.
    """
    if collective not in COLLECTIVES:
        raise ValueError(f"{collective} is not a collective; there are schedules for {', '.join(COLLECTIVES)}")
    if not isinstance(schedule, str):
        return schedule
    try:
        found: Schedule = pkgutil.resolve_name(schedule)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"the schedule {schedule} of {collective} cannot be imported: {error}") from error
    if not callable(found):
        raise ValueError(f"{schedule} is not a schedule but {found!r}; a schedule is a generator function")
    return found
