"""Stock programs whose ranks call different things; what each rank is told of each is saved."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

SOON = timedelta(seconds=3)


def shape(group: Any) -> None:
    """A buffer of torch's DDP is as long as a rank has data."""
    model = nn.Linear(3, 2)
    model.register_buffer("seen", torch.zeros(3 + dist.get_rank()))
    nn.parallel.DistributedDataParallel(model, process_group=group)  # shape


def dtype(group: Any) -> None:
    total = 1 if dist.get_rank() == 1 else 1.0
    dist.all_reduce(torch.tensor([total]), group=group)  # dtype


def op(group: Any) -> None:
    best = dist.ReduceOp.MAX if dist.get_rank() == 1 else dist.ReduceOp.SUM
    dist.all_reduce(torch.ones(3), best, group=group)  # op


def order(group: Any) -> None:
    """The keys of a dict come in another order."""
    metrics = {"loss": torch.ones(1), "per class": torch.ones(10)}
    for name in reversed(metrics) if dist.get_rank() == 1 else metrics:
        dist.all_reduce(metrics[name], group=group)  # order


def collective(group: Any) -> None:
    if dist.get_rank() == 0:
        dist.all_reduce(torch.ones(3), group=group)  # collective: rank 0
    dist.barrier(group=group)  # collective: rank 1


def missing_rank(group: Any) -> None:
    """What rank 0 alone calls has no partner, until rank 1 gives up to wait for another one."""
    if dist.get_rank() == 0:
        dist.all_reduce(torch.ones(3), group=group)  # missing rank
    else:
        store = dist.distributed_c10d._get_default_store()
        store.wait(["rank 0 has given up"], timedelta(seconds=60))


def all_six(folder: Path) -> Any:
    return told([shape, dtype, op, order, collective, missing_rank])


def told(mistakes: Sequence[Callable[[Any], None]]) -> dict[str, str]:
    """Make each mistake on a group of its own, and return what this rank is told."""
    store = dist.distributed_c10d._get_default_store()
    said = {}
    for mistake in mistakes:
        group = dist.new_group(timeout=SOON)
        try:
            mistake(group)
            said[mistake.__name__] = "nothing"
        except RuntimeError as error:
            said[mistake.__name__] = f"{type(error).__name__}: {error}"
    if dist.get_rank() == 0:
        store.set("rank 0 has given up", "")
    return said
