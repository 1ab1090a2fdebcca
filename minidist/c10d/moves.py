"""What torch has in lists of tensors and a communicator in one: moves, and sums of sparse tensors.

They block, and run one after the other, within one operation of the communicator.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from minidist.communicator import Communicator

Seconds = float | None
Tensors = Sequence[Tensor]


def all_gather(comm: Communicator, outputs: Tensors, input: Tensor, timeout_s: Seconds) -> None:
    """Write every rank's ``input`` into the output of its number; they may differ in size."""
    flat = input.new_empty(sum(numels(outputs)))
    comm.all_gather(flat, input, timeout_s=timeout_s, sizes=uneven(outputs))
    unpack(flat, outputs)


def gather(comm: Communicator, outputs: Tensors, input: Tensor, dst: int, timeout_s: Seconds) -> None:
    """Write every rank's ``input`` into the output of its number on rank ``dst``; no outputs elsewhere."""
    flat = input.new_empty(sum(numels(outputs))) if comm.rank == dst else None
    comm.gather(flat, input, dst, timeout_s=timeout_s)
    if flat is not None:
        unpack(flat, outputs)


def scatter(comm: Communicator, output: Tensor, inputs: Tensors, src: int, timeout_s: Seconds) -> None:
    """Write the input of each number on rank ``src`` into that rank's ``output``; no inputs elsewhere."""
    comm.scatter(output, packed(inputs) if comm.rank == src else None, src, timeout_s=timeout_s)


def all_to_all(comm: Communicator, outputs: Tensors, inputs: Tensors, timeout_s: Seconds) -> None:
    """Send the input of each number to that rank, and receive its output from it; they may differ in size."""
    source = packed(inputs)
    target = source.new_empty(sum(numels(outputs)))
    sizes = (numels(outputs), numels(inputs))
    comm.all_to_all(target, source, timeout_s=timeout_s, output_sizes=sizes[0], input_sizes=sizes[1])
    unpack(target, outputs)


def sum_sparse(comm: Communicator, tensor: Tensor, timeout_s: Seconds) -> None:
    """Sum the sparse ``tensor`` over all ranks, in place: every rank gathers all entries."""
    own = tensor.coalesce()
    indices = own.indices().t().contiguous()
    counts = indices.new_empty(comm.world_size)
    comm.all_gather(counts, counts.new_tensor([len(indices)]), timeout_s=timeout_s)
    all_indices = [indices.new_empty((count, indices.size(1))) for count in counts.tolist()]
    all_values = [own.values().new_empty((count, *own.values().shape[1:])) for count in counts.tolist()]
    for outputs, input in ((all_indices, indices), (all_values, own.values())):
        all_gather(comm, outputs, input, timeout_s)
    total = torch.sparse_coo_tensor(
        torch.cat(all_indices).t(), torch.cat(all_values), tensor.shape, check_invariants=False
    )
    tensor.copy_(total.coalesce())


def packed(tensors: Tensors) -> Tensor:
    """Return the elements of all ``tensors``, one after the other."""
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])


def unpack(flat: Tensor, outputs: Tensors) -> None:
    """Write ``flat`` into ``outputs``, one after the other."""
    for part, output in zip(flat.split_with_sizes(numels(outputs)), outputs, strict=True):
        output.copy_(part.view(output.shape))


def numels(tensors: Tensors) -> list[int]:
    """Return how many elements each has."""
    return [tensor.numel() for tensor in tensors]


def uneven(tensors: Tensors) -> list[int] | None:
    """Return how many elements each has, where they differ."""
    found = numels(tensors)
    return found if len(set(found)) > 1 else None


def elements(comm: Communicator, tensor: Tensor, rows: Sequence[int]) -> list[int]:
    """Return how many elements so many rows of ``tensor`` have for each rank; none are said: all have as many."""
    num_rows = tensor.size(0) if tensor.dim() else 0
    rows = rows or [num_rows // comm.world_size] * comm.world_size
    if sum(rows) != num_rows:
        raise ValueError(f"{comm.who('all_to_all')}: the split sizes {list(rows)} do not add up to {num_rows} rows")
    per_row = tensor.numel() // num_rows if num_rows else 0
    return [count * per_row for count in rows]
