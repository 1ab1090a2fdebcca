"""What a course asks of a student's DDP, who writes an ``adapter.py``: ``python tests/c10d_course.py``.

It starts the ranks and their process group itself. The model has a weight in two places and a parameter that is not
trained; every rank begins with other values, trains on its part of the data, and has after each step what one process
has that trains on all of them.
"""

from __future__ import annotations

import copy
import sys
import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing
from adapter import finish_gradients, get_ddp
from torch import Tensor, nn

WORLD_SIZE = 2
NUM_STEPS = 5


class Tied(nn.Module):
    """Two of its layers have one weight, and its scale is not trained."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(10, 10), nn.Linear(10, 10, bias=False), nn.Linear(10, 3)
        self.middle.weight = self.first.weight
        self.scale = nn.Parameter(torch.randn(10), requires_grad=False)

    def forward(self, inputs: Tensor) -> Tensor:
        output: Tensor = self.last(self.middle(self.first(inputs).relu() * self.scale).relu())
        return output


def of_rank_0(module: nn.Module) -> nn.Module:
    """Return a copy with the values of rank 0, made without the DDP under test."""
    reference = copy.deepcopy(module)
    for tensor in reference.state_dict().values():
        dist.broadcast(tensor, 0)
    return reference


def step(model: nn.Module, optimizer: torch.optim.Optimizer, inputs: Tensor, targets: Tensor) -> None:
    optimizer.zero_grad()
    nn.functional.mse_loss(model(inputs), targets).backward()
    if hasattr(model, "module"):
        finish_gradients(model, optimizer)
    optimizer.step()


def check_alike(model: nn.Module, reference: nn.Module) -> None:
    for (name, mine), one in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert torch.allclose(mine, one), f"{name} is not what one process has"


def check_replicas(model: nn.Module) -> None:
    for name, mine in model.state_dict().items():
        found = [torch.empty_like(mine) for _ in range(WORLD_SIZE)]
        dist.all_gather(found, mine)
        assert all(torch.equal(other, mine) for other in found), f"{name} is not the same on all ranks"


HELD: list[object] = []
"""Native Gloo's group, to the end of the process: it may end the process when it is destroyed."""


def train(rank: int, meeting: str) -> None:
    """Train the model of the adapter beside one that is not parallel."""
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=WORLD_SIZE)
    torch.manual_seed(rank)
    module = Tied()
    frozen, reference = module.scale.clone(), of_rank_0(module)
    model = get_ddp(module)
    assert torch.equal(module.scale, frozen) == (rank == 0), "what is not trained has to come from rank 0 too"
    optimizers = [torch.optim.SGD(one.parameters(), lr=0.1, momentum=0.9) for one in (model, reference)]
    generator = torch.Generator().manual_seed(0)
    for _ in range(NUM_STEPS):
        inputs, targets = torch.randn(20, 10, generator=generator), torch.randn(20, 3, generator=generator)
        mine = slice(rank, None, WORLD_SIZE)
        step(model, optimizers[0], inputs[mine], targets[mine])
        step(reference, optimizers[1], inputs, targets)
        check_alike(module, reference)
        check_replicas(model.module)
    sys.stdout.write("trained as one process does\n")
    HELD.append(dist.group.WORLD)
    dist.destroy_process_group()


if __name__ == "__main__":
    # By a file: a port that is free now may be taken when the ranks have loaded torch.
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(train, (f"{folder}/meeting",), WORLD_SIZE)
