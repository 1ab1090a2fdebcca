"""Moves that torch asks for and a communicator does not have as such: of any dtype, in lists, in blocks of any size.

They block, and run one after the other, within one operation of the communicator.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from minidist.communicator import Communicator, Work
from minidist.contract.checks import DTYPES, MAX_TAG

Seconds = float | None
TAG = MAX_TAG
"""The tag of the messages of moves; torch's users have those below it."""


@contextlib.contextmanager
def written(tensor: Tensor, keep: bool = False) -> Iterator[Tensor]:
    """Give ``tensor`` as what a communicator moves: as bytes, where it does not know the dtype.

    Args:
        tensor: what is to be moved, or written into.
        keep: it is only read.
    """
    if tensor.dtype in DTYPES:
        yield tensor
        return
    memory = tensor.detach().contiguous()
    yield memory.view(-1).view(torch.uint8)
    if not keep and memory.data_ptr() != tensor.data_ptr():
        tensor.copy_(memory)


def broadcast(comm: Communicator, tensor: Tensor, src: int, timeout_s: Seconds) -> None:
    """Overwrite ``tensor`` with that of rank ``src``."""
    with written(tensor, keep=comm.rank == src) as memory:
        comm.broadcast(memory, src, timeout_s=timeout_s)


def all_gather(comm: Communicator, output: Tensor, input: Tensor, timeout_s: Seconds) -> None:
    """Write every rank's ``input`` into ``output``, rank by rank."""
    with written(output) as target, written(input, keep=True) as source:
        comm.all_gather(target, source, timeout_s=timeout_s)


def all_gather_list(comm: Communicator, outputs: Sequence[Tensor], input: Tensor, timeout_s: Seconds) -> None:
    """Write every rank's ``input`` into the output of its number; they may differ in size."""
    if len({output.numel() for output in outputs}) > 1:
        outputs[comm.rank].copy_(input.view(outputs[comm.rank].shape))
        for rank, output in enumerate(outputs):
            broadcast(comm, output, rank, timeout_s)
        return
    flat = input.new_empty((comm.world_size, input.numel()))
    all_gather(comm, flat, input, timeout_s)
    _unpack(flat, outputs)


def gather(comm: Communicator, outputs: Sequence[Tensor], input: Tensor, dst: int, timeout_s: Seconds) -> None:
    """Write every rank's ``input`` into the output of its number, on rank ``dst``; the others have no outputs."""
    if comm.rank != dst:
        with written(input, keep=True) as source:
            comm.gather(None, source, dst, timeout_s=timeout_s)
        return
    flat = input.new_empty((comm.world_size, input.numel()))
    with written(flat) as target, written(input, keep=True) as source:
        comm.gather(target, source, dst, timeout_s=timeout_s)
    _unpack(flat, outputs)


def scatter(comm: Communicator, output: Tensor, inputs: Sequence[Tensor], src: int, timeout_s: Seconds) -> None:
    """Write the input of each number, on rank ``src``, into that rank's ``output``; the others have no inputs."""
    with written(output) as target:
        if comm.rank != src:
            comm.scatter(target, None, src, timeout_s=timeout_s)
            return
        with written(packed(inputs), keep=True) as source:
            comm.scatter(target, source, src, timeout_s=timeout_s)


def all_to_all(
    comm: Communicator,
    output: Tensor,
    input: Tensor,
    output_sizes: Sequence[int],
    input_sizes: Sequence[int],
    timeout_s: Seconds,
) -> None:
    """Send rows of ``input`` to each rank, so many as ``input_sizes`` says; without sizes, equal blocks."""
    if not output_sizes and not input_sizes:
        with written(output) as target, written(input, keep=True) as source:
            comm.all_to_all(target, source, timeout_s=timeout_s)
        return
    with written_contiguous(output) as target:
        exchange(
            comm,
            _rows(target, output_sizes, comm.world_size),
            _rows(input.contiguous(), input_sizes, comm.world_size),
            timeout_s,
        )


def exchange(comm: Communicator, outputs: Sequence[Tensor], inputs: Sequence[Tensor], timeout_s: Seconds) -> None:
    """Send the input of each number to that rank, whose output takes it; they may differ in size, and be empty."""
    with contextlib.ExitStack() as stack:
        targets = [stack.enter_context(written(output)) for output in outputs]
        sources = [stack.enter_context(written(input, keep=True)) for input in inputs]
        peers = [rank for rank in range(comm.world_size) if rank != comm.rank]
        works = [comm.irecv(targets[rank], rank, TAG, timeout_s) for rank in peers if targets[rank].numel()]
        works += [comm.isend(sources[rank], rank, TAG, timeout_s) for rank in peers if sources[rank].numel()]
        if targets[comm.rank].numel():
            targets[comm.rank].copy_(sources[comm.rank].view(targets[comm.rank].shape))
        for work in works:
            work.wait()


@contextlib.contextmanager
def written_contiguous(tensor: Tensor) -> Iterator[Tensor]:
    """Give contiguous memory for what is to be written into ``tensor``."""
    memory = tensor.detach().contiguous()
    yield memory
    if memory.data_ptr() != tensor.data_ptr():
        tensor.copy_(memory)


def _rows(tensor: Tensor, sizes: Sequence[int], world_size: int) -> list[Tensor]:
    if not sizes:
        sizes = [tensor.size(0) // world_size] * world_size
    if sum(sizes) != tensor.size(0):
        raise ValueError(f"all_to_all: the split sizes {list(sizes)} do not add up to the {tensor.size(0)} rows")
    return list(torch.split(tensor, list(sizes)))


def receive(comm: Communicator, tensor: Tensor, src: int, tag: int) -> Work:
    """Start to receive into ``tensor``, of any dtype."""
    if tensor.dtype in DTYPES:
        return comm.irecv(tensor, src, tag)
    memory = tensor.detach().contiguous()
    work = comm.irecv(memory.view(-1).view(torch.uint8), src, tag)
    return work if memory.data_ptr() == tensor.data_ptr() else work.then(lambda: _copy(memory, tensor))


def _copy(source: Tensor, target: Tensor) -> None:
    target.copy_(source)


def packed(tensors: Sequence[Tensor]) -> Tensor:
    """Return the elements of all ``tensors``, one after the other."""
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])


def _unpack(flat: Tensor, outputs: Sequence[Tensor]) -> None:
    for row, output in zip(flat, outputs, strict=True):
        output.copy_(row.view(output.shape))
