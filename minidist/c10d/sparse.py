"""The sum of sparse tensors: every rank gathers all entries."""

from __future__ import annotations

import torch
from torch import Tensor

from minidist.c10d.moves import all_gather_list
from minidist.communicator import Communicator


def all_reduce(comm: Communicator, tensor: Tensor, timeout_s: float | None) -> None:
    """Sum the sparse ``tensor`` over all ranks, in place."""
    own = tensor.coalesce()
    indices = own.indices().t().contiguous()
    counts = indices.new_empty(comm.world_size)
    comm.all_gather(counts, counts.new_tensor([len(indices)]), timeout_s=timeout_s)
    all_indices = [indices.new_empty((count, indices.size(1))) for count in counts.tolist()]
    all_values = [own.values().new_empty((count, *own.values().shape[1:])) for count in counts.tolist()]
    for outputs, input in ((all_indices, indices), (all_values, own.values())):
        all_gather_list(comm, outputs, input, timeout_s)
    total = torch.sparse_coo_tensor(
        torch.cat(all_indices).t(), torch.cat(all_values), tensor.shape, check_invariants=False
    )
    tensor.copy_(total.coalesce())
