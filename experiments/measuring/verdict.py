"""What trials of several methods come to: a row for each, and who is the first on each network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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


def target_of(trials: Trials, window: int) -> float:
    """Return the loss that the first method has after 3/4 of its steps, the mean over its seeds."""
    baseline = next(iter(trials.values()))
    return float(np.mean([trial.smoothed(window)[3 * len(trial.losses) // 4] for trial in baseline]))


def rows_of(task: str, trials: Trials, networks: Sequence[str], target: float, window: int) -> list[Row]:
    """Return a row per method, with means over its seeds."""
    per_step = {
        method: np.mean([trial.sent[-1] / len(trial.sent) for trial in of_one]) for method, of_one in trials.items()
    }
    baseline = next(iter(per_step.values()))
    return [
        {
            "task": task,
            "method": method,
            "seeds": len(of_one),
            "loss": float(np.mean([trial.test_loss for trial in of_one])),
            "accuracy": float(np.mean([trial.test_accuracy for trial in of_one])),
            "bytes_per_step": float(per_step[method]),
            "fewer": float(baseline / per_step[method]) if per_step[method] else None,
            **_by_network(of_one, networks, target, window),
        }
        for method, of_one in trials.items()
    ]


def _by_network(
    trials: Sequence[Trial], networks: Sequence[str], target: float, window: int
) -> dict[str, float | None]:
    reached = [trial.seconds_to(target, window) for trial in trials]
    found: dict[str, float | None] = {}
    for index, network in enumerate(networks):
        found[f"exposed_ms_{network}"] = 1e3 * float(np.mean([trial.exposed[index] for trial in trials]))
        found[f"target_s_{network}"] = mean_or_none([None if then is None else float(then[index]) for then in reached])
    return found


def winners(rows: Sequence[Row], networks: Sequence[str], target: float) -> list[str]:
    """Return one line per network: who reaches the target first there, and how much earlier than the first method."""
    lines = []
    for network in networks:
        times = {row["method"]: row[f"target_s_{network}"] for row in rows if row[f"target_s_{network}"] is not None}
        if not times:
            lines.append(f"{rows[0]['task']} on {network}: nobody reaches a loss of {target:.3f}")
            continue
        first = min(times, key=lambda method: times[method])
        line = f"{rows[0]['task']} on {network}: {first} is the first at loss {target:.3f}, after {times[first]:.3g} s"
        baseline = rows[0]["method"]
        if baseline in times and first != baseline:
            line += f", {times[baseline] / times[first]:.3g} times as fast as {baseline}"
        lines.append(line)
    return lines
