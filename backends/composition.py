"""A communicator over another one."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from backends.scheduled import ScheduledCommunicator
from minidist.communicator import Communicator, Device, ReduceOp, Shape, Work
from minidist.errors import CommError


class Composition(ScheduledCommunicator):
    """Has the transport do everything; a subclass replaces the collectives that it does otherwise.

    It takes the transport over, and closing it closes the transport. Several compositions can share a
    transport, each on a channel of its own; they share its traffic and the order of its operations.

    Args:
        transport: the communicator that moves the bytes.
        timeout_s: None for the transport's.
        segment_bytes: see `ScheduledCommunicator`.
    """

    def __init__(self, transport: Communicator, timeout_s: float | None = None, segment_bytes: int = 2**22) -> None:
        super().__init__(
            transport.rank, transport.world_size, transport.timeout_s if timeout_s is None else timeout_s, segment_bytes
        )
        self.transport = transport
        # One order for everything that runs on the transport, whoever starts it.
        self.traffic, self._progress = transport.traffic, transport._progress
        self.device_type = transport.device_type  # type: ignore[misc]  # the class's is only the default
        self.overlaps = transport.overlaps
        self._root, self._channel = transport._root, transport._new_channel()

    def empty(self, shape: Shape, dtype: torch.dtype = torch.float32, device: Device = None) -> Tensor:
        return self.transport.empty(shape, dtype, device)

    def _isend(self, tensor: Tensor, dst: int, tag: int, timeout_s: float) -> Work:
        return self.transport._isend(tensor, dst, tag, timeout_s)

    def _irecv(self, tensor: Tensor, src: int, tag: int, timeout_s: float) -> Work:
        return self.transport._irecv(tensor, src, tag, timeout_s)

    def _all_reduce(self, tensor: Tensor, op: ReduceOp, timeout_s: float) -> None:
        self.transport._all_reduce(tensor, op, timeout_s)

    def _reduce(self, tensor: Tensor, dst: int, op: ReduceOp, timeout_s: float) -> None:
        self.transport._reduce(tensor, dst, op, timeout_s)

    def _broadcast(self, tensor: Tensor, src: int, timeout_s: float) -> None:
        self.transport._broadcast(tensor, src, timeout_s)

    def _all_gather(self, output: Tensor, input: Tensor, timeout_s: float) -> None:
        self.transport._all_gather(output, input, timeout_s)

    def _reduce_scatter(self, output: Tensor, input: Tensor, op: ReduceOp, timeout_s: float) -> None:
        self.transport._reduce_scatter(output, input, op, timeout_s)

    def _gather(self, output: Tensor | None, input: Tensor, dst: int, timeout_s: float) -> None:
        self.transport._gather(output, input, dst, timeout_s)

    def _scatter(self, output: Tensor, input: Tensor | None, src: int, timeout_s: float) -> None:
        self.transport._scatter(output, input, src, timeout_s)

    def _all_to_all(self, output: Tensor, input: Tensor, timeout_s: float) -> None:
        self.transport._all_to_all(output, input, timeout_s)

    def _barrier(self, timeout_s: float) -> None:
        self.transport._barrier(timeout_s)

    def _dispatch(self, run: Callable[[], None], async_op: bool) -> Work:
        return self.transport._dispatch(run, async_op)

    def _split(self, groups: list[list[int]]) -> Communicator | None:
        child = self.transport._split(groups)
        return None if child is None else type(self)(child, self.timeout_s, self.segment_bytes)

    def _close(self) -> None:
        self.transport.close()

    def _abort(self, reason: str) -> None:
        self.transport.abort(reason)

    def _gone(self) -> Mapping[int, str]:
        return self.transport._gone()

    def _translate(self, error: Exception) -> CommError:
        return self.transport._translate(error)
