"""Trainings, each of one model and one way to share its gradients, parameters or states."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

STEPS = 4
HELD: list[object] = []
"""The process group, to the end: where a callback of PowerSGD's is the last to hold it, native Gloo ends the process,
as the callback's thread would have to wait for itself ("Resource deadlock avoided"; torch 2.14 and 2.15)."""


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 33), nn.Tanh(), nn.Linear(33, 17), nn.Tanh(), nn.Linear(17, 1))


def train(
    wrapped: nn.Module,
    optimizer: torch.optim.Optimizer,
    clip: bool = False,
    seed: int | None = None,
    num_steps: int = STEPS,
) -> None:
    """Train on batches that are each rank's own, or the same on all where there is a seed."""
    wrapped(torch.ones(8, 20)).square().mean().backward()  # torch's DDP then puts its buckets into the order of these
    generator = torch.Generator().manual_seed(dist.get_rank() if seed is None else seed)
    for _ in range(num_steps):
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


def borrowed_bitwise(folder: Path) -> Any:
    from minidist.c10d import from_process_group
    from minidist.communicator import ReduceOp

    with from_process_group() as comm:
        integers = [torch.tensor([12, 5, 7 * comm.rank]) for _ in range(3)]
        flags = [torch.tensor([True, comm.rank == 0, False]) for _ in range(3)]
        for op, integer, flag in zip((ReduceOp.BAND, ReduceOp.BOR, ReduceOp.BXOR), integers, flags, strict=True):
            comm.all_reduce(integer, op)
            comm.all_reduce(flag, op)
    return [*integers, *flags]


def borrowed_and_destroyed(folder: Path) -> Any:
    """Return the names of torch's threads that are left, and what an operation says."""
    from minidist.c10d import from_process_group
    from minidist.errors import CommClosedError

    comm = from_process_group()
    comm.all_reduce(torch.ones(3), async_op=True).wait()
    dist.destroy_process_group()
    threads = [file.read_text().strip() for file in Path("/proc/self/task").glob("*/comm")]
    try:
        comm.all_reduce(torch.ones(3))
    except CommClosedError as error:
        return [name for name in threads if "gloo" in name], str(error)
    return "nothing"


def zero_redundancy(folder: Path) -> Any:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    wrapped = nn.parallel.DistributedDataParallel(model())
    train(wrapped, ZeroRedundancyOptimizer(wrapped.parameters(), torch.optim.Adam, lr=0.01))
    return parameters(wrapped)


def power_sgd(folder: Path) -> Any:
    """A hook that waits inside of a callback."""
    HELD.append(dist.group.WORLD)
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


def half_precision(folder: Path) -> Any:
    """A hook that sends gradients as float16."""
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook

    wrapped = nn.parallel.DistributedDataParallel(model())
    wrapped.register_comm_hook(None, fp16_compress_hook)
    train(wrapped, adam(wrapped))
    return parameters(wrapped)


def uneven(folder: Path) -> Any:
    """Rank r has r more batches; the ranks that are through shadow the collectives of the others."""
    from torch.distributed.algorithms import Join
    from torch.distributed.optim import ZeroRedundancyOptimizer

    wrapped = nn.parallel.DistributedDataParallel(model())
    optimizer = ZeroRedundancyOptimizer(wrapped.parameters(), torch.optim.Adam, lr=0.01)
    with Join([wrapped, optimizer]):
        train(wrapped, optimizer, num_steps=STEPS + dist.get_rank())
    return parameters(wrapped)
