"""What a collective does to the tensors of ranks that share memory: all of it at once, in the order of the ranks.

Sums are those of the default schedules over messages, bit for bit: one rank's values after the other's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from backends.executor.reductions import COMBINE
from minidist.communicator import ReduceOp

Tensors = Sequence[Sequence[Tensor]]
"""By rank, what its hook was given that is a tensor: one that is written, or an output and an input; None left out."""


def _total(parts: Sequence[Tensor], op: ReduceOp) -> Tensor:
    total = parts[0].view(-1).clone()
    for part in parts[1:]:
        COMBINE[op](total, part.view(-1), out=total)
    return total


def _fill(targets: Sequence[Tensor], source: Tensor) -> None:
    for target in targets:
        target.view(-1).copy_(source.view(-1))


def _inputs(given: Tensors) -> list[Tensor]:
    return [tensors[-1].view(-1) for tensors in given]


def _all_reduce(given: Tensors, root: int, op: ReduceOp) -> None:
    tensors = _inputs(given)
    _fill(tensors, _total(tensors, op))


def _reduce(given: Tensors, root: int, op: ReduceOp) -> None:
    tensors = _inputs(given)
    _fill([tensors[root]], _total(tensors, op))


def _broadcast(given: Tensors, root: int, op: ReduceOp) -> None:
    tensors = _inputs(given)
    _fill(tensors[:root] + tensors[root + 1 :], tensors[root])


def _all_gather(given: Tensors, root: int, op: ReduceOp) -> None:
    _fill([output for output, _ in given], torch.cat(_inputs(given)))


def _reduce_scatter(given: Tensors, root: int, op: ReduceOp) -> None:
    blocks = _total(_inputs(given), op).chunk(len(given))
    for (output, _), block in zip(given, blocks, strict=True):
        output.view(-1).copy_(block)


def _gather(given: Tensors, root: int, op: ReduceOp) -> None:
    _fill([given[root][0]], torch.cat(_inputs(given)))


def _scatter(given: Tensors, root: int, op: ReduceOp) -> None:
    for tensors, block in zip(given, given[root][-1].view(-1).clone().chunk(len(given)), strict=True):
        tensors[0].view(-1).copy_(block)


def _all_to_all(given: Tensors, root: int, op: ReduceOp) -> None:
    sent = torch.stack(_inputs(given)).view(len(given), len(given), -1)
    for (output, _), received in zip(given, sent.unbind(1), strict=True):
        output.view_as(received).copy_(received)


def _barrier(given: Tensors, root: int, op: ReduceOp) -> None:
    return


MOVES: dict[str, Callable[[Tensors, int, ReduceOp], None]] = {
    "all_reduce": _all_reduce,
    "reduce": _reduce,
    "broadcast": _broadcast,
    "all_gather": _all_gather,
    "reduce_scatter": _reduce_scatter,
    "gather": _gather,
    "scatter": _scatter,
    "all_to_all": _all_to_all,
    "barrier": _barrier,
}
"""By the name of the collective: (tensors by rank, root, op); the root and the op mean something where it has them."""
