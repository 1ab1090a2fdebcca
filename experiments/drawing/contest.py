"""Loss against samples, bytes and seconds, a line per method; and a page with the tables and these pictures."""

from __future__ import annotations

import base64
import itertools
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

from experiments.measuring.verdict import Trials

matplotlib.use("agg")
COLUMNS = 3
"""Pictures beside each other."""
MARK_EVERY = 4
"""Tests from one mark of a line to the next."""
MARKS = "so^vDP*X<>dph"
PAGE = """<!doctype html>
<meta charset="utf-8">
<title>{title}</title>
<style>body {{ font-family: sans-serif; max-width: 90em; margin: 2em auto }} img {{ max-width: 100% }}</style>
<h1>{title}</h1>
{parts}
"""


def draw_contest(path: Path, title: str, trials: Trials, networks: Sequence[str], samples: int, target: float) -> None:
    """Draw the test loss over samples, bytes, and seconds on each network: means over the seeds.

    Args:
        path: of the PNG file.
        title: above all.
        trials: by method; the first one is black, beneath the others, and each has a mark of its own.
        networks: in the order of the times of the trials.
        samples: of all ranks in a step.
        target: the loss to reach, a dotted line.
    """
    rows = (2 + len(networks) + COLUMNS - 1) // COLUMNS
    figure = Figure(figsize=(5 * COLUMNS, 4 * rows + 1), layout="constrained")
    axes = list(figure.subplots(rows, COLUMNS, sharey=True, squeeze=False).flat)
    for one in axes[2 + len(networks) :]:
        one.set_visible(False)
    for index, ((method, of_one), style) in enumerate(zip(trials.items(), _styles(), strict=False)):
        loss = np.mean([trial.losses for trial in of_one], axis=0)
        seconds = np.mean([trial.seconds for trial in of_one], axis=0)
        sent = np.mean([trial.sent for trial in of_one], axis=0)
        over = [samples * of_one[0].steps, sent, *seconds.T]
        for one, values in zip(axes, over, strict=False):
            # Each line has its marks at other tests than its neighbours: those that lie on each other are all seen.
            one.plot(values, loss, label=method, markevery=(index % MARK_EVERY, MARK_EVERY), **style)
    names = ("samples", "bytes that a rank sent", *(f"seconds on {network}" for network in networks))
    for one, name in zip(axes, names, strict=False):
        one.set(xlabel=name, ylabel="test loss", xscale="linear" if name == "samples" else "log", yscale="log")
        for axis in (one.yaxis,) if name == "samples" else (one.xaxis, one.yaxis):
            axis.set(major_locator=LogLocator(subs=(1, 2, 5)), minor_formatter=NullFormatter())
            axis.set_major_formatter(EngFormatter(sep="") if axis is axes[1].xaxis else "{x:g}")
        one.axhline(target, color="black", linestyle=":", linewidth=1)
        one.grid(visible=True, alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=6)
    figure.suptitle(f"{title}; dotted: the loss to reach")
    figure.savefig(path, dpi=120)


def _styles() -> Iterator[dict[str, Any]]:
    """Yield how each line looks: ten colours, whole, then dashed, and so on; and one of 13 marks."""
    marks = itertools.cycle(MARKS)
    yield {"color": "black", "linewidth": 3, "marker": next(marks), "markersize": 9}
    for dashes in itertools.cycle(("-", "--", "-.", ":")):
        for index in range(10):
            yield {"color": f"C{index}", "linestyle": dashes, "marker": next(marks)}


def write_contest_page(path: Path, title: str, texts: Mapping[str, str], pictures: Mapping[str, Path]) -> None:
    """Write one file with everything in it: for each task a text of fixed width, and its picture."""
    parts = [
        f'<h2>{escape(task)}</h2><pre>{escape(texts[task])}</pre><img alt="{escape(task)}" src="data:image/png;base64,'
        f'{base64.b64encode(picture.read_bytes()).decode()}">'
        for task, picture in pictures.items()
    ]
    path.write_text(PAGE.format(title=escape(title), parts="\n".join(parts)), encoding="utf-8")
