"""What the benchmarks share: several communicators in one run, measured in turn, so that noise hits all alike."""

from __future__ import annotations

import csv
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.core.hydra_config import HydraConfig

from experiments.communicators import build, check_available
from minidist.communicator import Communicator

Row = dict[str, Any]


@contextmanager
def communicators(names: Sequence[str]) -> Iterator[dict[str, Communicator]]:
    """Make the communicators that ``names`` (``gloo``, ``ring/mpi``) stand for; close them at the end.

    Each rank gets one thread for its arithmetic: what is compared is communication.
    """
    torch.set_num_threads(1)
    sections = {name: hydra.compose("config", overrides=_overrides(name)).comm for name in names}
    for section in sections.values():
        check_available(section)
    with ExitStack() as stack:
        yield {name: stack.enter_context(build(section, "comm")) for name, section in sections.items()}


def _overrides(name: str) -> list[str]:
    groups = ("comm", "comm/transport", "comm/transport/transport")
    return [f"{group}={choice}" for group, choice in zip(groups, name.split("/"), strict=False)]


def interleaved(
    actions: Mapping[str, Callable[[], None]], comm: Communicator, warmup: int, iterations: int
) -> dict[str, list[float]]:
    """Run every action in turn, again and again; return the seconds of the slowest rank, by action.

    ``comm`` lines the ranks up before each run, and gathers what they measured.
    """
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for iteration in range(warmup + iterations):
        for name, action in actions.items():
            comm.barrier()
            started = time.perf_counter()
            action()
            if iteration >= warmup:
                seconds[name].append(time.perf_counter() - started)
    by_rank = comm.all_gather_object(seconds)
    return {name: [max(times) for times in zip(*(rank[name] for rank in by_rank), strict=True)] for name in actions}


def median(seconds: Sequence[float]) -> float:
    """Return the median."""
    return statistics.median(seconds)


def percentile_95(seconds: Sequence[float]) -> float:
    """Return the value that 95 % of ``seconds`` do not exceed."""
    ordered = sorted(seconds)
    return ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))]


def report(title: str, rows: Sequence[Row], formats: Mapping[str, str], name: str) -> None:
    """Print the columns that ``formats`` names beneath ``title``, and write all as CSV to the run's directory."""
    cells = [list(formats), *([format(row[column], how) for column, how in formats.items()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    print(title)
    for line in cells:
        print("  ".join(f"{cell:>{width}}" for cell, width in zip(line, widths, strict=True)))
    path = Path(HydraConfig.get().runtime.output_dir) / name
    _write_csv(path, rows)
    print(f"written: {path}", flush=True)


def _write_csv(path: Path, rows: Sequence[Row]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
