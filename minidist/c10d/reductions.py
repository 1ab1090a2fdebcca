"""How torch's reductions are done by a communicator: its own where it has them, else on wider or gathered values.

A reduction runs in four ways, by the operation and the dtype:

- the communicator's own, for the dtypes that it reduces;
- on a copy of a wider dtype (int8, int16, uint16, uint32 and float8), which is rounded or cut once, at the end;
- as MIN or MAX, for bool;
- on all values, gathered and combined by each rank itself, for the bitwise ones.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ReduceOp as TorchOp

from minidist.c10d.moves import packed, written
from minidist.communicator import Communicator, ReduceOp

Seconds = float | None
OPS = {
    TorchOp.SUM: ReduceOp.SUM,
    TorchOp.PREMUL_SUM: ReduceOp.SUM,
    TorchOp.AVG: ReduceOp.AVG,
    TorchOp.MIN: ReduceOp.MIN,
    TorchOp.MAX: ReduceOp.MAX,
    TorchOp.PRODUCT: ReduceOp.PRODUCT,
}
OF_BOOL = {
    TorchOp.SUM: ReduceOp.MAX,
    TorchOp.MAX: ReduceOp.MAX,
    TorchOp.BOR: ReduceOp.MAX,
    TorchOp.PRODUCT: ReduceOp.MIN,
    TorchOp.MIN: ReduceOp.MIN,
    TorchOp.BAND: ReduceOp.MIN,
}
"""Any and all, which are what the others mean for bool."""
BITWISE: dict[Any, Callable[[Tensor, Tensor], Tensor]] = {
    TorchOp.BAND: torch.bitwise_and,
    TorchOp.BOR: torch.bitwise_or,
    TorchOp.BXOR: torch.bitwise_xor,
}
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
    timeout_s: Seconds = None

    def all_reduce(self, tensor: Tensor) -> None:
        """Combine ``tensor`` over all ranks, in place."""
        if self._is_gathered:
            values = tensor.new_empty((self.comm.world_size, tensor.numel()))
            with written(values) as output, written(tensor, keep=True) as input:
                self.comm.all_gather(output, input, timeout_s=self.timeout_s)
            tensor.copy_(self._combined(values).view(tensor.shape))
            return
        carrier = self._carrier(tensor)
        self.comm.all_reduce(carrier, self._op, timeout_s=self.timeout_s)
        self._finish(carrier, tensor)

    def reduce(self, tensor: Tensor, dst: int) -> None:
        """Combine ``tensor`` over all ranks into rank ``dst``'s."""
        if self._is_gathered:
            combined = tensor.clone()
            self.all_reduce(combined)
        else:
            combined = self._carrier(tensor)
            self.comm.reduce(combined, dst, self._op, timeout_s=self.timeout_s)
        if self.comm.rank == dst:
            self._finish(combined, tensor)

    def reduce_scatter(self, output: Tensor, input: Tensor) -> None:
        """Combine ``input`` over all ranks; rank r's ``output`` is block r."""
        if self._is_gathered:
            values = input.new_empty((self.comm.world_size, output.numel()))
            with written(values) as received, written(input, keep=True) as sent:
                self.comm.all_to_all(received, sent, timeout_s=self.timeout_s)
            output.copy_(self._combined(values).view(output.shape))
            return
        carried = self._carrier(input)
        target = output if carried.dtype == output.dtype else torch.empty_like(output, dtype=carried.dtype)
        self.comm.reduce_scatter(target, carried, self._op, timeout_s=self.timeout_s)
        self._finish(target, output)

    def reduce_scatter_list(self, output: Tensor, inputs: Sequence[Tensor]) -> None:
        """Combine the input of each number over all ranks into that rank's ``output``; they may differ in size."""
        if len({input.numel() for input in inputs}) == 1:
            return self.reduce_scatter(output, packed(inputs))
        for rank, input in enumerate(inputs):
            combined = input.detach().clone()
            self.reduce(combined, rank)
            if rank == self.comm.rank:
                output.copy_(combined.view(output.shape))

    # How --------------------------------------------------------------------------------------

    @property
    def _kind(self) -> Any:
        """The operation without what it carries, as a key."""
        return self.torch_op.op

    @property
    def _is_gathered(self) -> bool:
        return self._kind in BITWISE and not (self.dtype == torch.bool and self._kind in OF_BOOL)

    @property
    def _op(self) -> ReduceOp:
        ops = OF_BOOL if self.dtype == torch.bool else OPS
        if self._kind not in ops:
            raise TypeError(f"{self.comm.who('reduction')}: {self._kind} is not defined for {self.dtype}")
        op = ops[self._kind]
        return ReduceOp.SUM if op is ReduceOp.AVG and not self._divides_first else op

    @property
    def _divides_first(self) -> bool:
        return self.dtype.is_floating_point or self.dtype.is_complex

    def _carrier(self, tensor: Tensor) -> Tensor:
        """Return what the communicator combines: ``tensor`` itself, or a copy that may stand for it."""
        carrier = tensor.detach().to(WIDER.get(self.dtype, self.dtype))
        return carrier * self.torch_op.factor if self._kind == TorchOp.PREMUL_SUM else carrier

    def _finish(self, carrier: Tensor, tensor: Tensor) -> None:
        if self._kind == TorchOp.AVG and not self._divides_first:
            carrier = torch.div(carrier, self.comm.world_size, rounding_mode="trunc")
        if carrier.data_ptr() != tensor.data_ptr():
            tensor.copy_(carrier)

    def _combined(self, values: Tensor) -> Tensor:
        return functools.reduce(BITWISE[self._kind], values.unbind())
