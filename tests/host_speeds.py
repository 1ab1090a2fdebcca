"""What an all-reduce takes on hosts: ``python -m tests.host_speeds``, as root, on a quiet machine.

For each size it prints the milliseconds of every communicator, all measured in turn in one run, and what the line
between the hosts allows: each host has to send and receive 2 (h - 1) / h of the tensor, for h hosts.
Names of communicators may follow: ``python -m tests.host_speeds gloo hierarchical``.
"""

from __future__ import annotations

import functools
import json
import sys
from statistics import median

import torch

from backends.clock import Clock
from minidist.launch import detect
from tests.host_ranks import MAKE
from tests.hosts import Network

ON = (0, 0, 1, 1)
MBIT_PER_S = 1000.0
SIZES = [2**16 * 4**power for power in range(5)]
ROUNDS = 5
CALLS = 5
KINDS = ("gloo", "ring", "two_level", "hierarchical", "hierarchical_ring")
LIMIT_S = 600.0
Times = dict[str, list[float]]
"""Seconds at each size, by communicator."""


def measure(kinds: list[str]) -> Times:
    """Return what all-reduces take on the slowest rank: the median of rounds in which all take turns."""
    seconds: dict[str, list[list[float]]] = {kind: [[] for _ in SIZES] for kind in kinds}
    comms = {kind: MAKE[kind]() for kind in kinds}
    for index, nbytes in enumerate(SIZES):
        tensors = {kind: comm.empty(nbytes // 4).zero_() for kind, comm in comms.items()}
        for _ in range(ROUNDS):
            for kind, comm in comms.items():
                action = functools.partial(comm.all_reduce, tensors[kind])
                seconds[kind][index].append(Clock(comm).median(action, 1 + CALLS))
    for comm in comms.values():
        comm.close()
    return {kind: [median(times) for times in rows] for kind, rows in seconds.items()}


def limit_s(nbytes: int) -> float:
    """Return what the line allows."""
    hosts = max(ON) + 1
    return 2 * (hosts - 1) / hosts * nbytes * 8 / (MBIT_PER_S * 1e6)


def main(kinds: list[str]) -> None:
    """Measure and print, or be a rank of what is measured."""
    torch.set_num_threads(1)
    if kinds[:1] == ["--rank"]:
        found = measure(kinds[1:])
        if detect().rank == 0:
            print(json.dumps(found) + "\n", end="", flush=True)
        return
    kinds = kinds or list(KINDS)
    with (
        Network(max(ON) + 1, mbit_per_s=MBIT_PER_S) as network,
        network.start("tests.host_speeds", "--rank", *kinds, on=ON) as ranks,
    ):
        output = ranks.end(LIMIT_S)
    assert ranks.status == 0, output
    (line,) = (line for line in output.splitlines() if line.startswith("{"))
    print(f"2 hosts of 2 ranks at {MBIT_PER_S:g} Mbit/s, ms" + "".join(f"{size // 1024:>9} KB" for size in SIZES))
    rows = {**json.loads(line), "what the line allows": [limit_s(size) for size in SIZES]}
    for kind, row in rows.items():
        print(f"{kind:34}" + "".join(f"{seconds * 1e3:12.1f}" for seconds in row))


if __name__ == "__main__":
    main(sys.argv[1:])
