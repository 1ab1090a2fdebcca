"""One rank that reduces the same gradients by torch's PowerSGD hook and by ours, and compares.

Argument: a file for torch's own rendezvous.
"""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook
from torch.nn.parallel import DistributedDataParallel as TorchDDP

from backends.torch_dist.gloo import GlooCommunicator
from minidist.compression import ErrorFeedback, PowerSGD
from minidist.ddp import DistributedDataParallel
from tests import models

RANK = 3
NUM_PLAIN, NUM_STEPS = 2, 7
"""Torch's hook begins with passes that compress nothing, and lays out its buckets anew after the first."""


def module() -> nn.Module:
    return models.seeded(nn.Sequential(nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 20)).double())


def gradients(ddp: nn.Module, rank: int, steps: range) -> list[list[Tensor]]:
    """Return the gradients of some passes over the same weights."""
    found = []
    for step in steps:
        ddp.zero_grad()
        generator = torch.Generator().manual_seed(100 * step + rank)
        inputs = torch.randn(8, 40, generator=generator, dtype=torch.float64)
        ddp(inputs).square().mean().backward()
        found.append([parameter.grad.clone() for parameter in ddp.parameters()])
    return found


def main(rendezvous: str) -> None:
    torch.set_num_threads(1)
    # Of both layers, the last one first, as backward reaches them.
    first_q = torch.randn((30 + 40) * RANK, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with GlooCommunicator() as comm:
        hook = ErrorFeedback(PowerSGD(RANK))
        hook.compressor.states[0] = {"q": first_q}
        ddp = DistributedDataParallel(module(), comm, hook=hook)
        ours = gradients(ddp, comm.rank, range(NUM_PLAIN, NUM_STEPS))
        dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=comm.rank, world_size=comm.world_size)
        state = powerSGD_hook.PowerSGDState(None, RANK, start_powerSGD_iter=NUM_PLAIN)
        state.p_memory_dict[0] = torch.empty((20 + 30) * RANK, dtype=torch.float64)
        state.q_memory_dict[0] = first_q.clone()
        theirs = TorchDDP(module())
        theirs.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
        gradients(theirs, comm.rank, range(NUM_PLAIN))
        expected = gradients(theirs, comm.rank, range(NUM_PLAIN, NUM_STEPS))
        dist.destroy_process_group()
    for mine, reference in zip(ours, expected, strict=True):
        for left, right in zip(mine, reference, strict=True):
            torch.testing.assert_close(left, right, rtol=1e-9, atol=1e-12)
            assert left.dim() == 1 or torch.linalg.matrix_rank(left) == RANK, "it was not compressed"


if __name__ == "__main__":
    main(*sys.argv[1:])
