"""Collectives whose blocks differ in size from rank to rank, by others of the communicator.

They block, and run as one operation in the order of the others. Blocks of no elements cost nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from minidist.contract.rank import Rank
from minidist.contract.reduce_op import ReduceOp
from minidist.contract.staging import Staged, overlap
from minidist.contract.work import Work

Seconds = float | None
Sizes = Sequence[int]


class Whole(Rank, Protocol):
    """What the even collectives and the messages come from."""

    def broadcast(self, tensor: Tensor, src: int, async_op: bool = False, timeout_s: float | None = None) -> object: ...

    def reduce(
        self, tensor: Tensor, dst: int, op: ReduceOp, async_op: bool = False, timeout_s: float | None = None
    ) -> object: ...

    def _start_send(self, tensor: Tensor, dst: int, timeout_s: Seconds) -> Work: ...

    def _start_receive(self, tensor: Tensor, src: int, timeout_s: Seconds) -> Work: ...


def all_gather(comm: Whole, output: Tensor, input: Tensor, sizes: Sizes, timeout_s: Seconds) -> None:
    """Write every rank's ``input``, of ``sizes[rank]`` elements, into ``output``: a broadcast from each rank."""
    whole = Staged(output, comm.device_type)
    blocks = whole.memory.view(-1).split_with_sizes(list(sizes))
    blocks[comm.rank].copy_(input.reshape(-1))
    for src, block in enumerate(blocks):
        comm.broadcast(block, src, timeout_s=timeout_s)
    whole.store()


def reduce_scatter(comm: Whole, output: Tensor, input: Tensor, op: ReduceOp, sizes: Sizes, timeout_s: Seconds) -> None:
    """Combine ``input`` over all ranks; rank r's ``output`` is block r, of ``sizes[r]`` elements: a reduce to each."""
    blocks = list(input.reshape(-1).split_with_sizes(list(sizes)))
    blocks[comm.rank] = blocks[comm.rank].clone()  # a reduce keeps what is sent to others
    for dst, block in enumerate(blocks):
        comm.reduce(block, dst, op, timeout_s=timeout_s)
    output.copy_(blocks[comm.rank].view(output.shape))


def all_to_all(
    comm: Whole, output: Tensor, input: Tensor, output_sizes: Sizes, input_sizes: Sizes, timeout_s: Seconds
) -> None:
    """Send block r of ``input`` to rank r; block r of ``output`` comes from rank r: a message each."""
    whole = Staged(output, comm.device_type)
    flat = input.reshape(-1)
    if overlap(whole.memory, flat):
        flat = flat.clone()
    sources = flat.split_with_sizes(list(input_sizes))
    targets = whole.memory.view(-1).split_with_sizes(list(output_sizes))
    peers = [rank for rank in range(comm.world_size) if rank != comm.rank]
    works = [comm._start_receive(targets[rank], rank, timeout_s) for rank in peers if targets[rank].numel()]
    works += [comm._start_send(sources[rank], rank, timeout_s) for rank in peers if sources[rank].numel()]
    targets[comm.rank].copy_(sources[comm.rank])
    for work in works:
        work.wait()
    whole.store()
