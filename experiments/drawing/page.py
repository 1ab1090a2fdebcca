"""A page that steps through a schedule: the messages of each step, and what every chunk holds after it.

The page is one file with everything in it, for any browser without a network.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from experiments.drawing.diagrams import chunk_colours, spell_chunks, spell_seconds
from minidist.analysis.execution import RankState
from minidist.analysis.prove import Held, Value, prove
from minidist.analysis.simulate import Message
from minidist.collective import Run
from minidist.schedule import Schedule, Step, chunks_of, num_chunks

TEMPLATE = Path(__file__).with_suffix(".html")
Contributions = list[tuple[int, int]]
"""(rank, chunk): what that rank had in that chunk at the start."""


@dataclass(frozen=True)
class Change:
    """A chunk of one rank that holds something else after a step.

    Attributes:
        rank, chunk: which.
        complete: whether that is what the collective promises of it.
        holds: the contributions in it.
    """

    rank: int
    chunk: int
    complete: bool
    holds: Contributions


@dataclass
class Frame:
    """What is seen at once.

    Attributes:
        messages: what travels; empty at the start.
        changes: what is different afterwards; at the start, all that there is.
    """

    messages: list[Message] = field(default_factory=list)
    changes: list[Change] = field(default_factory=list)


def frames(schedule: Schedule, run: Run, messages: Sequence[Message]) -> list[Frame]:
    """Return the start, and then one frame per step.

    Where all ranks take all steps together, these are the ranks' own steps. Elsewhere a message is shown as early as
    both of its ranks can have come to it: the second step of a tree can be the first one of a rank.

    Args:
        schedule: what is proved, which gives the holdings.
        run: the collective and its ranks.
        messages: of the same schedule, in the order in which they began.

    Raises:
        ScheduleError: the schedule is wrong.
    """
    shown: list[Frame] = [Frame()]
    ends = [0] * run.world_size  # by rank: the frame in which its last step ended
    step_ends = {(rank, -1): 0 for rank in range(run.world_size)}
    begins: dict[tuple[int, int], int] = {}
    for message in messages:
        places = ((message.src, message.src_step), (message.dst, message.dst_step))
        number = max(begins.setdefault(place, ends[place[0]] + 1) for place in places)
        for place in places:
            ends[place[0]] = max(ends[place[0]], number)
            step_ends[place] = max(step_ends.get(place, 0), number)
        shown.extend(Frame() for _ in range(number + 1 - len(shown)))
        shown[number].messages.append(message)
    for place, change in _changes(schedule, run):
        if place in step_ends:  # nothing changes in a step without a message
            shown[step_ends[place]].changes.append(change)
    return shown


def write_page(path: Path, title: str, run: Run, shown: Sequence[Frame]) -> None:
    """Write the page of some frames.

    Args:
        path: of the HTML file.
        title: its heading.
        run: the collective and its ranks.
        shown: from `frames`.
    """
    rows = sorted({change.chunk for frame in shown for change in frame.changes})
    data = {
        "collective": run.name,
        "worldSize": run.world_size,
        "rows": rows,
        "colours": chunk_colours(1 + max(rows, default=0)),
        "frames": [_packed(frame) for frame in shown],
    }
    text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")  # nothing can end the script element
    page = TEMPLATE.read_text(encoding="utf-8").replace("{{title}}", escape(title)).replace("{{data}}", text)
    path.write_text(page, encoding="utf-8")


def _packed(frame: Frame) -> dict[str, Any]:
    times = [time for message in frame.messages for time in (message.begins, message.ends)]
    return {
        "time": f"{spell_seconds(min(times))} to {spell_seconds(max(times))}" if times else "",
        "messages": [
            {"src": message.src, "dst": message.dst, "label": spell_chunks(message), "reduces": message.reduces}
            | {"chunk": next(iter(message.sent), 0)}
            for message in frame.messages
        ],
        "changes": [asdict(change) for change in frame.changes],
    }


def _changes(schedule: Schedule, run: Run) -> Iterator[tuple[tuple[int, int], Change]]:
    """Yield (rank, step) and what it changed; step -1 is the start."""
    now: dict[tuple[int, int], Value] = {}
    changes: list[tuple[tuple[int, int], int, Value]] = []

    def observe(rank: RankState, held: Held) -> None:
        for chunk in range(count):
            place = rank.rank, chunk
            if rank.step >= 0 and place in held and (place not in now or now[place].counts != held[place].counts):
                now[place] = held[place]
                changes.append(((rank.rank, rank.step - 1), chunk, held[place]))

    count = chunks_of(schedule, run.name, run.world_size)
    prove(_from_the_start(schedule, count), run, observe)
    for (rank, step), chunk, value in changes:
        promised = run.collective.ends(run, rank, chunk)
        complete = promised is not None and value.counts == now[rank, chunk].counts
        yield (rank, step), Change(rank, chunk, complete, sorted(value.contributions()))


def _from_the_start(schedule: Schedule, count: int) -> Schedule:
    """Return the schedule with an empty step before its first, after which the prover shows what ranks begin with."""

    def steps(*args: int) -> Iterator[Step]:
        yield ()
        yield from schedule(*args)

    return num_chunks(count)(steps)
