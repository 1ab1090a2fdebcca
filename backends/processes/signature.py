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
MEETING = 0
"""The signature of a barrier, and of a meeting in the middle of something else."""
_KIND_CODES = {kind: code for code, kind in enumerate(KINDS)}
_DTYPE_CODES = {dtype: code for code, dtype in enumerate(DTYPES)}
_OP_CODES = {op: code for code, op in enumerate(OPS)}


def signature(kind: str, like: Tensor, op: ReduceOp, root: int) -> int:
    """Pack a collective on tensors like this one; see `pack`."""
    return pack(kind, like.numel(), like.dtype, op, root)


def pack(kind: str, numel: int, dtype: torch.dtype, op: ReduceOp, root: int) -> int:
    """Pack a collective: 4 bits of kind, 4 of dtype, 3 of op, 12 of root, 40 of ``numel``; 63 fit into a word."""
    return _KIND_CODES[kind] << 59 | _DTYPE_CODES[dtype] << 55 | _OP_CODES[op] << 52 | root << 40 | numel


def difference(rank: int, mine: int, peer: int, theirs: int) -> str:
    """Say what two ranks call that do not call the same."""
    return f"rank {rank} calls {_spell(mine)}, rank {peer} calls {_spell(theirs)}; every rank has to call the same"


def _spell(word: int) -> str:
    kind = KINDS[word >> 59]
    if kind == "barrier":
        return kind
    dtype = DTYPES[word >> 55 & 15]
    op = OPS[word >> 52 & 7]
    root = word >> 40 & 0xFFF
    numel = word & (1 << 40) - 1
    return f"{kind} of {numel} {spell(dtype)} with op {op.name} and root {root}"
