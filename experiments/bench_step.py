"""The cost of a training step: ``torchrun --nproc-per-node=2 experiments/bench_step.py comms=[gloo,ring]``.

Alone, with torch's own DistributedDataParallel over Gloo and over communicators of minidist (``bridged``), and with
minidist's over each communicator, with the optimizer on every rank and sharded, and with
gradients that are computed in the buckets, in turn.
``exposed`` is what a step takes longer than without communication; ``ratio`` is its time over that of torch's.
"""

from __future__ import annotations

import copy
from datetime import timedelta
from statistics import median
from typing import Any

import hydra
import torch
import torch.distributed as dist
from omegaconf import DictConfig
from torch import nn
from torch.optim import Optimizer

from backends.processes.rendezvous import meet
from experiments.drawing.pictures import draw_steps
from experiments.measuring.compare import communicators, interleaved, report
from experiments.measuring.steps import step
from experiments.running.build import build
from experiments.running.choices import at_least, several
from experiments.running.run import CONF, main
from experiments.running.tables import Row
from minidist.communicator import Communicator
from minidist.ddp import DistributedDataParallel
from minidist.launch import counted_ranks
from minidist.sharded import ShardedOptimizer

FORMATS = {
    "model": "s",
    "parameters_M": ".1f",
    "variant": "s",
    "step_ms": ".2f",
    "exposed_ms": ".2f",
    "ratio": ".2f",
    "samples_per_s": ".0f",
}
OPTIMIZERS: dict[str, tuple[type[Optimizer], dict[str, Any]]] = {
    "sgd": (torch.optim.SGD, {"lr": 1e-3, "momentum": 0.9, "fused": True}),
    "adamw": (torch.optim.AdamW, {"lr": 1e-3, "fused": True}),
}
ALONE = "no communication"
TORCH = "torch DDP, gloo"


def optimizer_of(model: nn.Module, name: str, comm: Communicator | None = None) -> Optimizer:
    """Return a fused optimizer of ``model``, in shares over ``comm`` if there is one."""
    kind, options = OPTIMIZERS[name]
    if comm is None:
        return kind(model.parameters(), **options)
    return ShardedOptimizer(model.parameters(), kind, comm, **options)


def measure(name: str, cfg: DictConfig, comms: dict[str, Communicator]) -> list[Row]:
    """Return one row per variant of the model called ``name``."""
    torch.manual_seed(0)
    section = cfg.architectures[name]
    module = build(section, f"architectures.{name}")
    first = next(iter(comms.values()))
    models = {ALONE: copy.deepcopy(module), TORCH: nn.parallel.DistributedDataParallel(copy.deepcopy(module))}
    for spec in cfg.bridged:
        group = dist.new_group(backend="minidist", pg_options=spec)
        models[f"torch DDP, {spec}"] = nn.parallel.DistributedDataParallel(copy.deepcopy(module), process_group=group)
    shared_out = {}
    for comm_name, comm in comms.items():
        for variant in (comm_name, f"{comm_name}, sharded", f"{comm_name}, sharded, direct"):
            direct = variant.endswith("direct")
            models[variant] = DistributedDataParallel(
                copy.deepcopy(module), comm, cfg.bucket_cap_mb, direct_gradients=direct
            )
            if variant != comm_name:
                shared_out[variant] = comm
    steps = {
        variant: step(
            model, optimizer_of(model, cfg.optimizer, shared_out.get(variant)), list(section.shape), cfg.batch_size
        )
        for variant, model in models.items()
    }
    times = {v: median(s) for v, s in interleaved(steps, first, cfg.warmup, cfg.iterations).items()}
    numel = sum(parameter.numel() for parameter in module.parameters())
    rows: list[Row] = []
    for variant, seconds in times.items():
        rows.append(
            {
                "model": name,
                "parameters_M": numel / 1e6,
                "variant": variant,
                "step_ms": seconds * 1e3,
                "exposed_ms": (seconds - times[ALONE]) * 1e3,
                "ratio": seconds / times[TORCH],
                "samples_per_s": cfg.batch_size * first.world_size / seconds,
            }
        )
    return rows


@hydra.main(version_base="1.3", config_path=CONF, config_name="bench_step")
def bench_step(cfg: DictConfig) -> None:
    """Compare, print, and write bench_step.csv, bench_step.json and bench_step.png."""
    at_least(cfg, batch_size=1, warmup=0, iterations=1)
    names = several(cfg, "models", list(cfg.architectures))
    several(cfg, "optimizer", list(OPTIMIZERS))
    meeting = meet()
    world = meeting.world
    store = meeting.job_store()
    with communicators(several(cfg, "comms")) as comms:
        dist.init_process_group(
            "gloo", store=store, rank=world.rank, world_size=world.world_size, timeout=timedelta(seconds=300)
        )
        rows = [row for name in names for row in measure(name, cfg, comms)]
        dist.destroy_process_group()
    if world.rank == 0:
        title = f"{counted_ranks(world.world_size)}, batch {cfg.batch_size} each, medians of {cfg.iterations} steps"
        path = report(title, rows, FORMATS, "bench_step")
        draw_steps(path.with_suffix(".png"), title, rows)
        print(f"written: {path}.csv, .json, .png", flush=True)


if __name__ == "__main__":
    main(bench_step)
