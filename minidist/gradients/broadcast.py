"""Many tensors from one rank to all others, in few messages, as often as wanted."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch
from torch import Tensor

from minidist.communicator import Communicator
from minidist.errors import MismatchError
from minidist.gradients.buckets import assign

MESSAGE_BYTES = 2**26
"""A message is closed once it holds this much: few messages, little memory."""
HEADER_BYTES = 16
"""Before the tensors: what the message holds, as a number. As long as the widest element, so that all begin aligned."""

Kind = tuple[torch.dtype, torch.Size, torch.device]


def kinds(tensors: Sequence[Tensor]) -> list[Kind]:
    """Return what a `Broadcast` is planned for."""
    return [(tensor.dtype, tensor.shape, tensor.device) for tensor in tensors]


class Broadcast:
    """Which tensors travel together and where each of them lies in its message, worked out once.

    Tensors travel as bytes, which move alike whatever their dtype, so that one message does for all.

    Attributes:
        kinds: of the tensors that it sends, see `kinds`.
    """

    def __init__(self, comm: Communicator, tensors: Sequence[Tensor]) -> None:
        self.kinds = kinds(tensors)
        self._comm = comm
        # The widest dtype first: every tensor then begins at a multiple of its item size within the message.
        order = sorted(range(len(tensors)), key=lambda index: -tensors[index].itemsize)
        sizes = [tensors[i].nbytes for i in order]
        devices = [tensors[i].device for i in order]
        groups = assign(sizes, devices, MESSAGE_BYTES, MESSAGE_BYTES)
        longest: dict[torch.device, int] = {}
        for group in groups:
            device = devices[group[0]]
            longest[device] = max(longest.get(device, 0), HEADER_BYTES + sum(sizes[i] for i in group))
        # One after the other, so one piece of memory serves all messages.
        memory = {device: comm.empty(nbytes, torch.uint8, device) for device, nbytes in longest.items()}
        self._messages = [
            _Message(memory[devices[group[0]]], [order[i] for i in group], [tensors[order[i]] for i in group])
            for group in groups
        ]

    def send(self, tensors: Sequence[Tensor], src: int) -> None:
        """Overwrite ``tensors``, which are of `kinds`, on every rank with those of rank ``src``.

        Raises:
            MismatchError: this rank has tensors of other shapes or dtypes than ``src``.
        """
        for message in self._messages:
            places = [tensors[index].detach() for index in message.indices]
            if self._comm.rank == src:
                message.header[0] = message.content
                torch._foreach_copy_(message.views, places)
            self._comm.broadcast(message.memory, src)
            if self._comm.rank != src:
                self._ensure_same(message, src)
                torch._foreach_copy_(places, message.views)

    def _ensure_same(self, message: _Message, src: int) -> None:
        if int(message.header[0]) != message.content:
            raise MismatchError(
                f"{self._comm.who('broadcast')}: rank {src} sends tensors of other shapes or dtypes than here; "
                "give every rank the same parameters and buffers"
            )


class _Message:
    """Some of the tensors in one piece of memory."""

    def __init__(self, memory: Tensor, indices: Sequence[int], tensors: Sequence[Tensor]) -> None:
        self.indices = indices
        sizes = [tensor.nbytes for tensor in tensors]
        self.memory = memory[: HEADER_BYTES + sum(sizes)]
        header, *places = torch.split(self.memory, [HEADER_BYTES, *sizes])
        self.header = header.view(torch.int64)
        self.views = [p.view(tensor.dtype).view(tensor.shape) for p, tensor in zip(places, tensors, strict=True)]
        self.content = zlib.crc32(str([(tensor.dtype, tuple(tensor.shape)) for tensor in tensors]).encode())
