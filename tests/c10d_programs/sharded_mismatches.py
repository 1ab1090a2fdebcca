"""Ranks that make mistakes around a model which FSDP2 has sharded; what each rank is told of each is saved."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from tests.c10d_programs.mismatches import told


def sharded(group: Any, width: int = 4, param_dtype: torch.dtype | None = None) -> Any:
    """Return layers each of which is sharded over the ranks of a group."""
    layers = nn.Sequential(nn.Linear(4, width), nn.Linear(width, 4))
    mesh = DeviceMesh.from_group(group, "cpu")
    for layer in layers:
        fully_shard(layer, mesh=mesh, mp_policy=MixedPrecisionPolicy(param_dtype=param_dtype))
    return layers


def shape(group: Any) -> None:
    """A layer is as wide as a rank has classes."""
    module = sharded(group, width=4 + 2 * dist.get_rank())
    module(torch.ones(2, 4))  # shape


def dtype(group: Any) -> None:
    """One rank alone gathers its parameters in another precision."""
    module = sharded(group, param_dtype=torch.bfloat16 if dist.get_rank() == 1 else None)
    module(torch.ones(2, 4))  # dtype


def op(group: Any) -> None:
    """One rank alone divides gradients after their reduction."""
    module = sharded(group)
    for layer in module:
        layer.set_force_sum_reduction_for_comms(dist.get_rank() == 1)
    module(torch.ones(2, 4)).sum().backward()  # op


def order(group: Any) -> None:
    """Two layers, of one shape, are taken in another order."""
    layers = sharded(group)
    visits = [lambda: visit_first(layers[0]), lambda: visit_second(layers[1])]
    for visit in reversed(visits) if dist.get_rank() == 1 else visits:
        visit()


def visit_first(layer: nn.Module) -> None:
    layer(torch.ones(2, 4))  # order: first


def visit_second(layer: nn.Module) -> None:
    layer(torch.ones(2, 4))  # order: second


def collective(group: Any) -> None:
    """One rank alone adds up the losses of all."""
    loss = sharded(group)(torch.ones(2, 4)).sum()
    if dist.get_rank() == 0:
        dist.all_reduce(loss.detach(), group=group)  # collective: rank 0
    loss.backward()  # collective: rank 1


def missing_rank(group: Any) -> None:
    """One rank alone has a batch more."""
    module = sharded(group)
    if dist.get_rank() == 0:
        module(torch.ones(2, 4))  # missing rank
    else:
        store = dist.distributed_c10d._get_default_store()
        store.wait(["rank 0 has given up"], timedelta(seconds=60))


def all_six(folder: Path) -> Any:
    return told([shape, dtype, op, order, collective, missing_rank])
