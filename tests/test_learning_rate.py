"""Learning rates: stepped when they are due, resumed to the bit, and refused where they could not be."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from backends.serial import SerialCommunicator
from minidist.ddp import DistributedDataParallel
from minidist.engine import Engine
from minidist.training.checkpoint import Checkpoints
from minidist.training.optimisation import Optimisation
from minidist.training.sampler import ShardedSampler
from tests.test_engine import NUM_SAMPLES, WORLDS, failures, make_model, on_ranks, parameters, samples, shard


def plateau_engine(comm, **options):
    """Patience 0 and a threshold that few epochs pass: the rate falls in the middle of training."""
    model = DistributedDataParallel(make_model(), comm)
    optimizer = torch.optim.SGD(model.parameters(), 0.2, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=0.02)
    return Engine(model, optimizer, nn.functional.cross_entropy, comm, Optimisation(scheduler), **options)


@pytest.mark.parametrize("world_size", WORLDS)
def test_a_plateau_is_seen_in_the_loss_of_each_evaluation(world_size):
    def by_hand():
        model, data, rates = make_model(), samples(), []
        optimizer = torch.optim.SGD(model.parameters(), 0.2, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=0.02)
        for epoch in range(6):
            sampler = ShardedSampler(NUM_SAMPLES, 0, 1, 6, shuffle=True, seed=3)
            sampler.set_epoch(epoch)
            for inputs, targets in DataLoader(data, 6, sampler=sampler):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(inputs), targets).backward()
                optimizer.step()
            inputs, targets = data.tensors
            scheduler.step(nn.functional.cross_entropy(model(inputs), targets).item())
            rates += scheduler.get_last_lr()
        return rates

    def job(comm):
        engine, rates = plateau_engine(comm), []
        for epoch in range(6):
            engine.fit(shard(comm, samples()), epoch + 1, shard(comm, samples(), train=False))
            rates += engine.optimisation.scheduler.get_last_lr()
        return rates

    expected = by_hand()
    assert expected[-1] < 0.2
    assert on_ranks(job, world_size) == [expected] * world_size


def test_a_plateau_is_resumed_to_the_same_bits(tmp_path):
    def train(comm, directory, epochs, resume):
        engine = plateau_engine(comm, checkpoints=Checkpoints(directory, comm, resume=resume))
        engine.fit(shard(comm, samples()), epochs, shard(comm, samples(), train=False))
        return parameters(engine), engine.optimisation.scheduler.state_dict()

    whole = on_ranks(lambda comm: train(comm, tmp_path / "whole", 6, False), 2)
    for epochs in (2, 5):
        on_ranks(lambda comm, epochs=epochs: train(comm, tmp_path / "again", epochs, epochs > 2), 2)
    again = on_ranks(lambda comm: train(comm, tmp_path / "again", 6, True), 2)
    for (expected, state), (got, same) in zip(whole, again, strict=True):
        assert all(map(torch.equal, got, expected))
        assert same == state
        assert state["_last_lr"][0] < 0.2


def test_a_plateau_without_an_evaluation_is_refused_on_every_rank():
    for message in failures(lambda comm: plateau_engine(comm).fit(shard(comm, samples()), epochs=1), 2, ValueError):
        assert "ReduceLROnPlateau is stepped with the loss of each evaluation, and there is no eval_loader" in message


class ByEpoch(torch.optim.lr_scheduler.LRScheduler):
    """A scheduler of somebody's that wants to be told."""

    def get_lr(self):
        return [group["lr"] for group in self.optimizer.param_groups]

    def step(self, epoch, metrics):
        self.last_epoch = epoch

    def _initial_step(self):
        return


class WithClosure(torch.optim.SGD):
    """An optimizer of somebody's that evaluates the loss itself."""

    def step(self, closure):
        return super().step(closure)


@pytest.mark.parametrize(
    ("optimizer", "scheduler", "message"),
    [
        (torch.optim.LBFGS, None, r"LBFGS\.step needs a closure.*choose SGD, AdamW or another one without"),
        (WithClosure, None, r"WithClosure\.step needs a closure"),
        (torch.optim.SGD, ByEpoch, r"ByEpoch\.step needs epoch, metrics, which the engine does not know"),
    ],
)
def test_what_an_engine_cannot_step_is_refused_when_it_is_made(optimizer, scheduler, message):
    comm = SerialCommunicator()
    model = DistributedDataParallel(make_model(), comm)
    optimizer = optimizer(model.parameters(), lr=0.1)
    scheduler = scheduler and scheduler(optimizer)
    with pytest.raises(ValueError, match=message):
        Engine(model, optimizer, nn.functional.cross_entropy, comm, Optimisation(scheduler))


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "Adagrad", "RMSprop", "NAdam", "Rprop", "Adafactor"])
def test_every_usual_optimizer_can_be_stepped(name):
    comm = SerialCommunicator()
    model = DistributedDataParallel(make_model(), comm)
    optimizer = getattr(torch.optim, name)(model.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [torch.optim.lr_scheduler.LinearLR(optimizer), torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5)],
        [2],
    )
    engine = Engine(model, optimizer, nn.functional.cross_entropy, comm, Optimisation(scheduler))
    assert engine.fit(shard(comm, samples()), epochs=1).steps == 5


@pytest.mark.parametrize("kind", [np.float64, np.float32, float])
def test_learning_rates_of_numpy_are_resumed_to_the_same_bits(tmp_path, kind):
    def train(comm, directory, epochs, resume):
        model = DistributedDataParallel(make_model(), comm)
        optimizer = torch.optim.SGD(model.parameters(), kind(0.1), momentum=np.float64(0.9))
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: np.cos(kind(step)) + kind(1.2))
        checkpoints = Checkpoints(directory, comm, resume=resume)
        engine = Engine(
            model, optimizer, nn.functional.cross_entropy, comm, Optimisation(scheduler), checkpoints=checkpoints
        )
        engine.fit(shard(comm, samples()), epochs)
        return parameters(engine), scheduler.get_last_lr(), engine.position.step

    whole = on_ranks(lambda comm: train(comm, tmp_path / "whole", 3, False), 2)
    on_ranks(lambda comm: train(comm, tmp_path / "again", 1, False), 2)
    again = on_ranks(lambda comm: train(comm, tmp_path / "again", 3, True), 2)
    for (expected, rates, steps), (got, same_rates, same_steps) in zip(whole, again, strict=True):
        assert all(map(torch.equal, got, expected))
        assert (same_rates, same_steps) == (rates, steps)
