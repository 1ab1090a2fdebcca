"""Virtual seconds against real ones: ``torchrun --nproc-per-node=2 experiments/truth.py network=ethernet_10g``.

The ranks train over a paced network in real time; then the first one trains the same thing on as many virtual ranks.
What is in the way of the ranks makes real steps slower and not virtual ones: on a busy machine of 2 cores they took
1.15 to 1.31 times as long. For a fair ratio each rank needs a core that nothing else uses.
"""

from __future__ import annotations

from collections.abc import Sequence

import hydra
import torch
from omegaconf import DictConfig
from torch import nn

from backends.thread import spawn_threads
from backends.virtual import VirtualCommunicator
from experiments.measuring.compare import communicators, report
from experiments.measuring.contest import RINGS
from experiments.running.build import build
from experiments.running.choices import at_least, several
from experiments.running.run import CONF, main
from experiments.running.tables import Row
from experiments.tasks.models import mlp
from minidist.analysis.network import Network
from minidist.communicator import Communicator
from minidist.ddp import DistributedDataParallel
from minidist.errors import ConfigError
from minidist.launch import counted_ranks

FORMATS = {"width": "d", "parameters_M": ".2f", "real_ms": ".2f", "virtual_ms": ".2f", "ratio": ".3f"}
SHAPE, NUM_CLASSES = (784,), 10


def step_ms(comm: Communicator, module: nn.Module, cfg: DictConfig) -> float:
    """Return the median of the milliseconds of a training step, by the clock of the communicator."""
    torch.set_num_threads(1)
    replica = DistributedDataParallel(module, comm, cfg.bucket_cap_mb)
    optimizer = torch.optim.SGD(replica.parameters(), lr=1e-3)
    inputs, targets = torch.randn(cfg.batch_size, *SHAPE), torch.randint(NUM_CLASSES, (cfg.batch_size,))
    ends = [comm.clock.now_s()]
    for _ in range(cfg.warmup + cfg.iterations):
        optimizer.zero_grad()
        nn.functional.cross_entropy(replica(inputs), targets).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        comm.clock.step_done()
        ends.append(comm.clock.now_s())
    steps = [after - before for before, after in zip(ends[cfg.warmup :], ends[cfg.warmup + 1 :], strict=False)]
    return 1e3 * sorted(steps)[len(steps) // 2]


def virtual_ms(network: Network, world_size: int, width: int, cfg: DictConfig) -> float:
    """Return `step_ms` of virtual ranks."""

    def job() -> float:
        with VirtualCommunicator(network, RINGS) as comm:
            return step_ms(comm, mlp(SHAPE, NUM_CLASSES, width, cfg.depth), cfg)

    return max(spawn_threads(job, world_size))


def compared(comm: Communicator, network: Network, widths: Sequence[int], cfg: DictConfig) -> list[Row]:
    """Return a row per width; the virtual ranks run while the others wait. All ranks call it."""
    rows: list[Row] = []
    for width in widths:
        module = mlp(SHAPE, NUM_CLASSES, width, cfg.depth)
        real = max(comm.all_gather_object(step_ms(comm, module, cfg)))
        virtual = virtual_ms(network, comm.world_size, width, cfg) if comm.rank == 0 else 1.0
        comm.barrier()
        numel = sum(parameter.numel() for parameter in module.parameters())
        rows.append(
            {
                "width": width,
                "parameters_M": numel / 1e6,
                "real_ms": real,
                "virtual_ms": virtual,
                "ratio": real / virtual,
            }
        )
    return rows


@hydra.main(version_base="1.3", config_path=CONF, config_name="truth")
def truth(cfg: DictConfig) -> None:
    """Compare, print, and write truth.csv and truth.json."""
    at_least(cfg, widths=1, depth=1, batch_size=1, warmup=0, iterations=1)
    if cfg.network is None:
        raise ConfigError("there is nothing to compare without a network; choose one with network=<name>")
    network = build(cfg.network, "network")
    with communicators([f"ring/paced/{cfg.transport}"], "transport") as comms:
        (comm,) = comms.values()
        rows = compared(comm, network, several(cfg, "widths"), cfg)
        if comm.rank == 0:
            report(f"{counted_ranks(comm.world_size)}, medians of {cfg.iterations} steps", rows, FORMATS, "truth")


if __name__ == "__main__":
    main(truth)
