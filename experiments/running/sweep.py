"""What a sweep shows at its end: its jobs as one table, and as CSV beside them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from experiments.running.tables import table, write_csv
from minidist.launch import detect

RESULTS = "results.json"
FORMATS = {
    "job": "",
    "comm": "",
    "world_size": "",
    "loss": ".4f",
    "accuracy": ".4f",
    "samples_per_s": ".0f",
    "comm_share": ".1%",
}


class SweepTable(Callback):
    """Prints the table and writes ``sweep.csv``, on rank 0; conf/config.yaml asks for it."""

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        if detect().rank == 0:
            directory = Path(config.hydra.sweep.dir)
            results = read_results(directory)
            write_csv(directory / "sweep.csv", results, list(FORMATS))
            print(f"\n{table(results, FORMATS)}\n\nsweep: {directory}", flush=True)


def read_results(directory: Path) -> list[dict[str, Any]]:
    """Return what the jobs of a sweep wrote, in their order; a name with a slash is a directory in a directory."""
    results = [json.loads(path.read_text()) for path in directory.rglob(RESULTS)]
    return sorted(results, key=lambda job: job["number"])
