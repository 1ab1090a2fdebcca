"""Functional collectives, and what the compiler makes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch import Tensor, nn

from tests.c10d_programs.training import adam, model, parameters, train


def functional(folder: Path) -> Any:
    group = dist.group.WORLD
    rank, n = dist.get_rank(), dist.get_world_size()
    tensor = torch.arange(6.0) + rank
    return [
        funcol.all_reduce(tensor, "sum", group) + 0,
        funcol.all_gather_tensor(tensor, 0, group) + 0,
        funcol.reduce_scatter_tensor(torch.arange(2.0 * n) * (rank + 1), "sum", 0, group) + 0,
        funcol.all_to_all_single(torch.arange(2.0 * n), None, None, group) + 0,
        *[t + 0 for t in funcol.all_reduce_coalesced([tensor, tensor * 2], "sum", group)],
    ]


def _step(tensor: Tensor) -> Tensor:
    return funcol.all_reduce(tensor * 2, "sum", dist.group.WORLD) + 1


def compiled(folder: Path) -> Any:
    step = torch.compile(_step, backend="aot_eager", fullgraph=True)
    return [step(torch.arange(6.0) + dist.get_rank()) for _ in range(2)]


def inductor(folder: Path) -> Any:
    """With the compiler that makes kernels: a collective in a graph, and DDP, whose graph is cut at its buckets."""
    step = torch.compile(_step, fullgraph=True)
    wrapped = torch.compile(nn.parallel.DistributedDataParallel(model()))
    train(wrapped, adam(wrapped))
    return [step(torch.arange(6.0) + dist.get_rank()), *parameters(wrapped)]
