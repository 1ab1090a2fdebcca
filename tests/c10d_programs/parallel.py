"""Models whose parameters, states or layers are shared out among the ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from tests.c10d_programs.training import STEPS, adam, model, parameters, train


def full(module: nn.Module) -> list[Tensor]:
    """The parameters, each put together from all ranks."""
    return [parameter.full_tensor().detach() for parameter in module.parameters()]  # type: ignore[operator]


def fsdp1(folder: Path) -> Any:
    wrapped = FullyShardedDataParallel(model(), device_id=torch.device("cpu"))
    train(wrapped, adam(wrapped))
    with FullyShardedDataParallel.summon_full_params(wrapped):
        return [parameter.clone() for parameter in parameters(wrapped)]


def fsdp2(folder: Path) -> Any:
    module: Any = model()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in module[::2]:
        fully_shard(layer, mesh=mesh)
    fully_shard(module, mesh=mesh)
    train(module, adam(module), clip=True)
    return full(module)


def hybrid(folder: Path) -> Any:
    """Shards in two places, on a mesh of two dimensions."""
    mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("replicate", "shard"))
    module = fully_shard(model(), mesh=mesh)
    train(module, adam(module))
    return full(module)


def tensor_parallel(folder: Path) -> Any:
    """The first layer shared out by its outputs, the last one by its inputs; all ranks train on the same batches."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(20, 32), nn.Tanh(), nn.Linear(32, 1))
    plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    module = parallelize_module(layers, init_device_mesh("cpu", (dist.get_world_size(),)), plan)  # type: ignore[arg-type]
    train(module, adam(module), seed=0)
    return full(module)


def transformer(folder: Path) -> Any:
    """The model of torch's tests of DTensor: shards, and parallel in tensors and in sequences, on a mesh."""
    from torch.testing._internal.distributed._tensor.common_dtensor import ModelArgs, Transformer

    mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("shard", "parallel"))
    torch.manual_seed(0)
    module: Any = Transformer(ModelArgs(dropout_p=0.0, weight_tying=False))
    module = Transformer.parallelize(module, mesh["parallel"], use_seq_parallel=True, local_output_for_attn=True)
    for layer in module.layers:
        fully_shard(layer, mesh=mesh["shard"])
    fully_shard(module, mesh=mesh["shard"])
    optimizer, generator = adam(module), torch.Generator().manual_seed(mesh["shard"].get_local_rank())
    for _ in range(STEPS):
        optimizer.zero_grad()
        words = torch.randint(8, (4, 16), generator=generator)
        nn.functional.cross_entropy(module(words).flatten(0, 1), words.roll(-1, 1).flatten()).backward()
        nn.utils.clip_grad_norm_(module.parameters(), 0.1)
        optimizer.step()
    return full(module)


def redistributed(folder: Path) -> Any:
    """A tensor of 7 rows and 5 columns, which no two ranks share evenly, from one layout to the next."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    whole = torch.arange(35.0).view(7, 5) + 1
    rows = distribute_tensor(whole, mesh, [Shard(0)])
    columns = rows.redistribute(placements=[Shard(1)])
    total = (rows.T @ rows).redistribute(placements=[Shard(0)])  # of partial sums
    return [
        rows.to_local(),
        columns.to_local(),
        columns.full_tensor(),
        total.to_local(),
        rows.max(0).values.full_tensor(),
    ]


def pipeline(folder: Path) -> Any:
    """One forward and one backward at a time; each rank has a part of the layers."""
    rank, layers = dist.get_rank(), model()
    mine = layers[:2] if rank == 0 else layers[2:]
    stage = PipelineStage(mine, rank, dist.get_world_size(), torch.device("cpu"))
    schedule = Schedule1F1B(stage, n_microbatches=4, loss_fn=nn.functional.mse_loss)
    inputs = torch.randn(8, 20, generator=torch.Generator().manual_seed(0))
    losses: list[Tensor] = []
    schedule.step(inputs) if rank == 0 else schedule.step(target=torch.ones(8, 1), losses=losses)
    return [*losses, *[parameter.grad for parameter in mine.parameters()]]
