"""Rows of results as a table for people and as files for programs."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from minidist.training.report import as_json

Row = Mapping[str, Any]


def multiplied(first: int, last: int, factor: int) -> Iterator[int]:
    """Yield ``first``, ``factor`` times that, and so on up to ``last``."""
    while first <= last:
        yield first
        first *= factor


def table(rows: Sequence[Row], formats: Mapping[str, str]) -> str:
    """Return one line per row beneath a line of names: the columns of ``formats``, aligned; None is a dash."""
    cells = [list(formats), *([_cell(row[column], how) for column, how in formats.items()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    numbers = [not isinstance(rows[0][column], str) for column in formats] if rows else [False] * len(formats)
    return "\n".join(
        "  ".join(
            f"{cell:{'>' if right else '<'}{width}}" for cell, width, right in zip(line, widths, numbers, strict=True)
        ).rstrip()
        for line in cells
    )


def _cell(value: Any, how: str) -> str:
    return "-" if value is None else format(value, how)


def write_csv(path: Path, rows: Sequence[Row], columns: Sequence[str]) -> None:
    """Write the ``columns`` of every row, beneath a line of names."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


def write_json(path: Path, about: Mapping[str, Any], rows: Sequence[Row]) -> None:
    """Write every row, and beside them what they are ``about``; null stands for what is not finite."""
    path.write_text(as_json({**about, "rows": rows}, indent=1) + "\n")
