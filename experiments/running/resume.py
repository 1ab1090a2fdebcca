"""Where a run that goes on finds its checkpoints: its own, or those of the last run of the same command."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from minidist.communicator import Communicator

log = logging.getLogger(__name__)
CHECKPOINTS = "checkpoints"
MAY_DIFFER = ("engine.resume", "engine.elastic", "engine.epochs", "engine.progress", "engine.log_every", "launch.")
"""Settings of a command that goes on which say nothing of what is trained."""


def directory(run: Path, comm: Communicator) -> Path:
    """Return the directory of checkpoints to go on from, and in; rank 0 looks, all ranks get its answer."""
    found = comm.broadcast_object(_find(run) if comm.rank == 0 else None, src=0)
    if comm.rank == 0:
        nothing = "no earlier run of this command has a checkpoint; starting anew"
        log.info("resume: %s", f"going on from {found}" if found else nothing)
    return Path(found or run / CHECKPOINTS)


def _find(run: Path) -> str | None:
    """Run directories sort by time, so the last name is the newest run; those of a sweep hold one for each job."""
    hydra: Any = HydraConfig.get()  # a section, whatever its type says
    in_sweep = OmegaConf.select(hydra, "job.num", throw_on_missing=False) is not None
    job = Path(hydra.sweep.subdir if in_sweep else "")
    whole = run.parents[len(job.parts) - 1] if in_sweep else run
    own = _command(hydra)
    earlier = sorted((other for other in whole.parent.iterdir() if other.name < whole.name), reverse=True)
    for other in [run, *(other / job for other in earlier)]:
        if any((other / CHECKPOINTS).glob("step_*.pt")) and (other == run or _command_of(other) == own):
            return str(other / CHECKPOINTS)
    return None


def _command_of(run: Path) -> tuple[str, set[str]] | None:
    settings = run / ".hydra" / "hydra.yaml"
    return _command(OmegaConf.load(settings).hydra) if settings.is_file() else None


def _command(hydra: Any) -> tuple[str, set[str]]:
    """Return the script and those of its settings that decide on what is trained."""
    return hydra.job.name, {each for each in hydra.overrides.task if not each.startswith(MAY_DIFFER)}
