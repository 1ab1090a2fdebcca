"""What a rank means to do, in one word: ranks that meet compare it, so that a disagreement is an error."""

from __future__ import annotations

import torch
from torch import Tensor

from minidist.collective import COLLECTIVES
from minidist.communicator import ReduceOp
from minidist.contract.checks import DTYPES, spell

STEP = "fused step"
KINDS = ("barrier", *(name for name in COLLECTIVES if name != "barrier"), STEP)
"""A collective is its place here; a barrier, which is only a meeting, is 0."""
OPS = tuple(ReduceOp)
NUM_SCHEDULES = 15
MEETING = 0
"""The signature of a barrier, and of a meeting in the middle of something else."""
_KIND = {kind: code for code, kind in enumerate(KINDS)}
_DTYPE = {dtype: code for code, dtype in enumerate(DTYPES)}
_OP = {op: code for code, op in enumerate(OPS)}


def signature(kind: str, like: Tensor, op: ReduceOp, root: int) -> int:
    """Pack a collective on tensors like this one; see `pack`."""
    return pack(kind, like.numel(), like.dtype, op, root)


def pack(kind: str, numel: int, dtype: torch.dtype, op: ReduceOp, root: int, schedule: int = 0) -> int:
    """Pack a collective: 36 bits of ``numel``, 12 of root, 3 of op, 4 of dtype, 4 of kind, 4 of schedule; 63 in all."""
    return schedule << 59 | _KIND[kind] << 55 | _DTYPE[dtype] << 51 | _OP[op] << 48 | root << 36 | numel


def schedule_on(channel: int) -> int:
    """Return the code of a schedule, which tells it from others on one transport; so are fifteen of them. 0 is none."""
    return 1 + channel % NUM_SCHEDULES


def difference(rank: int, mine: int, peer: int, theirs: int) -> str:
    """Say what two ranks call that do not call the same."""
    return f"rank {rank} calls {_spell(mine)}, rank {peer} calls {_spell(theirs)}; every rank has to call the same"


def _spell(word: int) -> str:
    kind = KINDS[word >> 55 & 15]
    schedule = word >> 59
    how = f" by the schedule on channel {schedule - 1}" if schedule else ""
    if kind == "barrier":
        return f"{kind}{how}"
    dtype = DTYPES[word >> 51 & 15]
    op = OPS[word >> 48 & 7]
    root = word >> 36 & 0xFFF
    numel = word & (1 << 36) - 1
    return f"{kind} of {numel} {spell(dtype)} with op {op.name} and root {root}{how}"
