"""Every collective on memory of its own, with results that are known without communication."""

from __future__ import annotations

import functools

import torch
from omegaconf import DictConfig
from torch import Tensor

from backends.executor.reductions import COMBINE
from minidist.communicator import Communicator, ReduceOp, Work


class Repeated:
    """One collective, again and again.

    Element i of rank r is i mod 7 + r: of few ranks, sums and products are exact in every dtype.

    Args:
        cfg: see conf/bench.yaml.
        comm: what runs it.
        numel: elements of the larger tensor; rounded down to a multiple of the world size.
    """

    def __init__(self, cfg: DictConfig, comm: Communicator, numel: int) -> None:
        self._name = cfg.collective
        self._comm = comm
        self._async_op = cfg.async_op
        self._op = ReduceOp(cfg.op)
        dtype = getattr(torch, cfg.dtype)
        empty = comm.empty if cfg.memory == "empty" else torch.empty
        block = max(numel // comm.world_size, 1)
        self._pattern = (torch.arange(block * comm.world_size) % 7).to(dtype)
        self._large = empty(self._pattern.shape, dtype=dtype)
        self._small = self._block(self._large) if cfg.in_place else empty(block, dtype=dtype)
        self._exchanged = empty(self._pattern.shape, dtype=dtype) if self._name == "all_to_all" else self._large
        self.fill()

    def fill(self) -> None:
        """Write the input."""
        torch.add(self._pattern, self._comm.rank, out=self._large)
        if self._name in ("all_gather", "gather"):
            self._small.copy_(self._block(self._large))

    def renew(self) -> None:
        """Write the input as training would, into this core's cache, and line up."""
        self.fill()
        self._comm.barrier()

    @property
    def nbytes(self) -> int:
        """Of the larger tensor."""
        return self._large.nbytes

    def run(self) -> None:
        """Run the collective once, to its end."""
        self._start().wait()

    def num_wrong(self) -> int:
        """Run once on fresh input, and count the wrong elements."""
        self.fill()
        self.run()
        result, expected = self._result()
        return int((result.view(-1) != expected.reshape(-1)).sum())

    def _start(self) -> Work:
        comm = self._comm
        large = self._large
        small = self._small
        is_async = self._async_op
        at_root = large if comm.rank == 0 else None
        match self._name:
            case "all_reduce":
                return comm.all_reduce(large, self._op, is_async)
            case "reduce":
                return comm.reduce(large, 0, self._op, is_async)
            case "broadcast":
                return comm.broadcast(large, 0, is_async)
            case "all_gather":
                return comm.all_gather(large, small, is_async)
            case "reduce_scatter":
                return comm.reduce_scatter(small, large, self._op, is_async)
            case "gather":
                return comm.gather(at_root, small, 0, is_async)
            case "scatter":
                return comm.scatter(small, at_root, 0, is_async)
            case _:
                return comm.all_to_all(self._exchanged, large, is_async)

    def _result(self) -> tuple[Tensor, Tensor]:
        """Return what is there and what should be."""
        rank = self._comm.rank
        own = self._pattern + self._comm.rank
        ranks = torch.arange(self._comm.world_size).to(own.dtype).view(-1, 1)
        match self._name:
            case "all_reduce":
                return self._large, self._reduced()
            case "reduce":
                return self._large, self._reduced() if rank == 0 else own
            case "broadcast":
                return self._large, self._pattern
            case "all_gather":
                return self._large, self._blocks(self._pattern) + ranks
            case "reduce_scatter":
                return self._small, self._block(self._reduced())
            case "gather":
                return self._large, self._blocks(self._pattern) + (ranks if rank == 0 else rank)
            case "scatter":
                return self._small, self._block(self._pattern)
            case _:
                return self._exchanged, self._block(self._pattern) + ranks

    def _reduced(self) -> Tensor:
        values = [self._pattern + rank for rank in range(self._comm.world_size)]
        match self._op:
            case ReduceOp.MIN:
                return values[0]
            case ReduceOp.MAX:
                return values[-1]
            case ReduceOp.PRODUCT:
                return torch.stack(values).prod(0, dtype=self._pattern.dtype)
            case ReduceOp.SUM | ReduceOp.AVG:
                total = torch.stack(values).sum(0, dtype=self._pattern.dtype)
                return total / len(values) if self._op is ReduceOp.AVG else total
            case op:
                return functools.reduce(COMBINE[op], values)

    def _blocks(self, tensor: Tensor) -> Tensor:
        return tensor.view(self._comm.world_size, -1)

    def _block(self, tensor: Tensor) -> Tensor:
        return self._blocks(tensor)[self._comm.rank]
