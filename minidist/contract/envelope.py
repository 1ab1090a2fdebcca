"""Messages that say what they are, over transports that cannot tell a wrong one.

A message begins with an *envelope* of one size, which holds the dtype and the number of elements, and the end of the
message, so that a small one is only that. What is left travels as *pieces*. All receives are posted at once, so that
a send never waits for its receiver to look::

    small       | header, all of it |
    large       | header, end | piece | piece | ...

Some transports take it badly when a message is longer than its receive expects: Gloo ends the process. So pieces have
few sizes, each with a tag of its own: on no tag a message can meet a receive of another size. A transport that reports
the size gets one piece; that, too, has a tag of its own, or a receive from any source could take it for an envelope.

Whom the pieces of such a receive come from only its envelope tells. They are *late*: posted once it has come, in the
order of the envelopes. Pieces of receives that were posted behind it are late as well, or would take those of its
message.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor

from minidist.contract.carriers import bytes_of
from minidist.contract.checks import DTYPES, spell
from minidist.contract.enveloped import Enveloped, Late
from minidist.contract.rank import ANY_SOURCE
from minidist.contract.work import Work
from minidist.errors import CommError, MismatchError

HEADER = struct.Struct("<qq")
END_BYTES = 2**11
ENVELOPE_BYTES = HEADER.size + END_BYTES
SIZES = tuple(END_BYTES * 8**power for power in range(7))
"""The sizes of pieces, 2 KB to 512 MB."""
CHANNEL_BITS = 12
MAX_CHANNEL = 2**CHANNEL_BITS
"""Three bits of a tag, above those of the channel, name the size of a piece; where there is one size, it is the first
of them. With the 15 of the user's tag this one is the 28th, which is as long as a tag of MPICH may be."""
LEAST_S = 1e-3
"""What late pieces get when the time of their receive is up: they may have come all the same."""

Hook = Callable[[Tensor, int, int, float], Work]


class Sender(Protocol):
    """What an envelope has to know of the communicator that sends it."""

    _channel: int
    _late_receives: dict[int, Late]
    tag_bits: int

    @property
    def checks_sizes(self) -> bool:
        """Whether its transport reports a message of another size."""
        ...

    @property
    def receives_from_any(self) -> bool:
        """Whether its receives may leave open whom they come from."""
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
    return Enveloped(first, envelope, [hook(piece, dst, tag, timeout_s) for piece, tag in _pieces(comm, body, tag)])


def receive(comm: Sender, hook: Hook, tensor: Tensor, src: int, tag: int, timeout_s: float) -> Work:
    """Start to receive into the contiguous ``tensor`` by ``hook``; a message of another kind is a MismatchError."""
    data = bytes_of(tensor)
    body, end = _cut(data)
    envelope = torch.empty(ENVELOPE_BYTES, dtype=torch.uint8, device=data.device)
    give_up = time.monotonic() + timeout_s
    late = _late(comm, src, tag)

    def post_pieces(source: int) -> None:
        left_s = max(give_up - time.monotonic(), LEAST_S)
        rest.extend(hook(piece, source, tag, left_s) for piece, tag in _pieces(comm, body, tag))

    def unpack() -> None:
        code, numel = HEADER.unpack_from(envelope.cpu().numpy().data)
        source = _source(first, src)
        if (numel, DTYPES[code]) != (tensor.numel(), tensor.dtype):
            raise MismatchError(received(source, numel, DTYPES[code], tensor.numel(), tensor.dtype))
        end.copy_(envelope[HEADER.size : HEADER.size + end.numel()])
        if late is not None:
            post_pieces(source)

    first = hook(envelope, src, comm._tag(tag), timeout_s)
    rest: list[Work] = []
    if late is None:
        post_pieces(src)
    return Enveloped(first, envelope, rest, unpack, late)


def _late(comm: Sender, src: int, tag: int) -> Late | None:
    """Return where a receive has to wait until its pieces are posted, if it has to."""
    if src == ANY_SOURCE:
        return comm._late_receives.setdefault(tag, Late())
    late = comm._late_receives.get(tag)
    return None if late is None or late.is_empty else late


def _source(envelope: Work, src: int) -> int:
    """Return whom an envelope has come from."""
    if src != ANY_SOURCE:
        return src
    assert envelope.peer is not None, "the transport receives from any source, so it has to tell the source"
    return envelope.peer


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
    if comm.checks_sizes and not comm.receives_from_any:
        if body.numel():
            yield body, comm._tag(tag)
        return
    if comm._channel >= MAX_CHANNEL:
        raise CommError(f"messages need one of the first {MAX_CHANNEL} channels, this communicator has a later one")
    start, shift = 0, _size_shift(comm)
    sizes = (body.numel(),) if comm.checks_sizes else SIZES
    for index, size in reversed(list(enumerate(sizes, start=1))):
        while size and body.numel() - start >= size:
            yield body[start : start + size], comm._tag(tag) + (index << shift)
            start += size


def is_piece(comm: Sender, tag: int) -> bool:
    """Whether a message with this tag, as the hooks get it, is a piece of one size of several."""
    return tag >> _size_shift(comm) > 0


def _size_shift(comm: Sender) -> int:
    return comm.tag_bits + CHANNEL_BITS
