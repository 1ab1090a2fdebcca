"""One rank that trains a model twice, with torch's DDP over Gloo and with ours, and compares.

Arguments: the dotted path of the communicator, and a file for torch's own rendezvous.
"""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as TorchDDP

from minidist.communicator import Communicator
from minidist.ddp import DistributedDataParallel
from tests import models
from tests.table import made_by

NUM_STEPS, NUM_MICRO = 10, 2


class Wrapper(Protocol):
    """What both have in common."""

    def __call__(self, images: Tensor) -> Tensor: ...
    def no_sync(self) -> AbstractContextManager[None]: ...


def train(ddp: Wrapper, module: nn.Module, rank: int) -> list[Tensor]:
    """Train on images that depend on step and rank; return the parameters, and the buffers on rank 0."""
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9)
    generator = torch.Generator().manual_seed(rank)
    for _ in range(NUM_STEPS):
        optimizer.zero_grad()
        for micro in range(NUM_MICRO):
            images = torch.randn(8, 1, 12, 12, generator=generator)
            labels = torch.randint(10, (8,), generator=generator)
            with ddp.no_sync() if micro < NUM_MICRO - 1 else nullcontext():
                (nn.functional.cross_entropy(ddp(images), labels) / NUM_MICRO).backward()
        optimizer.step()
    return [*module.parameters(), *(module.buffers() if rank == 0 else ())]


def compare(comm: Communicator, rendezvous: str) -> None:
    initial, ours, theirs = (models.seeded(models.cnn(), comm.rank if index else 0) for index in range(3))
    mine = train(DistributedDataParallel(ours, comm), ours, comm.rank)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=comm.rank, world_size=comm.world_size)
    expected = train(TorchDDP(theirs), theirs, comm.rank)
    dist.destroy_process_group()
    for value, reference in zip(mine, expected, strict=True):
        torch.testing.assert_close(value, reference, rtol=1e-5, atol=1e-6)
    assert all(not torch.equal(p, q) for p, q in zip(mine, initial.parameters(), strict=False)), "nothing was trained"


def main(communicator: str, rendezvous: str) -> None:
    torch.set_num_threads(1)
    with made_by(communicator)() as comm:
        compare(comm, rendezvous)


if __name__ == "__main__":
    main(*sys.argv[1:])
