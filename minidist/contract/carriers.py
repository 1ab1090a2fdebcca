"""Dtypes that the hooks of a backend do not take: they travel as bytes, and are combined as elements of a wider dtype.

What a wider dtype has combined is rounded, or cut to the lower bits, once, at the end. So integers wrap around as if
they had been combined in their own dtype, and float8 loses less.
"""

from __future__ import annotations

import torch
from torch import Tensor

WIDER = {
    torch.int8: torch.int32,
    torch.int16: torch.int32,
    torch.uint16: torch.int32,
    torch.uint32: torch.int64,
    torch.float8_e4m3fn: torch.float32,
    torch.float8_e5m2: torch.float32,
    torch.float8_e4m3fnuz: torch.float32,
    torch.float8_e5m2fnuz: torch.float32,
    torch.complex32: torch.complex64,
}
"""In which dtype the others are combined."""
ONLY_MOVED = frozenset((torch.uint64, torch.float8_e8m0fnu))
CARRIED = ONLY_MOVED.union(WIDER)


def as_carried(tensor: Tensor) -> Tensor:
    """Return contiguous ``tensor`` as a hook takes it that moves it, in the same memory."""
    return bytes_of(tensor) if tensor.dtype in CARRIED else tensor


def bytes_of(tensor: Tensor) -> Tensor:
    """Return the memory of contiguous ``tensor``, as it is moved whatever its dtype is: 1-d, bytes."""
    return tensor.view(-1).view(torch.uint8)
