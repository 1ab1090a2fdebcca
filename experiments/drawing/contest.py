"""Loss against samples, bytes and seconds, a line per method; and a page with the tables and these pictures."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from experiments.measuring.verdict import Trials

matplotlib.use("agg")
PAGE = """<!doctype html>
<meta charset="utf-8">
<title>{title}</title>
<style>body {{ font-family: sans-serif; max-width: 90em; margin: 2em auto }} img {{ max-width: 100% }}</style>
<h1>{title}</h1>
{parts}
"""


def draw_contest(path: Path, title: str, trials: Trials, networks: Sequence[str], samples: int, window: int) -> None:
    """Draw the smoothed loss over samples, bytes, and seconds on each network: means over the seeds.

    Args:
        path: of the PNG file.
        title: above all.
        trials: by method.
        networks: in the order of the times of the trials.
        samples: of all ranks in a step.
        window: of the mean.
    """
    figure = Figure(figsize=(4.2 * (2 + len(networks)), 4.5), layout="constrained")
    axes = figure.subplots(1, 2 + len(networks), sharey=True)
    for method, of_one in trials.items():
        loss = np.mean([trial.smoothed(window) for trial in of_one], axis=0)
        axes[0].plot(samples * np.arange(1, len(loss) + 1), loss, label=method)
        axes[1].plot(np.mean([trial.sent for trial in of_one], axis=0), loss)
        seconds = np.mean([trial.seconds for trial in of_one], axis=0)
        for index in range(len(networks)):
            axes[2 + index].plot(seconds[:, index], loss)
    names = ("samples", "bytes that a rank sent", *(f"seconds on {network}" for network in networks))
    for one, name in zip(axes, names, strict=True):
        one.set(xlabel=name, xscale="linear" if name == "samples" else "log")
        one.grid(visible=True, alpha=0.3)
    axes[0].set_ylabel("training loss")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=6)
    figure.suptitle(title)
    figure.savefig(path, dpi=120)


def write_contest_page(path: Path, title: str, texts: Mapping[str, str], pictures: Mapping[str, Path]) -> None:
    """Write one file with everything in it: for each task a text of fixed width, and its picture."""
    parts = [
        f'<h2>{escape(task)}</h2><pre>{escape(texts[task])}</pre><img alt="{escape(task)}" src="data:image/png;base64,'
        f'{base64.b64encode(picture.read_bytes()).decode()}">'
        for task, picture in pictures.items()
    ]
    path.write_text(PAGE.format(title=escape(title), parts="\n".join(parts)), encoding="utf-8")
