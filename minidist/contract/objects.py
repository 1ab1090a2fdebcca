"""Objects in place of tensors: pickled, sent as bytes, and unpickled.

A rank whose object cannot be pickled sends the reason in its place: the others wait for it.
"""

from __future__ import annotations

import pickle
from typing import Any, Protocol

import torch
from torch import Tensor

from minidist.contract.rank import Rank
from minidist.errors import CommError

IS_OBJECT = 0
IS_REASON = 1


class Mover(Rank, Protocol):
    """What moves the bytes."""

    def all_gather(
        self, output: Tensor, input: Tensor, async_op: bool = False, timeout_s: float | None = None
    ) -> object: ...

    def broadcast(self, tensor: Tensor, src: int, async_op: bool = False, timeout_s: float | None = None) -> object: ...


def all_gather_object(comm: Mover, obj: Any, timeout_s: float | None) -> list[Any]:
    """Return every rank's ``obj``."""
    what, data, error = _pickled(obj)
    headers = torch.empty((comm.world_size, 2), dtype=torch.int64, device=comm.device_type)
    comm.all_gather(headers, headers.new_tensor([what, data.numel()]), timeout_s=timeout_s)
    padded = torch.zeros(int(headers[:, 1].max()), dtype=torch.uint8, device=comm.device_type)
    padded[: data.numel()].copy_(data)
    output = padded.new_empty((comm.world_size, padded.numel()))
    comm.all_gather(output, padded, timeout_s=timeout_s)
    if error is not None:
        raise _refused(comm, "all_gather_object", error) from error
    rows = list(zip(output.cpu(), headers.tolist(), strict=True))
    for rank, (row, (what, size)) in enumerate(rows):
        _ensure_object(comm, "all_gather_object", rank, what, row[:size])
    return [_object(comm, "all_gather_object", rank, row[:size]) for rank, (row, (_, size)) in enumerate(rows)]


def broadcast_object(comm: Mover, obj: Any, src: int, timeout_s: float | None) -> Any:
    """Return rank ``src``'s ``obj``."""
    error = None
    header = torch.zeros(2, dtype=torch.int64, device=comm.device_type)
    if comm.rank == src:
        what, data, error = _pickled(obj)
        header = header.new_tensor([what, data.numel()])
    comm.broadcast(header, src, timeout_s=timeout_s)
    what, size = header.tolist()
    data = data.to(comm.device_type) if comm.rank == src else header.new_empty(size, dtype=torch.uint8)
    comm.broadcast(data, src, timeout_s=timeout_s)
    if error is not None:
        raise _refused(comm, "broadcast_object", error) from error
    _ensure_object(comm, "broadcast_object", src, what, data)
    return obj if comm.rank == src else _object(comm, "broadcast_object", src, data)


def _pickled(obj: Any) -> tuple[int, Tensor, Exception | None]:
    """Return what is sent for ``obj``, and why it cannot be pickled."""
    what = IS_OBJECT
    error = None
    try:
        data = pickle.dumps(obj)
    except Exception as caught:  # whatever the object's own methods raise
        what = IS_REASON
        data = f"{type(caught).__name__}: {caught}".encode()
        error = caught
    return what, torch.frombuffer(bytearray(data), dtype=torch.uint8), error


def _refused(comm: Mover, operation: str, error: Exception) -> TypeError:
    return TypeError(f"{comm.who(operation)}: obj cannot be pickled: {type(error).__name__}: {error}")


def _ensure_object(comm: Mover, operation: str, rank: int, what: int, data: Tensor) -> None:
    if what == IS_REASON:
        reason = data.cpu().numpy().tobytes().decode(errors="replace")
        raise CommError(f"{comm.who(operation)}: rank {rank} has an object that cannot be pickled: {reason}")


def _object(comm: Mover, operation: str, rank: int, data: Tensor) -> Any:
    try:
        return pickle.loads(data.cpu().numpy().tobytes())
    except Exception as error:  # whatever the object's own methods raise
        raise CommError(
            f"{comm.who(operation)}: the object of rank {rank} cannot be unpickled here: "
            f"{type(error).__name__}: {error}; every rank has to be able to import what it is made of"
        ) from error
