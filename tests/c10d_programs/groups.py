"""Groups of some of the ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def _sum(group: Any) -> Tensor:
    """Sum the ranks' numbers in the world over the group."""
    tensor = torch.tensor([float(dist.get_rank())])
    dist.all_reduce(tensor, group=group)
    return tensor


def subsets(folder: Path) -> Any:
    """Every rank makes every group, in the same order; each rank is in two of them."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    chosen = [sorted({first, (first + 1) % world_size}) for first in range(world_size)]
    groups = [(ranks, dist.new_group(ranks)) for ranks in chosen]
    return [_sum(group) for ranks, group in groups if rank in ranks]


def by_members(folder: Path) -> Any:
    """Groups that their members alone make: in turn with each of the others, then three ranks and one.

    Each rank makes as many as the others, as torch names a group by how many its ranks have made before.
    """
    rank, found = dist.get_rank(), []
    for chosen in ([[0, 1], [2, 3]], [[0, 2], [1, 3]], [[1, 2], [0, 3]], [[3, 1, 0], [2]]):
        (ranks,) = (ranks for ranks in chosen if rank in ranks)
        group = dist.new_group(ranks, use_local_synchronization=True)
        found.append(_sum(group))
        dist.destroy_process_group(group)
    return found


def split(folder: Path) -> Any:
    """Two halves, the second one backwards, and a half of the first."""
    rank, n = dist.get_rank(), dist.get_world_size()
    dist.barrier()
    half = dist.split_group(split_ranks=[list(range(n // 2)), list(range(n // 2, n))[::-1]])
    quarter = dist.split_group(half, split_ranks=[[index] for index in range(n // 2)])
    return [_sum(half), _sum(quarter), torch.tensor([dist.get_rank(half), dist.get_rank(quarter), rank])]


def split_without_the_last(folder: Path) -> Any:
    n = dist.get_world_size()
    try:
        group = dist.split_group(split_ranks=[list(range(n - 1))])
    except RuntimeError as error:
        return str(error)
    return _sum(group).tolist()


def interleaved(folder: Path) -> Any:
    """Collectives of several groups under way at a time, waited for in another order."""
    groups = [dist.new_group() for _ in range(3)]
    tensors = [torch.full((1000,), float(dist.get_rank() + index)) for index in range(9)]
    works = [dist.all_reduce(tensor, group=groups[index % 3], async_op=True) for index, tensor in enumerate(tensors)]
    for work in reversed(works):
        work.wait()
    return tensors
