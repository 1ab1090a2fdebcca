"""What every experiment does with its configuration: check it, start ranks or be one, train, report.

::

    main ---> hydra composes ---> on_ranks ---> check ---> job.handed_over ---> torchrun or mpirun: main on n ranks,
                                                   |                            each of which takes the job over
                                                   +-----> its part, such as train: this process is a rank
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from backends.processes.rendezvous import run_id
from backends.thread import spawn_threads
from experiments.running import build, job, method, optim, start
from experiments.running.choices import check_groups
from experiments.running.refusal import FULL_ERROR, REFUSALS, TRACEBACKS, refuse
from experiments.running.sweep import RESULTS
from experiments.running.train import train
from minidist import config
from minidist.errors import ConfigError
from minidist.launch import detect

T = TypeVar("T")
Part = Callable[[DictConfig, config.Config], T]
"""What each rank of a job does, with the configuration as it is and as it was checked."""
log = logging.getLogger(__name__)
_HERE = Path(__file__).parent.parent
CONF = str(_HERE / "conf" if (_HERE / "conf").is_dir() else _HERE.parent / "conf")
"""The project's configuration: beside experiments/, and inside of it where the project is installed from a wheel."""
config.register()
config.register_resolvers(run_id=run_id, rank=lambda: detect().rank)


def main(experiment: Callable[..., None]) -> None:
    """Run a function that `hydra.main` made; a mistake in the command is one line and not a traceback."""
    os.environ[FULL_ERROR] = "1"  # else Hydra prints the errors of composing itself
    job.note_command()
    try:
        experiment(job.taken_over())
    except REFUSALS as error:
        if TRACEBACKS:
            raise
        refuse(error)


def run(cfg: DictConfig) -> float:
    """Do one training job; returns its final test accuracy, on every rank."""
    accuracy = on_ranks(cfg, train)
    if accuracy is None:
        results = json.loads((_output_dir() / RESULTS).read_text())
        accuracy = math.nan if results["accuracy"] is None else float(results["accuracy"])
    return accuracy


def on_ranks(cfg: DictConfig, part: Part[T]) -> T | None:
    """Do one job: ``part(cfg, checked)`` on each of its ranks, which are started if this process is none.

    Returns:
        What ``part`` returned on this rank, or on rank 0 of threads; None if the ranks are other processes.
    """
    try:
        return _on_ranks(cfg, part)
    except REFUSALS as error:
        if TRACEBACKS:
            raise
        refuse(error)


def _on_ranks(cfg: DictConfig, part: Part[T]) -> T | None:
    check_groups()
    checked = config.check(cfg)
    build.check_available(cfg.comm)
    build.check_importable(cfg)
    optim.check(cfg)
    world = detect()
    nproc = checked.launch.nproc
    method.check(cfg, (nproc or 1) if world.launcher == "alone" else world.world_size)
    if world.launcher != "alone":
        start.die_with_launcher()
        if nproc not in (None, world.world_size) and world.rank == 0:
            log.warning(
                "launch.nproc=%s has no effect: %s has started the ranks, and their number is %s; leave it out, or "
                "start with python alone",
                *(nproc, world.launcher, world.world_size),
            )
    elif nproc is not None:
        return _start(cfg, checked, nproc, part)
    return part(cfg, checked)


def _start(cfg: DictConfig, checked: config.Config, nproc: int, part: Part[T]) -> T | None:
    launcher = build.launcher(cfg.comm)
    if launcher == "none" and nproc > 1:
        raise ConfigError(f"launch.nproc={nproc}: {cfg.comm._target_} is one rank alone; choose comm=gloo or another")
    if launcher != "torchrun" and checked.launch.max_restarts:
        log.warning("launch.max_restarts has no effect: %s starts the ranks once", launcher)
    if launcher == "thread":
        return spawn_threads(lambda: part(cfg, checked), nproc)[0]
    if launcher == "none":
        return part(cfg, checked)
    arguments = start.command(launcher, nproc, checked.launch.max_restarts, job.command())
    with job.handed_over() as variables:
        status = start.run_to_end(arguments, start.environment(nproc) | variables | {FULL_ERROR: str(int(TRACEBACKS))})
    if status:
        raise SystemExit(status if status > 0 else 128 - status)  # the ranks said why
    return None


def _output_dir() -> Path:
    return Path(HydraConfig.get().runtime.output_dir)
