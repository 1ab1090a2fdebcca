"""Pictures of schedules: who sends what to whom and when, and what that costs.

`draw_timeline` takes messages wherever they come from: a simulated run, or a measured one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Final

import matplotlib
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import FancyArrowPatch, Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from experiments.drawing.curves import Curves
from minidist.analysis.simulate import Message

matplotlib.use("agg")
REDUCED: Final = "-"
OVERWRITTEN: Final = (0, (4, 2))
_MAX_LABELS = 400
_MAX_IN_LEGEND = 16
_HALO = {"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none", "alpha": 0.9}


def draw_timeline(
    path: Path, title: str, world_size: int, messages: Sequence[Message], ends: Sequence[float] = ()
) -> None:
    """Draw ranks across and time down, an arrow per message, coloured by its first chunk.

    Args:
        path: without an ending; written are ``.png`` and ``.svg``.
        title: may have several lines.
        world_size: how many ranks there are.
        messages: with times in seconds after the start.
        ends: when each rank has finished, if that is known; a mark on its line.
    """
    last = max([0.0, *ends, *(message.ends for message in messages)])
    scale, unit = _unit(last)
    depth = max(len({message.src_step for message in messages}), 0.75 * len(messages) / world_size)
    size = (min(max(5.6, 1.25 * world_size + 0.8), 16), min(max(4.2, 0.8 * depth + 1.6), 13))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    _draw_ranks(axes, world_size, [end * scale for end in ends], last * scale)
    colours = chunk_colours(1 + max((max(message.sent, default=0) for message in messages), default=0))
    for message in messages:
        _draw_message(axes, message, scale, colours[_first(message)])
    if len(messages) <= _MAX_LABELS:
        _draw_labels(axes, messages, scale, colours, 0.2 / size[1] * last * scale)
    axes.set(xlim=(-0.4, world_size - 0.6), ylabel=f"time ({unit})")
    axes.set_ylim(1.03 * last * scale or 1.0, -0.02 * last * scale)
    axes.set_title(title, fontsize=11, loc="left", pad=9)
    _draw_legend(figure, messages, colours, bool(ends))
    _save(figure, path)


def chunk_colours(count: int) -> list[str]:
    """Return so many colours, as ``#rrggbb``: well apart up to 20, a spectrum beyond."""
    if count <= 20:
        pairs = [to_hex(matplotlib.colormaps["tab20"](index)) for index in range(20)]
        return [*pairs[::2], *pairs[1::2]][:count]  # the strong ones, then the pale ones
    return [to_hex(matplotlib.colormaps["turbo"](0.05 + 0.9 * index / (count - 1))) for index in range(count)]


def spell_chunks(message: Message) -> str:
    """Return the chunks of a message in few characters: ``3``, ``0-3``, ``0,2``, ``1→5`` where they change places."""
    sent = _spell(message.sent)
    received = _spell(message.received)
    return sent if sent == received else f"{sent}→{received}"


