"""Lets two hosts of two ranks do random things for long, and says what was left: ``python -m tests.soak 30 gloo ring``.

The arguments are minutes, and the communicators of `tests.host_ranks` that have so many each, in turn.
"""

from __future__ import annotations

import re
import sys
import tempfile

from tests.hosts import Network
from tests.soak_ranks import WARM_UP_S, Held

HELD = r"Held\(files=(\d+), heaps=(\d+), threads=(\d+), bytes=(\d+)\)"
HAS = re.compile(rf"rank (\d): has {HELD}")
BEGIN, END = (re.compile(rf"rank (\d): {phase} with {HELD} after (.*)") for phase in ("begins", "ends"))
START_S = 120.0
LEFT_OVER = Held(files=20, heaps=8, threads=8, bytes=2**28)
"""What the last operations may leave for a while; a leak is one for each of thousands."""


def soak(kind: str, seconds: float) -> list[str]:
    """Run one kind of communicator; return a line for each rank.

    Raises:
        AssertionError: a rank got a wrong result, failed, or has more than it should in the end.
    """
    with (
        tempfile.TemporaryDirectory() as directory,
        Network(2, mbit_per_s=1000) as network,
        network.start("tests.soak_ranks", kind, str(seconds), directory, on=(0, 0, 1, 1)) as ranks,
    ):
        output = ranks.end(START_S + WARM_UP_S + 2 * seconds)
    assert ranks.status == 0, output
    assert output.count("left") == 4, output
    begins = {rank: Held(*map(int, counts)) for rank, *counts, _ in BEGIN.findall(output)}
    megabytes = {rank: [int(line[-1]) >> 20 for line in HAS.findall(output) if line[0] == rank] for rank in begins}
    lines = list[str]()
    for rank, *counts, what in sorted(END.findall(output)):
        begin, end = begins[rank], Held(*map(int, counts))
        for name, was, now, most in zip(Held._fields, begin, end, LEFT_OVER, strict=True):
            assert now <= was + most, f"{kind}, rank {rank}: {was} {name} before, {now} after {what}\n{output}"
        changes = (f"{name} {was} to {now}" for name, was, now in zip(Held._fields, begin, end, strict=True))
        steps = megabytes[rank][:: max(len(megabytes[rank]) // 8, 1)]
        lines.append(f"{kind}, rank {rank}: {', '.join(changes)}, {what}; MB on the way: {steps}")
    return lines


def main(minutes: str, *kinds: str) -> None:
    """Print the lines of all kinds."""
    for kind in kinds:
        print("\n".join(soak(kind, float(minutes) * 60)), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
