"""Messages that say what they are, over transports that cannot tell a wrong one.

A message begins with an *envelope* of one size, which holds the dtype and the number of elements, and the end of the
message, so that a small one is only that. What is left travels as *pieces*. All receives are posted at once, so that
a send never waits for its receiver to look::

    small       | header, all of it |
    large       | header, end | piece | piece | ...

Some transports take it badly when a message is longer than its receive expects: Gloo ends the process. So pieces have
few sizes, each with a tag of its own: on no tag a message can meet a receive of another size. A transport that reports
the size gets one piece, on the tag of the envelope.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor

from minidist.contract.carriers import bytes_of
from minidist.contract.checks import DTYPES, spell
from minidist.contract.work import Work
from minidist.errors import CommError, MismatchError

HEADER = struct.Struct("<qq")
END_BYTES = 2**11
ENVELOPE_BYTES = HEADER.size + END_BYTES
SIZES = tuple(END_BYTES * 8**power for power in range(7))
"""The sizes of pieces, 2 KB to 512 MB."""
SIZE_SHIFT = 28
MAX_CHANNEL = 2**13
"""Three bits of a tag name the size of a piece; 13 are left for the channel, and 15 for the user's tag."""

Hook = Callable[[Tensor, int, int, float], Work]


class Sender(Protocol):
    """What an envelope has to know of the communicator that sends it."""

    _channel: int

    @property
    def checks_sizes(self) -> bool:
        """Whether its transport reports a message of another size."""
        ...

    def _tag(self, tag: int) -> int: ...


def send(comm: Sender, hook: Hook, tensor: Tensor, dst: int, tag: int, timeout_s: float) -> Work:
    """Start to send the contiguous ``tensor`` by ``hook``, the transport's."""
    data = bytes_of(tensor)
    body, end = _cut(data)
    envelope = torch.empty(ENVELOPE_BYTES, dtype=torch.uint8, device="cpu")
    HEADER.pack_into(envelope.numpy().data, 0, DTYPES.index(tensor.dtype), tensor.numel())
    envelope[HEADER.size : HEADER.size + end.numel()].copy_(end)
    envelope = envelope.to(data.device)
    first = hook(envelope, dst, comm._tag(tag), timeout_s)
    return _Enveloped(first, [hook(piece, dst, tag, timeout_s) for piece, tag in _pieces(comm, body, tag)], envelope)


def receive(comm: Sender, hook: Hook, tensor: Tensor, src: int, tag: int, timeout_s: float) -> Work:
    """Start to receive into the contiguous ``tensor`` by ``hook``; a message of another kind is a MismatchError."""
    data = bytes_of(tensor)
    body, end = _cut(data)
    envelope = torch.empty(ENVELOPE_BYTES, dtype=torch.uint8, device=data.device)

    def unpack() -> None:
        code, numel = HEADER.unpack_from(envelope.cpu().numpy().data)
        if (numel, DTYPES[code]) != (tensor.numel(), tensor.dtype):
            raise MismatchError(received(src, numel, DTYPES[code], tensor.numel(), tensor.dtype))
        end.copy_(envelope[HEADER.size : HEADER.size + end.numel()])

    first = hook(envelope, src, comm._tag(tag), timeout_s)
    rest = [hook(piece, src, tag, timeout_s) for piece, tag in _pieces(comm, body, tag)]
    return _Enveloped(first, rest, envelope, unpack)


def received(peer: int, sent: int, sent_as: torch.dtype, numel: int, dtype: torch.dtype) -> str:
    """Say what is wrong with a message to this rank."""
    return (
        f"rank {peer} sends {sent} elements of {spell(sent_as)}, this rank receives {numel} of {spell(dtype)}; "
        "both have to name one size and dtype"
    )


def to(peer: int, sent: int, sent_as: torch.dtype, numel: int, dtype: torch.dtype) -> str:
    """Say what is wrong with a message of this rank."""
    return (
        f"this rank sends {sent} elements of {spell(sent_as)}, rank {peer} receives {numel} of {spell(dtype)}; "
        "both have to name one size and dtype"
    )


def _cut(data: Tensor) -> tuple[Tensor, Tensor]:
    """Return what travels in pieces, and what in the envelope."""
    if data.numel() <= END_BYTES:
        return data[:0], data
    size = data.numel() - data.numel() % END_BYTES
    return data[:size], data[size:]


def _pieces(comm: Sender, body: Tensor, tag: int) -> Iterator[tuple[Tensor, int]]:
    """Yield the pieces with their tags; the same on both ends where the sizes are."""
    if comm.checks_sizes:
        if body.numel():
            yield body, comm._tag(tag)
        return
    if body.numel() and comm._channel >= MAX_CHANNEL:
        raise CommError(f"messages of more than {END_BYTES} bytes need one of the first {MAX_CHANNEL} channels")
    start = 0
    for index, size in reversed(list(enumerate(SIZES, start=1))):
        while body.numel() - start >= size:
            yield body[start : start + size], comm._tag(tag) + (index << SIZE_SHIFT)
            start += size


class _Enveloped(Work):
    """An envelope and its pieces on their way."""

    def __init__(
        self, first: Work, rest: list[Work], envelope: Tensor, unpack: Callable[[], None] | None = None
    ) -> None:
        self._first = first
        self._rest = rest
        self._envelope = envelope
        self._unpack = unpack
        self._is_open = False
        self._error: Exception | None = None

    def wait(self) -> None:
        self._open()
        for work in self._rest:
            work.wait()

    def _open(self) -> None:
        """Wait for the envelope, and look what is in it."""
        if self._error is not None:
            raise self._error
        if self._is_open:
            return
        try:
            self._first.wait()
            if self._unpack is not None:
                self._unpack()
        except Exception as error:
            self._error = error
            raise
        self._is_open = True

    def is_done(self) -> bool:
        if not self._is_open and self._error is None:
            if not self._first.is_done():
                return False
            try:
                self._open()
            except Exception:  # kept for who waits
                return True
        return self._error is not None or all(work.is_done() for work in self._rest)

    def exception(self) -> BaseException | None:
        found = (work.exception() for work in (self._first, *self._rest))
        return self._error or next((error for error in found if error is not None), None)
