"""What one rank does in a collective, worked out once: its steps, and what of them has to wait for what."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from minidist.analysis.prove import prove
from minidist.collective import Run
from minidist.errors import ScheduleError
from minidist.schedule import Recv, Reduce, Schedule, Send, Step, Transfer, chunks_of, indices

log = logging.getLogger(__name__)
MAX_PROVED = 256
"""The most ranks on which a schedule is proved before it runs; that takes up to some ten seconds."""


@dataclass(frozen=True, slots=True)
class PlannedStep:
    """One step of one rank.

    Attributes:
        sends, arrivals: its transfers, by direction.
        sends_first: whether it reduces into what it sends, so that the sends have to leave before.
        in_order: whether several arrivals are reduced into one chunk, which is done in the order of their ranks.
        early: whether its receives may be posted before the step before it has ended, but for its sends: they overwrite
            nothing that one still uses. A peer's send then finds its receive waiting, which saves a message over most
            transports.
    """

    sends: Sequence[Send]
    arrivals: Sequence[Transfer]
    sends_first: bool
    in_order: bool
    early: bool


@dataclass(frozen=True, slots=True)
class Plan:
    """All steps of one rank in a run, and into how many chunks the collective cuts its memory."""

    run: Run
    num_chunks: int
    steps: Sequence[PlannedStep]


def planned(schedule: Schedule, run: Run, rank: int) -> Plan:
    """Return the plan of ``rank``."""
    steps = list(schedule(rank, *run.arguments))
    rows = [_planned_step(step, before) for step, before in zip(steps, [None, *steps], strict=False)]
    return Plan(run, chunks_of(schedule, run.name, run.world_size), rows)


def _planned_step(step: Step, before: Step | None) -> PlannedStep:
    sends = [move for move in step if isinstance(move, Send)]
    arrivals = [move for move in step if not isinstance(move, Send)]
    reduced = [chunk for move in step if isinstance(move, Reduce) for chunk in indices(move.chunk)]
    return PlannedStep(
        sends,
        arrivals,
        sends_first=not _chunks(step, Send).isdisjoint(reduced),
        in_order=len(reduced) > len(set(reduced)),
        early=before is not None and _chunks(before, Recv, Reduce).isdisjoint(_chunks(step, Recv)),
    )


def _chunks(step: Step, *kinds: type[Transfer]) -> set[int]:
    return {index for move in step if isinstance(move, kinds) for index in indices(move.chunk)}


def ensure_right(schedule: Schedule, run: Run, rank: int) -> None:
    """Prove a schedule on so many ranks, where that does not take too long.

    Raises:
        ScheduleError: it is wrong.
    """
    if run.world_size > MAX_PROVED:
        if rank == 0:
            log.warning(
                "%s: its schedule is not proved, as that takes long on more than %d ranks", run.name, MAX_PROVED
            )
        return
    try:
        prove(schedule, run)
    except ScheduleError as error:
        raise ScheduleError(f"the schedule is wrong on {run.world_size} ranks; {error}") from None
