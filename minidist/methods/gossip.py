"""Gossip: each rank tells a few others its parameters in every step, and nobody waits for all.

Push-sum (Kempe, Dobra and Gehrke 2003) as in SGP: Assran et al., "Stochastic Gradient Push for Distributed Deep
Learning" (2019). A rank keeps x, which it shares out, and a weight w, shared out alike; it trains on z = x / w::

    x, w      after a local step on z
    share     1 / (1 + number of those it tells)
    x  <-  share x  +  what others sent of theirs        the sum over all ranks stays what it was
    w  <-  share w  +  likewise                          so that x / w goes to the mean, whoever told whom

On an exponential graph a rank tells the one 1, 2, 4, ... places behind it, in turn: for 2**k ranks without training
all have the exact mean after k rounds. There everybody tells and is told equally often, and w stays 1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from minidist.communicator import ReduceOp
from minidist.methods.local import LocalMethod

Graph = Callable[[int, int], list[tuple[int, int]]]
"""``graph(round, num_workers)``: who tells whom in a round, the first is 0, as (src, dst); the same on all ranks."""


def exponential(round: int, num_workers: int) -> list[tuple[int, int]]:
    """Let each tell the one 2**i places behind it, i = 0, 1, ... in turn."""
    num_hops = max(1, (num_workers - 1).bit_length())
    hop = 2 ** (round % num_hops)
    return [(rank, (rank + hop) % num_workers) for rank in range(num_workers)]


class Gossip(LocalMethod):
    """Push-sum in every step: M + 8 bytes to one other worker; replicas stay apart, near their mean, which is shown.

    Args:
        graph: who tells whom.
        ranks_per_worker: ranks that average their gradients in every step.
    """

    def __init__(self, graph: Graph = exponential, ranks_per_worker: int = 1) -> None:
        super().__init__(ranks_per_worker=ranks_per_worker)
        self.graph = graph
        self.shared: list[Tensor] = []
        self.weight = 1.0

    def complaint(self, num_ranks: int) -> str | None:
        if num_ranks < 2 * self.ranks_per_worker:
            return "there is nobody to tell with one worker; use more ranks, or method=ddp"
        return super().complaint(num_ranks)

    def begin_anew(self) -> None:
        self.shared = [piece.read().clone() for piece in self.pieces]
        self.weight = 1.0

    def _exchange(self, step: int) -> None:
        edges = self.graph(step - 1, self.comm.world_size)
        share = 1 / (1 + sum(src == self.comm.rank for src, _ in edges))
        weight = torch.full((1,), self.weight, dtype=torch.float64, device=self.comm.device_type)
        for piece, x in zip(self.pieces, self.shared, strict=True):
            z = piece.read()
            # By how far the local step has moved z, x moves too; without a weight they are the same.
            x.copy_(z if self.weight == 1 else x + (z - x / self.weight))
            self._tell(x.mul_(share), edges)
        self._tell(weight.mul_(share), edges)
        self.weight = weight.item()
        for piece, x in zip(self.pieces, self.shared, strict=True):
            piece.write(x / self.weight)

    def _tell(self, part: Tensor, edges: list[tuple[int, int]]) -> None:
        """Send this rank's part along the edges, and add to it what comes along them, in their order."""
        told = [(src, torch.empty_like(part)) for src, dst in edges if dst == self.comm.rank]
        receives = [self.comm.irecv(tensor, src) for src, tensor in told]
        sends = [self.comm.isend(part, dst) for src, dst in edges if src == self.comm.rank]
        for work in receives + sends:
            work.wait()
        for _, tensor in told:
            part += tensor

    def _write_shared(self) -> None:
        for piece, x in zip(self.pieces, self.shared, strict=True):
            mean = x.clone()
            self.comm.all_reduce(mean, ReduceOp.AVG)  # of the weights the mean is 1
            piece.write(mean)

    def _state(self) -> dict[str, Any]:
        return {"shared": self.shared, "weight": self.weight}

    def _load(self, state: dict[str, Any]) -> None:
        for x, its in zip(self.shared, state["shared"], strict=True):
            x.copy_(its)
        self.weight = state["weight"]
