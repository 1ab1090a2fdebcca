"""Ranks that are gone, late or stopped; what the others are told is saved, with the seconds that it took."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.c10d_programs.training import adam, model, train

SHORT, LONGER = timedelta(seconds=2), timedelta(seconds=3)
"""The longer one is also for the ranks to meet in."""


def killed(folder: Path) -> Any:
    """Rank 1 ends in the middle of a training."""
    wrapped = _trained()
    loss = _loss(wrapped)
    if dist.get_rank() == 1:
        os._exit(0)
    return [*_failure(loss.backward), *_destroyed()]


def late(folder: Path) -> Any:
    """Rank 1 does not take part before rank 0 has given up."""
    store, wrapped = dist.distributed_c10d._get_default_store(), _trained()
    loss = _loss(wrapped)
    dist.set_timeout(SHORT)
    if dist.get_rank() == 1:
        return _wait_for(store, "rank 0 has given up")
    failure = [*_failure(loss.backward), *_destroyed()]
    store.set("rank 0 has given up", "")
    return failure


def late_for_one_operation(folder: Path) -> Any:
    """Rank 0 gives up to wait for an operation, which goes on: once rank 1 has come, its result is there."""
    store, tensor = dist.distributed_c10d._get_default_store(), torch.ones(3)
    if dist.get_rank() == 1:
        _wait_for(store, "rank 0 has given up")
        dist.all_reduce(tensor)
        return [tensor.tolist()]
    work = dist.all_reduce(tensor, async_op=True)
    failure = _failure(lambda: work.wait(SHORT))
    store.set("rank 0 has given up", "")
    work.wait()
    return [*failure, tensor.tolist()]


def late_for_one_group(folder: Path) -> Any:
    """Rank 0 gives up soon on two groups, one made so and one told so; the default one is as it was."""
    store = dist.distributed_c10d._get_default_store()
    dist.barrier()
    groups = [dist.new_group(timeout=LONGER), dist.new_group()]
    dist.set_timeout(SHORT, groups[1])
    failures = []
    if dist.get_rank() == 0:
        failures = [_failure(partial(dist.all_reduce, torch.ones(3), group=group)) for group in groups]
        store.set("rank 0 has given up", "")
    _wait_for(store, "rank 0 has given up")
    dist.all_reduce(tensor := torch.ones(3))
    return [*failures, tensor.tolist()]


def missing(folder: Path) -> Any:
    """The last two ranks do not come to a barrier that tells who is missing, first or all; all come to the next one."""
    store, rank, last = dist.distributed_c10d._get_default_store(), dist.get_rank(), dist.get_world_size() - 1
    failures = []
    dist.barrier()
    for name, all_ranks in (("first", False), ("all", True)):
        if rank < last - 1:
            failures.append(_failure(partial(dist.monitored_barrier, timeout=SHORT, wait_all_ranks=all_ranks)))
        store.set(f"{name} {rank}", "")
        _wait_for(store, *(f"{name} {other}" for other in range(last + 1)))
    dist.all_reduce(tensor := torch.ones(3))
    return [*failures, tensor.tolist()]


def aborted(folder: Path) -> Any:
    """Rank 0 aborts a group on which it has an operation under way, and rank 1 another one."""
    group: Any = dist.new_group()
    if dist.get_rank() == 1:
        return _failure(lambda: dist.broadcast(torch.ones(3), 0, group=group))
    work = dist.irecv(torch.ones(3), 1, group=group)
    group.abort()
    return [_failure(work.wait), _failure(lambda: dist.all_reduce(torch.ones(3), group=group))]


def _trained() -> nn.Module:
    wrapped = nn.parallel.DistributedDataParallel(model())
    train(wrapped, adam(wrapped))
    return wrapped


def _loss(wrapped: nn.Module) -> Tensor:
    loss: Tensor = wrapped(torch.ones(8, 20)).mean()
    return loss


def different_calls(folder: Path) -> Any:
    """Rank 0 calls something that rank 1 does not; what is told is saved with the lines of both calls."""
    wrapped = _trained()
    loss = _loss(wrapped)

    def differ() -> None:
        if dist.get_rank() == 0:
            dist.all_reduce(torch.ones(3))
        loss.backward()

    first_line = differ.__code__.co_firstlineno
    _, message, _ = _failure(differ)
    return message, first_line + 2, first_line + 3


def _failure(action: Callable[[], object]) -> list[str]:
    """Return the kinds of the error, its text, and the seconds until it came."""
    started = time.monotonic()
    try:
        action()
    except Exception as error:
        kinds = " ".join(kind.__name__ for kind in type(error).__mro__)
        return [kinds, str(error), f"{time.monotonic() - started:.1f}"]
    return ["nothing", "", ""]


def _destroyed() -> list[str]:
    started = time.monotonic()
    dist.destroy_process_group()
    return [f"{time.monotonic() - started:.1f}"]


def _wait_for(store: dist.Store, *keys: str) -> list[str]:
    store.wait(list(keys), timedelta(seconds=60))
    return []
