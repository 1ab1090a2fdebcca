"""Measures the running transport: ``torchrun --nproc-per-node=2 experiments/calibrate.py transport=gloo``.

Writes two presets of the group ``network``: ``gloo_2``, with a table of times by size, and ``gloo_2_flat``, whose
alpha, beta and gamma come nearest to it. Both work for as many ranks, on as many hosts, as they were measured with.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from backends.calibration import FLOOR_S, Tables
from backends.host_calibration import HostTables, calibrated
from experiments.measuring.compare import communicators, sizes
from experiments.running.choices import at_least
from experiments.running.run import CONF, main
from experiments.running.tables import Row, table
from minidist.launch import counted_ranks

FORMATS = {
    "bytes": "d",
    "one_way_us": ".1f",
    "exchange_us": ".1f",
    "reduce_us": ".1f",
    "reduce_all_us": ".1f",
    "exchange_GBps": ".2f",
}
BETWEEN_HOSTS = {
    "bytes": "d",
    "one_way_us": ".1f",
    "exchange_us": ".1f",
    "fan_us": ".1f",
    "reduce_us": ".1f",
    "exchange_GBps": ".2f",
}


def write(directory: Path, name: str, tables: Tables | HostTables) -> None:
    """Write both presets into ``directory``/network."""
    directory = directory / "network"
    directory.mkdir(exist_ok=True)
    about = f"# Measured by experiments/calibrate.py on {counted_ranks(tables.ranks)}.\n"
    models = {
        name: tables.model(),
        f"{name}_flat": {"_target_": "minidist.analysis.network.Flat", **tables.alpha_beta_gamma()},
    }
    for preset, model in models.items():
        rounded = {key: _rounded(value) for key, value in model.items()}
        (directory / f"{preset}.yaml").write_text(about + OmegaConf.to_yaml(OmegaConf.create(rounded)))


def _rounded(value: object) -> object:
    if isinstance(value, dict):
        return {key: _rounded(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_rounded(part) for part in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def show(tables: Tables | HostTables) -> str:
    """Return the tables as text, and the fit; what noise has hidden is a dash, and not a time of 0."""
    formats = FORMATS if isinstance(tables, Tables) else BETWEEN_HOSTS
    rows = [_row(formats, int(nbytes), times) for nbytes, *times in zip(tables.nbytes, *tables.columns(), strict=True)]
    fit = tables.alpha_beta_gamma()
    lines = [
        table(rows, formats),
        f"a collective takes {tables.start * 1e6:.0f} us to begin",
        f"nearest to it: alpha {fit['alpha'] * 1e6:.1f} us, beta {fit['beta'] * 1e9:.3f} ns/byte, "
        f"gamma {fit['gamma'] * 1e9:.3f} ns/byte",
    ]
    if any(value is None for row in rows for value in row.values()):
        lines.append("-: less than the noise; measure more often, with larger iterations")
    if isinstance(tables, HostTables) and tables.inside is not None:
        lines.append(f"inside of a host\n{show(tables.inside)}")
    return "\n".join(lines)


def _row(formats: Mapping[str, str], nbytes: int, seconds: Sequence[float]) -> Row:
    known = [t if t > FLOOR_S else None for t in seconds]
    exchange = known[1]
    speed = None if exchange is None else nbytes / exchange / 1e9
    return dict(zip(formats, (nbytes, *(None if t is None else t * 1e6 for t in known), speed), strict=True))


@hydra.main(version_base="1.3", config_path=CONF, config_name="calibrate")
def experiment(cfg: DictConfig) -> None:
    """Measure, print, and write the presets."""
    at_least(cfg, min_bytes=4, iterations=1, factor=2)
    at_least(cfg, max_bytes=cfg.min_bytes * cfg.factor)
    with communicators([cfg.transport], "transport") as comms:
        (comm,) = comms.values()
        tables = calibrated(comm, list(sizes(cfg)), cfg.iterations, cfg.budget_s)
        if comm.rank == 0:
            name = cfg.name or f"{cfg.transport.replace('/', '_')}_{comm.world_size}"
            directory = Path(HydraConfig.get().runtime.output_dir)
            write(directory, name, tables)
            print(f"{cfg.transport}, {counted_ranks(comm.world_size)}\n{show(tables)}")
            print(f"written: {directory}/network/{name}.yaml")
            print(f"use it with --config-dir {shlex.quote(str(directory))} network={name}", flush=True)


if __name__ == "__main__":
    main(experiment)
