"""How torch's reductions are a communicator's: a factor, and averages of integers, which a communicator has not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ReduceOp as TorchOp

from minidist.c10d.moves import packed, uneven
from minidist.communicator import Communicator, ReduceOp

OPS = {
    TorchOp.SUM: ReduceOp.SUM,
    TorchOp.PREMUL_SUM: ReduceOp.SUM,
    TorchOp.AVG: ReduceOp.AVG,
    TorchOp.MIN: ReduceOp.MIN,
    TorchOp.MAX: ReduceOp.MAX,
    TorchOp.PRODUCT: ReduceOp.PRODUCT,
    TorchOp.BAND: ReduceOp.BAND,
    TorchOp.BOR: ReduceOp.BOR,
    TorchOp.BXOR: ReduceOp.BXOR,
}


def is_plain(torch_op: Any, tensor: Tensor) -> bool:
    """Whether a communicator does it as it is: the tensor is dense, has no factor, and the result needs no division."""
    dtype = tensor.dtype
    kind = torch_op.op
    return kind != TorchOp.PREMUL_SUM and not tensor.is_sparse and (kind != TorchOp.AVG or dtype.is_floating_point)


@dataclass(frozen=True)
class Reduction:
    """One of torch's reductions of one dtype, over ``comm``; the methods block.

    Args:
        comm: what moves and combines.
        torch_op: torch's ReduceOp.
        dtype: of the tensors.
        timeout_s: for each step; None for the communicator's.
    """

    comm: Communicator
    torch_op: Any
    dtype: torch.dtype
    timeout_s: float | None = None

    def all_reduce(self, tensor: Tensor) -> None:
        """Combine ``tensor`` over all ranks, in place."""
        operand = self._operand(tensor)
        self.comm.all_reduce(operand, self._op, timeout_s=self.timeout_s)
        self._finish(operand, tensor)

    def reduce(self, tensor: Tensor, dst: int) -> None:
        """Combine ``tensor`` over all ranks into rank ``dst``'s."""
        operand = self._operand(tensor)
        self.comm.reduce(operand, dst, self._op, timeout_s=self.timeout_s)
        if self.comm.rank == dst:
            self._finish(operand, tensor)

    def reduce_scatter(self, output: Tensor, input: Tensor, sizes: Sequence[int] | None = None) -> None:
        """Combine ``input`` over all ranks; rank r's ``output`` is block r."""
        operand = self._operand(input)
        self.comm.reduce_scatter(output, operand, self._op, timeout_s=self.timeout_s, sizes=sizes)
        self._finish(output, output)

    def reduce_scatter_list(self, output: Tensor, inputs: Sequence[Tensor]) -> None:
        """Combine the input of each number over all ranks into that rank's ``output``; they may differ in size."""
        self.reduce_scatter(output, packed(inputs), uneven(inputs))

    @property
    def _op(self) -> ReduceOp:
        op = OPS[self.torch_op.op]
        return ReduceOp.SUM if self._divides_last else op

    @property
    def _divides_last(self) -> bool:
        """Whether it is a mean of integers, cut to a whole number."""
        is_whole = not (self.dtype.is_floating_point or self.dtype.is_complex or self.dtype == torch.bool)
        return bool(self.torch_op.op == TorchOp.AVG) and is_whole

    def _operand(self, tensor: Tensor) -> Tensor:
        """Return what the communicator combines: ``tensor`` itself, or its product with the factor."""
        is_scaled = self.torch_op.op == TorchOp.PREMUL_SUM
        return tensor.detach() * self.torch_op.factor if is_scaled else tensor

    def _finish(self, combined: Tensor, tensor: Tensor) -> None:
        if self._divides_last:
            combined = torch.div(combined, self.comm.world_size, rounding_mode="trunc")
        if combined is not tensor:
            tensor.copy_(combined)
