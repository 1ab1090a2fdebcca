"""What a reduction does to the elements."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from minidist.communicator import ReduceOp

COMBINE: dict[ReduceOp, Callable[..., Tensor]] = {
    ReduceOp.SUM: torch.add,
    ReduceOp.MIN: torch.minimum,
    ReduceOp.MAX: torch.maximum,
    ReduceOp.PRODUCT: torch.mul,
    ReduceOp.BAND: torch.bitwise_and,
    ReduceOp.BOR: torch.bitwise_or,
    ReduceOp.BXOR: torch.bitwise_xor,
}
"""``COMBINE[op](a, b, out=c)``; AVG is a sum whose operands were divided before."""


def combine(op: ReduceOp, parts: Sequence[Tensor], target: Tensor) -> None:
    """Write the combination of ``parts``, in their order, into ``target``, which may be the first of them.

    float16 and bfloat16 are rounded once, at the end.
    """
    if len(parts) == 1:
        target.copy_(parts[0])
        return
    both = COMBINE[op]
    if len(parts) > 2 and target.dtype in (torch.float16, torch.bfloat16):
        total = parts[0].float()
        for part in parts[1:]:
            both(total, part, out=total)
        target.copy_(total)
        return
    both(parts[0], parts[1], out=target)
    for part in parts[2:]:
        both(target, part, out=target)
