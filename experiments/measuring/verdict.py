"""What trials of several methods come to: a row for each, and who is the first on each network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from experiments.measuring.contest import Trial, mean_or_none
from experiments.running.tables import Row

Trials = Mapping[str, Sequence[Trial]]
"""By method, in the order in which they are shown; the first one is what the others are compared to."""


@dataclass(frozen=True)
class Verdict:
    """What the contest of a task came to.

    Attributes:
        rows: a row per method.
        lines: who is the first, in words.
        picture: the file of its picture.
    """

    rows: Sequence[Row]
    lines: Sequence[str]
    picture: Path


def undisturbed(trials: Sequence[Trial]) -> list[Trial]:
    """Return the trials of one method, with the same seconds for all: from test to test, those of the fastest.

    Seeds differ in what is learned, not in how much is computed for it; and what disturbs a machine only adds.
    """
    between = [np.diff(trial.seconds, axis=0, prepend=0.0) for trial in trials]
    seconds = np.cumsum(np.min(between, axis=0), axis=0)
    exposed = np.min([trial.exposed for trial in trials], axis=0)
    return [replace(trial, seconds=seconds, exposed=exposed) for trial in trials]


def target_of(trials: Trials) -> float:
    """Return the loss that the first method has after half of its tests, the mean over its seeds."""
    baseline = next(iter(trials.values()))
    return float(np.mean([trial.losses[(len(trial.losses) - 1) // 2] for trial in baseline]))


def rows_of(task: str, trials: Trials, networks: Sequence[str], target: float) -> list[Row]:
    """Return a row per method, with means over its seeds."""
    per_step = {
        method: np.mean([trial.sent[-1] / trial.steps[-1] for trial in of_one]) for method, of_one in trials.items()
    }
    baseline = next(iter(per_step.values()))
    return [
        {
            "task": task,
            "method": method,
            "seeds": len(of_one),
            "loss": float(np.mean([trial.losses[-1] for trial in of_one])),
            "accuracy": float(np.mean([trial.accuracies[-1] for trial in of_one])),
            "bytes_per_step": float(per_step[method]),
            "fewer": float(baseline / per_step[method]) if per_step[method] else None,
            **_by_network(of_one, networks, target),
        }
        for method, of_one in trials.items()
    ]


def _by_network(trials: Sequence[Trial], networks: Sequence[str], target: float) -> dict[str, float | None]:
    reached = [trial.seconds_to(target) for trial in trials]
    found: dict[str, float | None] = {}
    for index, network in enumerate(networks):
        found[f"exposed_ms_{network}"] = 1e3 * float(np.mean([trial.exposed[index] for trial in trials]))
        found[f"target_s_{network}"] = mean_or_none([None if then is None else float(then[index]) for then in reached])
    return found


def winners(rows: Sequence[Row], networks: Sequence[str], target: float) -> list[str]:
    """Return one line per network: who reaches the target first there, and how much earlier than the first method."""
    return [_winner(rows, network, f"{rows[0]['task']} on {network}", target) for network in networks]


def _winner(rows: Sequence[Row], network: str, where: str, target: float) -> str:
    times = {row["method"]: row[f"target_s_{network}"] for row in rows if row[f"target_s_{network}"] is not None}
    if not times:
        return f"{where}: nobody reaches a loss of {target:.3f}"
    first = min(times, key=lambda method: times[method])
    baseline = rows[0]["method"]
    if first == baseline:
        return f"{where}: nothing is faster than {first}, which is at loss {target:.3f} after {times[first]:.3g} s"
    line = f"{where}: {first} is the first at loss {target:.3f}, after {times[first]:.3g} s"
    return line + (f", {times[baseline] / times[first]:.3g} times as fast as {baseline}" if baseline in times else "")
