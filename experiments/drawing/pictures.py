"""The pictures of the benchmarks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.running.tables import Row

matplotlib.use("agg")
LIMIT = "limit"


def draw_bandwidth(path: Path, title: str, rows: Sequence[Row]) -> None:
    """Draw busbw and latency over size, a line per communicator; the limit dashed."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    bandwidth, latency = figure.subplots(1, 2)
    for name in dict.fromkeys(row["comm"] for row in rows):
        of_one = [row for row in rows if row["comm"] == name]
        style = {"color": "black", "linestyle": "--"} if name == LIMIT else {"marker": "o", "markersize": 3}
        sizes = [row["bytes"] for row in of_one]
        bandwidth.plot(sizes, [row["busbw_GBps"] for row in of_one], label=_label(name), **style)
        latency.plot(sizes, [row["latency_us"] for row in of_one], label=_label(name), **style)
    _finish(bandwidth, "busbw (GB/s)")
    _finish(latency, "latency (us)")
    bandwidth.legend()
    figure.suptitle(title)
    figure.savefig(path, dpi=120)


def draw_steps(path: Path, title: str, rows: Sequence[Row]) -> None:
    """Draw a stacked bar per variant of every model: the step without communication, and what comes on top."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    figure = Figure(figsize=(5.5 * len(models), 4), layout="constrained")
    for axes, model in zip(figure.subplots(1, len(models), squeeze=False)[0], models, strict=True):
        of_one = [row for row in rows if row["model"] == model]
        names = [row["variant"] for row in of_one]
        alone = [row["step_ms"] - row["exposed_ms"] for row in of_one]
        exposed = [row["exposed_ms"] for row in of_one]
        axes.barh(names, [min(a, a + e) for a, e in zip(alone, exposed, strict=True)], label="computation")
        axes.barh(names, [max(e, 0.0) for e in exposed], left=alone, label="exposed communication")
        axes.set_title(f"{model}, {of_one[0]['parameters_M']:.1f} M parameters")
        axes.set_xlabel("step (ms)")
        axes.invert_yaxis()  # the first one on top
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    figure.suptitle(title)
    figure.savefig(path, dpi=120)


def _label(name: str) -> str:
    return "limit of the memory" if name == LIMIT else name


def _finish(axes: Axes, name: str) -> None:
    axes.set(xscale="log", yscale="log", xlabel="size (bytes)", ylabel=name)
    axes.grid(visible=True, which="major", alpha=0.3)
