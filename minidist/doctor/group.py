"""What is known of one communicator from the files of its ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from minidist.contract.diagnosis import diagnose, ranks
from minidist.contract.standing import Call, Standing

Row = tuple[str, ...]


@dataclass(frozen=True)
class Told:
    """What one file tells of one communicator.

    Attributes:
        name: the communicator.
        ranks: its ranks, as the world calls them; empty where the file does not say it: then all that have files.
        standing: of the rank that wrote it, by its number in the world.
        heard: of others, as far as they had answered it.
    """

    name: str
    ranks: tuple[int, ...]
    standing: Standing
    heard: tuple[Standing, ...] = ()


@dataclass
class Group:
    """One communicator.

    Attributes:
        name, ranks: see `Told`.
        standings: of each rank that wrote a file, and of those that did not what they told others.
    """

    name: str
    ranks: tuple[int, ...]
    standings: dict[int, Standing] = field(default_factory=dict)

    def diagnosis(self) -> list[str]:
        """Return in sentences who waits for whom."""
        missing = sorted(set(self.ranks) - set(self.standings))
        said = diagnose(self.standings, self.ranks, gone=missing)
        if missing and self.standings:
            said.append(f"there is no record of {ranks(missing)}: it may have been killed")
        return said

    def table(self, num_calls: int) -> list[str]:
        """Return the last calls of each rank as lines."""
        rows: list[Row] = [("rank", "call", "what", "at", "state", "ago", "took")]
        for rank, standing in sorted(self.standings.items()):
            rows += [_row(rank, call) for call in standing.calls[-num_calls:]]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _row(rank: int, call: Call) -> Row:
    number = "" if call.number is None else f"#{call.number}"
    took = "" if call.took is None else f"{call.took * 1e3:.3g} ms"
    return str(rank), number, call.what, call.where, call.state, f"{call.seconds:.3g} s", took


def grouped(told: Sequence[Told]) -> list[Group]:
    """Return the communicators of these files; the k-th of a name and ranks in one file is the k-th in all."""
    everyone = tuple(sorted({one.standing.rank for one in told}))
    groups: dict[tuple[str, tuple[int, ...], int], Group] = {}
    num_seen: dict[tuple[str, tuple[int, ...], int], int] = {}
    for one in told:
        members = one.ranks or everyone
        seen = (one.name, members, one.standing.rank)
        num_seen[seen] = num_seen.get(seen, -1) + 1
        group = groups.setdefault((one.name, members, num_seen[seen]), Group(one.name, members))
        group.standings[one.standing.rank] = one.standing
        for standing in one.heard:
            group.standings.setdefault(standing.rank, standing)  # what a rank wrote itself is newer
    return list(groups.values())
