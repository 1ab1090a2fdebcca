"""What a sweep shows at its end: its jobs as one table, and as CSV beside them."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from minidist.launch import detect

RESULTS = "results.json"
COLUMNS = ("job", "comm", "world_size", "loss", "accuracy", "samples_per_s", "comm_share")
_FORMATS = {"loss": ".4f", "accuracy": ".4f", "samples_per_s": ".0f", "comm_share": ".1%"}


class SweepTable(Callback):
    """Prints the table and writes ``sweep.csv``, on rank 0; conf/config.yaml asks for it."""

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        if detect().rank == 0:
            directory = Path(config.hydra.sweep.dir)
            results = read_results(directory)
            write_csv(directory / "sweep.csv", results)
            print(f"\n{table(results)}\n\nsweep: {directory}", flush=True)


def read_results(directory: Path) -> list[dict[str, Any]]:
    """Return what the jobs of a sweep wrote, in their order."""
    paths = sorted(directory.glob(f"*/{RESULTS}"), key=lambda path: (len(path.parent.name), path.parent.name))
    return [json.loads(path.read_text()) for path in paths]


def write_csv(path: Path, results: list[dict[str, Any]]) -> None:
    """Write one line per job."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(results)


def table(results: list[dict[str, Any]]) -> str:
    """Return one aligned line per job, beneath a line of names."""
    rows = [COLUMNS, *(tuple(format(row[c], _FORMATS.get(c, "")) for c in COLUMNS) for row in results)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)