def draw_curves(path: Path, title: str, names: tuple[str, str], by_size: Curves, by_ranks: Curves) -> None:
    """Draw time over size and time over ranks, and mark where the fastest algorithm changes.

    Args:
        path: without an ending; written are ``.png`` and ``.svg``.
        title: of the picture.
        names: the titles of both halves.
        by_size: over bytes.
        by_ranks: over numbers of ranks.
    """
    figure = Figure(figsize=(11.5, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes, name, curves, spell in ((left, names[0], by_size, spell_bytes), (right, names[1], by_ranks, spell_ranks)):
        _draw_lines(axes, curves)
        _label_crossovers(axes, curves, spell)
        _finish(axes, name, curves)
    left.set_xlabel("size")
    left.xaxis.set_major_formatter(FuncFormatter(lambda size, _: spell_bytes(size)))
    right.set_xlabel("ranks")
    right.xaxis.set_major_formatter(FuncFormatter(lambda count, _: f"{count:.0f}"))
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False)
    figure.suptitle(title, fontsize=11)
    _save(figure, path)


def spell_bytes(nbytes: float) -> str:
    """Return a size in three digits: ``512 B``, ``1.5 KiB``, ``64 MiB``."""
    power = min(max(int(math.log2(max(nbytes, 1)) + 0.001) // 10, 0), 4)
    value = nbytes / 1024**power
    unit = ("B", "KiB", "MiB", "GiB", "TiB")[power]
    return f"{value:.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"


def spell_ranks(count: float) -> str:
    """Return the most whole ranks up to a place between two samples: ``11 ranks`` for 11.3."""
    return f"{math.floor(count * (1 + 1e-9))} ranks"  # 8 may have become 7.999... on its way through logarithms


def spell_seconds(seconds: float) -> str:
    """Return a time in three digits and the unit that suits it."""
    scale, unit = _unit(seconds)
    return f"{seconds * scale:.3g} {unit}"


def _unit(seconds: float) -> tuple[float, str]:
    return (1e6, "us") if seconds < 1e-3 else (1e3, "ms") if seconds < 1 else (1.0, "s")


def _first(message: Message) -> int:
    return next(iter(message.sent), 0)


def _spell(chunks: Sequence[int]) -> str:
    if len(chunks) > 1 and all(after == before + 1 for before, after in pairwise(chunks)):
        return f"{chunks[0]}-{chunks[-1]}"
    return ",".join(map(str, chunks)) if len(chunks) <= 4 else f"{len(chunks)} chunks"


def _draw_ranks(axes: Axes, world_size: int, ends: Sequence[float], last: float) -> None:
    axes.vlines(range(world_size), 0, last, color="0.75", linewidth=1.2, zorder=1)
    if ends:
        axes.plot(range(world_size), ends, linestyle="none", marker="s", markersize=5, color="0.2", zorder=4)
    small = 8 if world_size <= 32 else 6
    axes.set_xticks(
        range(world_size), [f"rank {rank}" if world_size <= 12 else str(rank) for rank in range(world_size)]
    )
    axes.tick_params(axis="x", top=True, labeltop=True, bottom=False, labelbottom=False, length=0, labelsize=small + 1)
    axes.spines[["top", "right", "bottom"]].set_visible(False)


def _draw_message(axes: Axes, message: Message, scale: float, colour: str) -> None:
    start = (message.src, message.begins * scale)
    end = (message.dst, message.ends * scale)
    style = REDUCED if message.reduces else OVERWRITTEN
    axes.plot(*zip(start, end, strict=True), color=colour, linewidth=1.5, linestyle=style, zorder=2, gid="message")
    # A head of its own, as that of a dashed arrow would be dashed, too.
    near = (end[0] + 0.02 * (start[0] - end[0]), end[1] + 0.02 * (start[1] - end[1]))
    head = FancyArrowPatch(near, end, arrowstyle="-|>", mutation_scale=11, shrinkA=0, shrinkB=0, color=colour, lw=1)
    axes.add_patch(head)


def _draw_labels(axes: Axes, messages: Sequence[Message], scale: float, colours: Sequence[str], height: float) -> None:
    """Write the chunks on the arrows, where there is room that no other label takes."""
    taken: list[tuple[float, float, float]] = []
    for message in messages:
        text = spell_chunks(message)
        colour = colours[_first(message)]
        width = 0.1 + 0.06 * len(text)
        for x, y in _places(message, scale):
            if all(abs(x - x0) > (width + width0) / 2 or abs(y - y0) > height for x0, y0, width0 in taken):
                taken.append((x, y, width))
                box = {**_HALO, "edgecolor": colour, "linewidth": 0.8}
                axes.text(x, y, text, color="0.15", fontsize=7.5, ha="center", va="center", bbox=box, zorder=3)
                break


def _places(message: Message, scale: float) -> Iterator[tuple[float, float]]:
    """Yield points of an arrow, those first that are near its sender, where arrows have not crossed."""
    ranks = message.dst - message.src
    times = (message.ends - message.begins) * scale
    for way in (0.36, 0.55, 0.75, 0.22):
        part = min(way / abs(ranks), 0.8)
        yield message.src + part * ranks, message.begins * scale + part * times


def _draw_legend(figure: Figure, messages: Sequence[Message], colours: Sequence[str], ends: bool) -> None:
    used = sorted({_first(message) for message in messages})
    entries: list[Line2D | Patch] = []
    if any(message.reduces for message in messages):
        entries.append(Line2D([], [], color="0.3", linestyle=REDUCED, label="reduced into what is there"))
    if not all(message.reduces for message in messages):
        entries.append(Line2D([], [], color="0.3", linestyle=OVERWRITTEN, label="overwrites what is there"))
    if ends:
        entries.append(
            Line2D([], [], color="0.2", linestyle="none", marker="s", markersize=5, label="rank has finished")
        )
    first = "first chunk " if any(len(message.sent) > 1 for message in messages) else "chunk "
    if len(used) > _MAX_IN_LEGEND:
        used = [used[round(part * (len(used) - 1) / 7)] for part in range(8)]
    entries += [Patch(color=colours[chunk], label=f"{first}{chunk}") for chunk in used]
    columns = max(2, int(figure.get_figwidth() / 1.75))
    figure.legend(handles=entries, loc="outside lower center", ncols=columns, fontsize=8, frameon=False)


def _draw_lines(axes: Axes, curves: Curves) -> None:
    for name, seconds in curves.seconds.items():
        axes.plot(curves.xs, seconds, marker="o", markersize=3, label=name)
    best = [min(times) for times in zip(*curves.seconds.values(), strict=True)]
    axes.plot(curves.xs, best, color="0.5", alpha=0.25, linewidth=7, solid_capstyle="round", zorder=1, label="fastest")


def _label_crossovers(axes: Axes, curves: Curves, spell: Callable[[float], str]) -> None:
    first = math.log(curves.xs[0])
    last = math.log(curves.xs[-1])
    for number, crossover in enumerate(curves.crossovers()):
        at = (crossover.x, crossover.seconds)
        axes.plot(*at, marker="D", markersize=7, color="black", fillstyle="none", zorder=5)
        late = math.log(crossover.x) > first + 0.75 * (last - first)
        axes.annotate(
            f"{spell(crossover.x)}\n{crossover.before}\n→ {crossover.after}",
            at,
            xytext=(crossover.x, 0.03 + 0.15 * (number % 3)),  # beneath the curves, which rise
            textcoords=("data", "axes fraction"),
            fontsize=8,
            ha="right" if late else "left",
            va="bottom",
            arrowprops={"arrowstyle": "-", "linewidth": 0.8, "color": "0.4", "relpos": (1 if late else 0, 1)},
            bbox=_HALO,
            zorder=6,
        )


def _finish(axes: Axes, name: str, curves: Curves) -> None:
    axes.set(xscale="log", yscale="log", ylabel="time")
    axes.set_xscale("log", base=2)
    doublings = len(curves.xs) - 1
    axes.set_xticks(curves.xs[:: max(1, math.ceil(doublings / 8))])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda seconds, _: spell_seconds(seconds)))
    axes.yaxis.set_minor_formatter(NullFormatter())
    low = min(min(times) for times in curves.seconds.values())
    high = max(max(times) for times in curves.seconds.values())
    if high < 100 * low:
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    room = (high / low) ** 0.45 if curves.crossovers() else 1.4  # for their labels
    axes.set_ylim(low / room, high * 1.4)
    axes.set_title(name, fontsize=10, loc="left")
    axes.grid(visible=True, which="major", alpha=0.3)


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(path.with_suffix(".png"), dpi=150)
    figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})
