"""Uneven numbers of batches: ranks that ran out follow those that have not.

::

    with ddp.join():
        for batch in batches:             # 3 on this rank, 5 on another one
            optimizer.zero_grad()
            loss(ddp(batch)).backward()
            optimizer.step()

Every forward inside begins with a *round*, a small all-reduce in which each rank says whether it has a batch. A rank
that left the loop takes part in the rounds, and in the collectives that follow from them, with gradients of zero, until
a round finds no rank with a batch. It takes no steps of its own meanwhile: at the end it gets the model of a rank that
had a batch in the last round; the state of its optimizer stays behind. Gradients are divided by the full world size
throughout, so a step with fewer batches is a smaller one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from minidist.communicator import Communicator
from minidist.gradients.replicas import broadcast_module
from minidist.sync_batch_norm import SyncBatchNorm


@dataclass(frozen=True)
class _Round:
    """Which ranks have a batch (lowest first), and what their forward and backward will communicate."""

    active: list[int]
    syncs_buffers: bool
    syncs_gradients: bool


class Wrapper(Protocol):
    """What a `Join` needs of the wrapper that it is for; see `minidist.ddp.DistributedDataParallel`."""

    comm: Communicator
    module: nn.Module
    training: bool

    def modules(self) -> Iterator[nn.Module]: ...

    def sync_buffers(self, src: int = 0) -> None: ...

    def reduce_gradients(self) -> None: ...


class Join:
    """One rank's part in the rounds of one ``with ddp.join()``."""

    def __init__(self, ddp: Wrapper) -> None:
        if any(isinstance(module, SyncBatchNorm) for module in ddp.modules()):
            raise ValueError(
                f"{ddp.comm.who('join')}: SyncBatchNorm needs every rank in every forward; give all ranks equally many "
                "batches, or use BatchNorm"
            )
        self._ddp = ddp
        self._source: int | None = None

    def announce(self, will_sync: bool) -> int:
        """Say that this rank has a batch; return the rank whose buffers count, the lowest with a batch."""
        return self._round(True, will_sync and self._ddp.training, will_sync).active[0]

    def follow(self) -> None:
        """Take part in what the others do until no rank has a batch; then take over the final model."""
        while (now := self._round(False, False, False)).active:
            if now.syncs_buffers:
                self._ddp.sync_buffers(now.active[0])
            if now.syncs_gradients:
                self._ddp.module.zero_grad(set_to_none=True)
                self._ddp.reduce_gradients()
        if self._source is not None:
            broadcast_module(self._ddp.comm, self._ddp.module, self._source)

    def _round(self, has_batch: bool, syncs_buffers: bool, syncs_gradients: bool) -> _Round:
        comm = self._ddp.comm
        says = torch.zeros(comm.world_size + 2, dtype=torch.int64)
        says[comm.rank] = has_batch
        says[-2] = syncs_buffers
        says[-1] = syncs_gradients
        says = says.to(comm.device_type)
        comm.all_reduce(says)
        *has_batches, num_buffers, num_gradients = says.tolist()
        active = [rank for rank, answer in enumerate(has_batches) if answer]
        if active:
            self._source = active[0]
        return _Round(active, num_buffers > 0, num_gradients > 0)
