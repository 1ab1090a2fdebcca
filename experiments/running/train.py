"""One rank's part of a job: from the configuration to its results."""

from __future__ import annotations

import logging
import math
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from experiments.running import method, optim, resume
from experiments.running.build import build, communicator
from experiments.running.start import threads_per_rank
from experiments.running.sweep import RESULTS
from experiments.tasks import data
from experiments.tasks.datasets import Samples, loader
from minidist.communicator import Communicator
from minidist.config import Config, EngineConfig
from minidist.contract.records import RecordsOnSignal
from minidist.ddp import DistributedDataParallel
from minidist.engine import Engine
from minidist.errors import ConfigError
from minidist.launch import counted_ranks, detect
from minidist.methods import Method
from minidist.training.checkpoint import Checkpoints
from minidist.training.optimisation import Optimisation
from minidist.training.report import Report, Summary, as_json
from minidist.training.seed import seed_everything

log = logging.getLogger(__name__)
AUTOCAST_DTYPES = {"none": None, "bfloat16": torch.bfloat16}


def train(cfg: DictConfig, checked: Config) -> float:
    """Train as one of the ranks and report; returns the final test accuracy."""
    chosen_method = method.method(cfg)
    with communicator(cfg.comm) as comm, chosen_method, RecordsOnSignal():
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(threads_per_rank(_ranks_here(comm)))
        directory = Path(HydraConfig.get().runtime.output_dir)
        comm.recorder.folder = comm.recorder.folder or str(directory)
        device = _device(checked.engine.device, comm)
        chosen = data.load(checked.data, comm, checked.engine.seed)
        seed_everything(checked.engine.seed, comm.rank)
        model = build(cfg.model, "model", shape=chosen.shape, num_classes=chosen.num_classes).to(device)
        loaders = [_loader(samples, checked, comm, samples is chosen.train) for samples in (chosen.train, chosen.test)]
        replica = _replica(cfg, checked, chosen_method.replica_comm(comm), model)
        optimizer = optim.optimizer(cfg, replica)
        engine = _engine(replica, optimizer, comm, chosen_method, checked.engine, device, len(loaders[0]), directory)
        if comm.rank == 0:
            _announce(comm, chosen, model)
        summary = engine.fit(loaders[0], checked.engine.epochs, loaders[1])
        if comm.rank == 0:
            _write_results(directory, summary, comm.world_size, chosen.name)
    return summary.accuracy


def _ranks_here(comm: Communicator) -> int:
    """Return how many ranks share this machine; those of threads have no launcher that would say so."""
    return comm.world_size if detect().launcher == "alone" else detect().local_world_size


def _device(name: str, comm: Communicator) -> torch.device:
    cuda = torch.cuda.is_available()
    if (name == "cuda" and not cuda) or (name == "cpu" and comm.device_type != "cpu"):
        reason = "there is no GPU" if name == "cuda" else f"{type(comm).__name__} moves {comm.device_type} tensors"
        raise ConfigError(f"engine.device={name}: {reason}; use engine.device=auto")
    if name == "cpu" or not cuda:
        return torch.device("cpu")
    return torch.device("cuda", detect().local_rank % torch.cuda.device_count())


def _loader(samples: Samples, checked: Config, comm: Communicator, train: bool) -> Any:
    size = checked.data.batch_size if train else checked.data.eval_batch_size
    workers = checked.data.num_workers
    seed = checked.engine.seed
    return loader(samples, comm.rank, comm.world_size, size, workers, train, seed)


def _replica(cfg: DictConfig, checked: Config, comm: Communicator, model: nn.Module) -> DistributedDataParallel:
    ddp = checked.ddp
    hook = method.hook(cfg)
    return DistributedDataParallel(
        model, comm, ddp.bucket_cap_mb, ddp.broadcast_buffers, ddp.find_unused_parameters, hook, ddp.direct_gradients
    )


def _engine(
    replica: DistributedDataParallel,
    optimizer: Optimizer,
    comm: Communicator,
    chosen: Method,
    settings: EngineConfig,
    device: torch.device,
    num_batches: int,
    directory: Path,
) -> Engine:
    optimisation = Optimisation(
        _scheduler(optimizer, settings, num_batches),
        settings.accumulation_steps,
        settings.max_grad_norm,
        AUTOCAST_DTYPES[settings.autocast],
    )
    return Engine(
        replica,
        optimizer,
        nn.CrossEntropyLoss(),
        comm,
        optimisation,
        device=device,
        log_every=settings.log_every,
        checkpoints=_checkpoints(settings, comm, directory),
        report=Report(directory, comm.rank, settings.progress, settings.tensorboard),
        method=chosen,
    )


def _checkpoints(settings: EngineConfig, comm: Communicator, directory: Path) -> Checkpoints:
    """Return those of this run, or of the one that it goes on from: asked to, or started again after a failure."""
    resumes = settings.resume or any(comm.all_gather_object(detect().restarts > 0))  # agents count them differently
    where = Path(settings.checkpoint_dir) if settings.checkpoint_dir else directory / resume.CHECKPOINTS
    if resumes and not settings.checkpoint_dir:
        where = resume.directory(directory, comm)
    return Checkpoints(
        where, comm, settings.checkpoint_every_steps, settings.keep_checkpoints, resumes, settings.elastic
    )


def _scheduler(optimizer: Optimizer, settings: EngineConfig, num_batches: int) -> LambdaLR | None:
    warmup = settings.warmup_steps
    cosine = settings.lr_schedule == "cosine"
    num_steps = settings.epochs * math.ceil(num_batches / settings.accumulation_steps)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        # Not beyond the end, where a training with fewer ranks, and hence more steps, has gone on from.
        progress = min(1.0, (step - warmup) / max(1, num_steps - warmup))
        return 0.5 * (1 + math.cos(math.pi * progress)) if cosine else 1.0

    return LambdaLR(optimizer, factor) if warmup or cosine else None


def _announce(comm: Communicator, chosen: data.Data, model: nn.Module) -> None:
    numel = sum(parameter.numel() for parameter in model.parameters())
    log.info(
        "%s on %s | data: %s, %s samples | model: %.2f M parameters",
        comm_name(),
        counted_ranks(comm.world_size),
        chosen.name,
        len(chosen.train),
        numel / 1e6,
    )


def comm_name() -> str:
    """Return the choices of the groups comm, comm/transport and so on, as in ring/gloo and hierarchical/ring/gloo."""
    choices = HydraConfig.get().runtime.choices
    groups = [group for group in sorted(choices) if group.split("/")[0] == "comm" and group != "comm/intra"]
    return "/".join(choices[group] for group in groups)


def _write_results(directory: Path, summary: Summary, world_size: int, data_name: str) -> None:
    job: Any = HydraConfig.get().job  # a section, whatever its type says
    results = {
        "job": job.override_dirname or job.name,
        "number": OmegaConf.select(job, "num", throw_on_missing=False),
        "comm": comm_name(),
        "world_size": world_size,
        "data": data_name,
        **asdict(summary),
    }
    (directory / RESULTS).write_text(as_json(results, indent=2) + "\n")
