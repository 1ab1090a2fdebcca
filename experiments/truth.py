"""Virtual seconds against real ones: ``torchrun --nproc-per-node=2 experiments/truth.py network=ethernet_10g``.

The ranks train over a paced network in real time; then the first one trains the same thing on as many virtual ranks,
twice. Once they measure what computing takes, one rank at a time: virtual ranks have machines of their own. Real ones
share this one, and slow each other down. So once they are given what a step takes real ranks that compute side by
side and send nothing. Then what is left is what moving the bytes takes of the same cores, or the model's fault.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

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

FORMATS = {
    "width": "d",
    "parameters_M": ".2f",
    "real_ms": ".2f",
    "measured_ms": ".2f",
    "real/measured": ".3f",
    "alone_ms": ".2f",
    "given_ms": ".2f",
    "real/given": ".3f",
}
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


def virtual_ms(
    network: Network, world_size: int, model: Callable[[], nn.Module], cfg: DictConfig, step_s: float | None = None
) -> float:
    """Return `step_ms` of virtual ranks, which compute for ``step_s`` or for what they measure."""

    def job() -> float:
        with VirtualCommunicator(network, RINGS, step_s) as comm:
            return step_ms(comm, model(), cfg)

    return max(spawn_threads(job, world_size))


def compared(comm: Communicator, network: Network, widths: Sequence[int], cfg: DictConfig) -> list[Row]:
    """Return a row per width on rank 0; the virtual ranks run while the others wait. All ranks call it."""
    rows: list[Row] = []
    alone = comm.split(comm.rank)  # of one rank each: a step of DDP's own work that sends nothing
    assert alone is not None, "every rank has a color"
    with alone:
        for width in widths:
            model = partial(mlp, SHAPE, NUM_CLASSES, width, cfg.depth)
            real_ms, alone_ms = (max(comm.all_gather_object(step_ms(each, model(), cfg))) for each in (comm, alone))
            if comm.rank == 0:
                measured_ms = virtual_ms(network, comm.world_size, model, cfg)
                given_ms = virtual_ms(network, comm.world_size, model, cfg, alone_ms / 1e3)
                rows.append(
                    {
                        "width": width,
                        "parameters_M": sum(parameter.numel() for parameter in model().parameters()) / 1e6,
                        "real_ms": real_ms,
                        "measured_ms": measured_ms,
                        "real/measured": real_ms / measured_ms,
                        "alone_ms": alone_ms,
                        "given_ms": given_ms,
                        "real/given": real_ms / given_ms,
                    }
                )
            comm.barrier()
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
