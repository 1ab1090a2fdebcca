"""What it costs to compare what ranks call: ``torchrun --nproc-per-node=2 experiments/bench_checked.py``.

An all-reduce, and a training step of a small CNN, on each communicator alone and within a `CheckedCommunicator` that
compares each collective or k of them at once, in turn. ``added_us`` is what a call takes longer than alone;
``step_ratio`` is the median over the turns of the time of a step over that of the step without comparisons in the same
turn.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from functools import partial
from statistics import median

import hydra
import torch
from omegaconf import DictConfig
from torch import nn

from backends.checked import CheckedCommunicator
from experiments.measuring.compare import Action, communicators, interleaved, report
from experiments.measuring.steps import step
from experiments.running.build import build
from experiments.running.choices import at_least, several
from experiments.running.run import CONF, main
from experiments.running.tables import Row
from minidist.communicator import Communicator
from minidist.ddp import DistributedDataParallel
from minidist.launch import counted_ranks

FORMATS = {
    "comm": "s",
    "checked": "s",
    "latency_us": ".1f",
    "added_us": ".1f",
    "step_ms": ".2f",
    "step_ratio": ".3f",
}
ALONE = "no"


def variants(cfg: DictConfig, comm: Communicator) -> dict[str, Communicator]:
    """Return the communicator alone, and one around it for each cadence."""
    cadences = several(cfg, "every")
    return {ALONE: comm, **{f"every={every}": CheckedCommunicator(comm, every) for every in cadences}}


def reduces(cfg: DictConfig, comms: Mapping[str, Communicator]) -> dict[str, Action]:
    """Return the all-reduce of each variant, on one tensor in the communicator's own memory."""
    tensor = comms[ALONE].empty(cfg.nbytes // 4).zero_()
    return {name: partial(comm.all_reduce, tensor) for name, comm in comms.items()}


def steps(cfg: DictConfig, module: nn.Module, comms: Mapping[str, Communicator]) -> dict[str, Action]:
    """Return the training step of each variant, of a model of its own."""
    made = {}
    for name, comm in comms.items():
        model = DistributedDataParallel(copy.deepcopy(module), comm, cfg.bucket_cap_mb)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, fused=True)
        made[name] = step(model, optimizer, list(cfg.model.shape), cfg.batch_size)
    return made


def measure(cfg: DictConfig, name: str, comm: Communicator) -> Iterator[Row]:
    """Yield a row for each variant of a communicator."""
    torch.manual_seed(0)
    comms = variants(cfg, comm)
    calls = interleaved(reduces(cfg, comms), comm, cfg.warmup, cfg.iterations, cfg.burst)
    whole = interleaved(steps(cfg, build(cfg.model, "model"), comms), comm, cfg.warmup, cfg.iterations)
    alone = median(calls[ALONE])
    for variant in comms:
        ratios = [seconds / other for seconds, other in zip(whole[variant], whole[ALONE], strict=True)]
        yield {
            "comm": name,
            "checked": variant,
            "latency_us": median(calls[variant]) * 1e6,
            "added_us": (median(calls[variant]) - alone) * 1e6,
            "step_ms": median(whole[variant]) * 1e3,
            "step_ratio": median(ratios),
        }


@hydra.main(version_base="1.3", config_path=CONF, config_name="bench_checked")
def bench_checked(cfg: DictConfig) -> None:
    """Compare, print, and write bench_checked.csv and bench_checked.json."""
    at_least(cfg, every=1, nbytes=4, batch_size=1, warmup=0, iterations=1, burst=1)
    with communicators(several(cfg, "comms")) as comms:
        rows = [row for name, comm in comms.items() for row in measure(cfg, name, comm)]
        first = next(iter(comms.values()))
        if first.rank == 0:
            title = f"all_reduce of {cfg.nbytes} bytes and a step of a CNN, {counted_ranks(first.world_size)}"
            path = report(f"{title}, medians of {cfg.iterations} turns", rows, FORMATS, "bench_checked")
            print(f"written: {path}.csv, .json", flush=True)


if __name__ == "__main__":
    main(bench_checked)
