"""What each rank of a world runs in tests/test_c10d.py: ``python -m tests.c10d_ranks <program> <backend> <folder>``.

A program gets an initialised process group of torch and returns what is saved for the test to compare; it uses torch
alone, unless its name says otherwise.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

STEPS = 4


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 33), nn.Tanh(), nn.Linear(33, 17), nn.Tanh(), nn.Linear(17, 1))


def train(wrapped: nn.Module, optimizer: torch.optim.Optimizer, clip: bool = False) -> None:
    wrapped(torch.ones(8, 20)).square().mean().backward()  # torch's DDP then puts its buckets into the order of these
    generator = torch.Generator().manual_seed(dist.get_rank())
    for _ in range(STEPS):
        optimizer.zero_grad()
        wrapped(torch.randn(8, 20, generator=generator)).square().mean().backward()
        if clip:
            nn.utils.clip_grad_norm_(wrapped.parameters(), 0.1)
        optimizer.step()


def adam(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(module.parameters(), lr=0.01)


def parameters(module: nn.Module) -> list[Tensor]:
    return [parameter.detach() for parameter in module.parameters()]


def stock_ddp(folder: Path) -> Any:
    wrapped = nn.parallel.DistributedDataParallel(model())
    train(wrapped, adam(wrapped))
    return parameters(wrapped)


def own_ddp(folder: Path) -> Any:
    """Minidist's own, over the communicator of the group."""
    from minidist.ddp import DistributedDataParallel

    wrapped = DistributedDataParallel(model(), dist.group.WORLD._get_backend(torch.device("cpu")).comm)
    train(wrapped, adam(wrapped))
    return parameters(wrapped.module)


def borrowed_ddp(folder: Path) -> Any:
    """Minidist's own, in a program that has made a process group itself."""
    from minidist.c10d import from_process_group
    from minidist.ddp import DistributedDataParallel

    with from_process_group() as comm:
        wrapped = DistributedDataParallel(model(), comm)
        train(wrapped, adam(wrapped))
    return parameters(wrapped.module)


def fsdp(folder: Path) -> Any:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    module: Any = model()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in module[::2]:
        fully_shard(layer, mesh=mesh)
    fully_shard(module, mesh=mesh)
    train(module, adam(module), clip=True)
    return [parameter.full_tensor().detach() for parameter in module.parameters()]


def zero_redundancy(folder: Path) -> Any:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    wrapped = nn.parallel.DistributedDataParallel(model())
    train(wrapped, ZeroRedundancyOptimizer(wrapped.parameters(), torch.optim.Adam, lr=0.01))
    return parameters(wrapped)


def power_sgd(folder: Path) -> Any:
    """A hook that waits inside of a callback."""
    from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook

    wrapped = nn.parallel.DistributedDataParallel(model())
    state = powerSGD_hook.PowerSGDState(None, matrix_approximation_rank=1, start_powerSGD_iter=2)
    wrapped.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
    train(wrapped, adam(wrapped))
    return parameters(wrapped)


def checkpoint(folder: Path) -> Any:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    module, other = (fully_shard(model(), mesh=mesh) for _ in range(2))
    train(module, adam(module))
    path = folder / "checkpoint"
    dcp.save({"model": module.state_dict()}, checkpoint_id=path)
    state = {"model": other.state_dict()}
    dcp.load(state, checkpoint_id=path)
    other.load_state_dict(state["model"])
    both = zip(module.parameters(), other.parameters(), strict=True)
    assert all(torch.equal(a.full_tensor(), b.full_tensor()) for a, b in both)  # type: ignore[attr-defined]
    return [parameter.full_tensor().detach() for parameter in other.parameters()]  # type: ignore[attr-defined]


def groups(folder: Path) -> Any:
    """Groups of some ranks, also made by those alone, and several at a time."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    found = []
    for first in range(world_size):
        ranks = sorted({first, (first + 1) % world_size})
        group = dist.new_group(ranks)
        tensor = torch.tensor([float(rank)])
        if rank in ranks:
            dist.all_reduce(tensor, group=group)
            assert tensor.item() == sum(ranks)
            found.append(tensor)
    if rank < 2:
        group = dist.new_group([0, 1], use_local_synchronization=True)
        tensor = torch.ones(1)
        dist.all_reduce(tensor, group=group)
        found.append(tensor)
        dist.destroy_process_group(group)
    return found


def functional(folder: Path) -> Any:
    import torch.distributed._functional_collectives as funcol

    group = dist.group.WORLD
    rank, n = dist.get_rank(), dist.get_world_size()
    tensor = torch.arange(6.0) + rank
    return [
        funcol.all_reduce(tensor, "sum", group) + 0,
        funcol.all_gather_tensor(tensor, 0, group) + 0,
        funcol.reduce_scatter_tensor(torch.arange(2.0 * n) * (rank + 1), "sum", 0, group) + 0,
        funcol.all_to_all_single(torch.arange(2.0 * n), None, None, group) + 0,
        *[t + 0 for t in funcol.all_reduce_coalesced([tensor, tensor * 2], "sum", group)],
    ]


def compiled(folder: Path) -> Any:
    import torch.distributed._functional_collectives as funcol

    @torch.compile(backend="aot_eager")
    def step(tensor: Tensor) -> Tensor:
        return funcol.all_reduce(tensor * 2, "sum", dist.group.WORLD) + 1

    return [step(torch.arange(6.0) + dist.get_rank()) for _ in range(2)]


def killed(folder: Path) -> Any:
    """Rank 1 ends in the middle of a training."""
    wrapped = nn.parallel.DistributedDataParallel(model())
    train(wrapped, adam(wrapped))
    loss = wrapped(torch.ones(8, 20)).mean()
    if dist.get_rank() == 1:
        os._exit(0)
    return _failure(loss.backward)


def late(folder: Path) -> Any:
    """Rank 1 does not take part in time."""
    wrapped = nn.parallel.DistributedDataParallel(model())
    train(wrapped, adam(wrapped))
    loss = wrapped(torch.ones(8, 20)).mean()
    if dist.get_rank() == 1:
        time.sleep(8)
        return []
    return _failure(loss.backward)


def _failure(action: Callable[[], object]) -> list[str]:
    started = time.monotonic()
    try:
        action()
    except Exception as error:
        kinds = [kind.__name__ for kind in type(error).__mro__]
        seconds = time.monotonic() - started
        started = time.monotonic()
        dist.destroy_process_group()
        return [*kinds, str(error), f"{seconds:.1f}", f"{time.monotonic() - started:.1f}"]
    return ["nothing"]


def main() -> None:
    program, backend, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    timeout = timedelta(seconds=3 if program == "late" else 60)
    dist.init_process_group(backend, timeout=timeout)
    rank = dist.get_rank()
    torch.save(globals()[program](folder), folder / f"{program}-{rank}.pt")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
