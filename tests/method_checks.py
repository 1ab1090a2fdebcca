"""What methods have to do, as functions of a communicator; models and batches have closed forms in (step, rank).

A `Run` trains by hand, as the engine does. tests/test_methods.py gives wrong methods to the checks, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from minidist.communicator import Communicator
from minidist.ddp import DistributedDataParallel
from minidist.engine import Engine
from minidist.methods import DiLoCo, EveryStep, Gossip, LocalSGD, Method, SparseLoCo, StreamingDiLoCo
from minidist.methods.gossip import Graph, exponential
from minidist.training.checkpoint import Checkpoints
from minidist.training.sampler import ShardedSampler
from tests import models, training_checks

Make = Callable[[], Method]
PERIOD = 3
METHODS: dict[str, Make] = {
    "local_sgd": lambda: LocalSGD(PERIOD),
    "post_local_sgd": lambda: LocalSGD(PERIOD, local_after=4),
    "diloco": lambda: DiLoCo(PERIOD),
    "streaming_diloco": lambda: StreamingDiLoCo(PERIOD, num_fragments=2, tau=2),  # one is in flight at each checkpoint
    "sparse_loco": lambda: SparseLoCo(PERIOD, fraction=0.2),
    "gossip": Gossip,
}
"""Each with a period of `PERIOD`, where it has one."""


def sgd(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9)


def plain_sgd(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), lr=0.125)


def adamw(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(module.parameters(), lr=0.01)


class Run:
    """A training on the ranks of ``comm``, one step at a time."""

    def __init__(
        self,
        comm: Communicator,
        method: Method,
        make_optimizer: Callable[[nn.Module], torch.optim.Optimizer] = sgd,
        model: nn.Module | None = None,
    ) -> None:
        self.comm, self.method = comm, method
        module = models.seeded(models.mlp().double(), comm.rank) if model is None else model  # another on each rank
        self.ddp = DistributedDataParallel(module, method.replica_comm(comm))
        self.optimizer = make_optimizer(self.ddp)
        method.begin(self.ddp, self.optimizer, comm)
        self.step = 0

    def steps(self, num_steps: int) -> Run:
        """Take steps on the batches of `training_checks.batch`."""
        for _ in range(num_steps):
            self.step += 1
            inputs, targets = training_checks.batch(self.step, self.comm.rank)
            self.on(lambda model, x=inputs, y=targets: training_checks.loss_of(model(x), y))
        return self

    def on(self, loss_of: Callable[[nn.Module], Tensor]) -> None:
        self.optimizer.zero_grad()
        with nullcontext() if self.method.averages_gradients(self.step) else self.ddp.no_sync():
            loss_of(self.ddp).backward()
        self.optimizer.step()
        self.method.after_step(self.step)

    def parameters(self) -> list[Tensor]:
        return [parameter.detach().clone() for parameter in self.ddp.parameters()]

    def shown(self) -> list[Tensor]:
        with self.method.shown():
            return self.parameters()

    def everywhere(self) -> list[list[Tensor]]:
        """Return the parameters of all ranks."""
        return self.comm.all_gather_object(self.parameters())


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    return all(map(torch.equal, left, right))


def are_replicas_identical(run: Run) -> bool:
    first, *others = run.everywhere()
    return all(same(first, other) for other in others)


# Every-step averages ------------------------------------------------------------------------------


def exact_losses(rank: int) -> Iterator[Callable[[nn.Module], Tensor]]:
    """Yield losses of a linear layer whose gradients, over 1, 2 or 4 ranks, no float64 has to round."""
    for step in range(4):
        x = torch.arange(4.0).add(step + rank).remainder(3).sub(1).double()
        y = torch.arange(2.0).add(rank - step).double()
        yield lambda model, x=x, y=y: ((model(x) - y) ** 2).sum() / 4


def check_equals_ddp(comm: Communicator, make: Make) -> None:
    """With a period of 1 over plain SGD: bit for bit where nothing is rounded, to rounding elsewhere."""
    if comm.world_size in (1, 2, 4):
        runs = []
        for method in (make(), EveryStep()):
            layer = nn.Linear(4, 2).double()
            with torch.no_grad():
                for parameter in layer.parameters():
                    parameter.copy_(torch.arange(parameter.numel()).view_as(parameter) % 3 - 1)
            runs.append(Run(comm, method, plain_sgd, layer))
            for loss_of in exact_losses(comm.rank):
                runs[-1].step += 1
                runs[-1].on(loss_of)
        assert same(runs[0].parameters(), runs[1].parameters())
    ours, ddp = (Run(comm, method, plain_sgd).steps(6).parameters() for method in (make(), EveryStep()))
    for left, right in zip(ours, ddp, strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=1e-13)


# One process ----------------------------------------------------------------------------------------


def one_process(method: DiLoCo | StreamingDiLoCo, world_size: int, steps: int) -> list[list[Tensor]]:
    """Return the parameters of all ranks after so many steps, computed here with torch alone, by the papers."""
    fragments, tau, mixing = [range(4)], 0, 0.0
    if isinstance(method, StreamingDiLoCo):
        fragments, tau, mixing = [range(1), range(1, 4)], method.tau, method.mixing  # 40 numbers, and 35
    replicas = [models.seeded(models.mlp().double()) for _ in range(world_size)]
    optimizers = [sgd(replica) for replica in replicas]
    outer = [nn.Parameter(parameter.detach().clone()) for parameter in replicas[0].parameters()]
    settings = {"lr": method.outer_lr, "momentum": method.outer_momentum, "nesterov": True}
    outer_optimizers = [torch.optim.SGD([outer[i] for i in fragment], **settings) for fragment in fragments]
    for step in range(1, steps + 1):
        for rank, (replica, optimizer) in enumerate(zip(replicas, optimizers, strict=True)):
            inputs, targets = training_checks.batch(step, rank)
            optimizer.zero_grad()
            training_checks.loss_of(replica(inputs), targets).backward()
            optimizer.step()
        for number, fragment in enumerate(fragments):
            offset = (number + 1) * method.period // len(fragments)
            if step >= offset and (step - offset) % method.period == 0:
                for i in fragment:
                    deltas = [outer[i].detach() - list(replica.parameters())[i].detach() for replica in replicas]
                    outer[i].grad = sum(delta / world_size for delta in deltas)
            if step - tau >= offset and (step - tau - offset) % method.period == 0:
                outer_optimizers[number].step()
                for replica in replicas:
                    for i in fragment:
                        own = list(replica.parameters())[i]
                        own.data.copy_(own.data.lerp(outer[i].data, 1 - mixing))
    return [[parameter.detach() for parameter in replica.parameters()] for replica in replicas]


def check_equals_one_process(comm: Communicator, make: Callable[[], DiLoCo | StreamingDiLoCo]) -> None:
    """Bit for bit on 2 ranks, whose sums know one order."""
    method = make()
    expected = one_process(method, comm.world_size, 11)[comm.rank]
    got = Run(comm, method, model=models.seeded(models.mlp().double())).steps(11).parameters()
    for left, right in zip(got, expected, strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=0 if comm.world_size <= 2 else 1e-13)


def check_gossip_conserves_the_sum(comm: Communicator, graph: Graph, make: Callable[[Graph], Gossip] = Gossip) -> None:
    """Of x and of the weights, without training; z goes to the mean, whoever tells whom."""
    method = make(graph)
    run = Run(comm, method, lambda module: torch.optim.SGD(module.parameters(), lr=0.0))
    with torch.no_grad():
        for parameter in run.ddp.parameters():
            parameter.copy_(torch.full_like(parameter, 3.0 * comm.rank))
    method.begin_anew()
    mean = 1.5 * (comm.world_size - 1)
    for _ in range(100):
        run.steps(1)
        told = comm.all_gather_object((method.weight, method.shared[0][0].item()))
        assert abs(sum(weight for weight, _ in told) - comm.world_size) < 1e-12
        assert abs(sum(x for _, x in told) - mean * comm.world_size) < 1e-12
        rounds = (comm.world_size - 1).bit_length()
        if graph is exponential and comm.world_size in (2, 4) and run.step >= rounds:
            assert all((parameter == mean).all() for parameter in run.parameters()), "exact after log2(n) rounds"
    for parameter in run.parameters():
        torch.testing.assert_close(parameter, torch.full_like(parameter, mean), rtol=0, atol=1e-8)


# Bytes --------------------------------------------------------------------------------------------


def bytes_per_period(comm: Communicator, make: Make) -> int:
    """Return what this rank sends in a period, the third one, for a layer of 36 weights and 6 biases."""
    run = Run(comm, make(), model=nn.Linear(6, 6).double())
    sent = []
    for run.step in range(1, 3 * PERIOD + 1):
        run.on(lambda model: model(torch.ones(2, 6).double()).square().mean())
        run.method.state_dict()  # waits for what is in flight, and sends nothing
        sent.append(comm.traffic.bytes)
    return sent[-1] - sent[2 * PERIOD - 1]


# Replicas -----------------------------------------------------------------------------------------


def check_replicas_identical(comm: Communicator, make: Make, steps: list[int]) -> None:
    """After ``steps``, and at no other time, as then nobody trains apart."""
    run = Run(comm, make(), adamw)
    for step in range(1, max(steps) + 1):
        run.steps(1)
        assert are_replicas_identical(run) == (step in steps or comm.world_size == 1), step


def check_shown_model(comm: Communicator, make: Make) -> None:
    """It is the same on all ranks at any time; training then goes on as if nobody had looked."""
    looked, unseen = Run(comm, make()), Run(comm, make())
    for _ in range(2 * PERIOD + 1):
        looked.steps(1)
        with looked.method.shown():
            assert are_replicas_identical(looked)
        assert same(looked.parameters(), unseen.steps(1).parameters())


# Checkpoints --------------------------------------------------------------------------------------


def engine(comm: Communicator, method: Method, directory: Path, resume: bool = False) -> Engine:
    module = models.seeded(nn.Sequential(models.mlp(), nn.BatchNorm1d(models.NUM_OUTPUTS)).double(), comm.rank)
    ddp = DistributedDataParallel(module, method.replica_comm(comm))
    checkpoints = Checkpoints(directory, comm, every_steps=5, keep=100, resume=resume)
    return Engine(ddp, adamw(ddp), nn.functional.cross_entropy, comm, checkpoints=checkpoints, method=method)


def loader(comm: Communicator, train: bool = True) -> DataLoader:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(32 * comm.world_size, models.NUM_INPUTS, generator=generator, dtype=torch.float64)
    targets = torch.randint(models.NUM_OUTPUTS, (len(inputs),), generator=generator)
    sampler = ShardedSampler(len(inputs), comm.rank, comm.world_size, 4, shuffle=train, seed=3, pad=train)
    return DataLoader(TensorDataset(inputs, targets), 4, sampler=sampler, generator=torch.Generator())


def ended(trained: Engine) -> list[Tensor]:
    """Return what is shown, and this rank's own, buffers included."""
    shown = [tensor.clone() for tensor in trained.model.module.state_dict().values()]
    trained.method.hide()
    return shown + [tensor.clone() for tensor in trained.model.module.state_dict().values()]


def check_resume(comm: Communicator, make: Make, directory: Path) -> None:
    """From the middle of a round, with an evaluation on the way, to the same bits."""
    whole = engine(comm, make(), directory / "whole")
    summary = whole.fit(loader(comm), 2, loader(comm, train=False))
    expected = ended(whole)
    for step in (5, 8):  # of 16
        part = directory / f"part{step}"
        if comm.rank == 0:
            part.mkdir()
            name = f"step_{step:08d}.pt"
            (part / name).write_bytes((directory / "whole" / name).read_bytes())
        comm.barrier()
        resumed = engine(comm, make(), part, resume=True)
        again = resumed.fit(loader(comm), 2, loader(comm, train=False))
        assert again.accuracy == summary.accuracy
        assert same(ended(resumed), expected)
