"""The sharded optimizer: what it comes to is in sharded_checks.py; here, where, what it refuses, and checkpoints."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn, optim

from backends.thread import run_threads
from minidist import ShardedOptimizer
from minidist.communicator import Communicator
from minidist.ddp import DistributedDataParallel
from minidist.gradients.hooks import AllReduce, BFloat16
from minidist.training.checkpoint import Checkpoints
from tests import models, sharded_checks, training_checks
from tests.harness import run_forked
from tests.test_engine import make_engine, parameters, samples, shard


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("check", sharded_checks.CHECKS)
def test_equals_the_unsharded_optimizer(check: Callable[[Communicator], None], world_size: int) -> None:
    run_threads(check, world_size, timeout_s=60)


def test_sends_what_an_all_reduce_sends() -> None:
    run_threads(sharded_checks.check_sends_what_an_all_reduce_sends, 3, timeout_s=60)


@pytest.mark.parametrize(
    ("comm", "world_size"),
    [
        ("gloo", 2),
        ("shm", 2),
        ("fused", 2),
        pytest.param("fused", 1, marks=pytest.mark.slow),
        pytest.param("fused", 3, marks=pytest.mark.slow),
        pytest.param("shm", 3, marks=pytest.mark.slow),
        pytest.param("gloo", 3, marks=pytest.mark.slow),
        pytest.param("ring", 3, marks=pytest.mark.slow),
    ],
)
def test_on_ranks_that_are_processes(comm: str, world_size: int, tmp_path: Path) -> None:
    returncode, output = run_forked(
        "tests.sharded_ranks", comm, world_size=world_size, output=tmp_path / "output.txt", limit_s=100
    )
    assert returncode == 0, output
    assert output.count("passed") == world_size


# What it refuses --------------------------------------------------------------------------------


def wrapped(comm: Communicator, **options: object) -> DistributedDataParallel:
    return DistributedDataParallel(models.seeded(models.mlp()), comm, **options)


def sharded(ddp: DistributedDataParallel) -> ShardedOptimizer:
    return ShardedOptimizer(ddp.parameters(), optim.SGD, ddp.comm, lr=0.1)


def unwrapped(comm: Communicator) -> None:
    ShardedOptimizer(models.mlp().parameters(), optim.SGD, comm, lr=0.1)


def another_communicator(comm: Communicator) -> None:
    other = comm.split(0)
    assert other is not None
    ddp = wrapped(comm)
    ShardedOptimizer(ddp.parameters(), optim.SGD, other, lr=0.1)


def another_model(comm: Communicator) -> None:
    ddp = wrapped(comm)
    ShardedOptimizer([*ddp.parameters(), nn.Parameter(torch.ones(4))], optim.SGD, comm, lr=0.1)


def a_second_one(comm: Communicator) -> None:
    ddp = wrapped(comm)
    sharded(ddp)
    sharded(ddp)


def not_elementwise(comm: Communicator) -> None:
    ShardedOptimizer(wrapped(comm).parameters(), optim.LBFGS, comm)


def hook_of_whole_buckets(comm: Communicator) -> None:
    sharded(wrapped(comm, hook=BFloat16()))


def hook_before(comm: Communicator) -> None:
    ddp = wrapped(comm)
    ddp.register_reduced_grad_hook(lambda parameter: None)
    sharded(ddp)


def hook_after(comm: Communicator) -> None:
    ddp = wrapped(comm)
    sharded(ddp)
    ddp.register_reduced_grad_hook(lambda parameter: None)


def gradients_before(comm: Communicator) -> None:
    ddp = wrapped(comm)
    ddp(torch.ones(2, 5)).sum().backward()
    sharded(ddp)


def second_backward(comm: Communicator) -> None:
    ddp = wrapped(comm)
    sharded(ddp)
    for _ in range(2):
        ddp(torch.ones(2, 5)).sum().backward()


def join(comm: Communicator) -> None:
    ddp = wrapped(comm)
    sharded(ddp)
    with ddp.join():
        pass


def other_memory(comm: Communicator) -> None:
    ddp = wrapped(comm)
    optimizer = sharded(ddp)
    weight = ddp.module[0].weight
    weight.data = weight.data.clone()
    optimizer.step()


def gradients_of_zero(comm: Communicator) -> None:
    sharded(wrapped(comm)).zero_grad(set_to_none=False)


@pytest.mark.parametrize(
    ("mistake", "kind", "message"),
    [
        (unwrapped, ValueError, "not those of a wrapped model; wrap it in DistributedDataParallel first"),
        (another_communicator, ValueError, "wrapped over another communicator"),
        (another_model, ValueError, r"shape \(4,\) is not one of the wrapper's"),
        (a_second_one, RuntimeError, "has another ShardedOptimizer; give all parameters to one"),
        (not_elementwise, TypeError, "LBFGS is not known to compute each element by itself.*use one of SGD, Adam"),
        (hook_of_whole_buckets, RuntimeError, r"hook is BFloat16.*wrap with hook=AllReduce\(\)"),
        (hook_before, RuntimeError, "has a hook from register_reduced_grad_hook"),
        (
            hook_after,
            RuntimeError,
            "register_reduced_grad_hook: with a ShardedOptimizer no parameter has its mean",
        ),
        (gradients_before, RuntimeError, "make the optimizer before the first backward pass"),
        (second_backward, RuntimeError, r"pass before are still there; call the optimizer's zero_grad\(\)"),
        (join, RuntimeError, "join: with a ShardedOptimizer a rank without a batch takes no step"),
        (other_memory, RuntimeError, "parameter 0.weight was given other memory"),
        (gradients_of_zero, RuntimeError, "set_to_none=False"),
    ],
)
def test_refused_on_every_rank(mistake: Callable[[Communicator], None], kind: type[Exception], message: str) -> None:
    def job(comm: Communicator) -> None:
        with pytest.raises(kind, match=re.compile(message, re.DOTALL)):
            mistake(comm)
        comm.barrier()

    run_threads(job, 2, timeout_s=30)


def test_refused_before_anything_changed() -> None:
    """What was refused leaves the wrapper as it was, to be trained without shares."""

    def job(comm: Communicator) -> None:
        ddp = training_checks.wrapped(training_checks.CASES["mlp"], comm)
        for kind in (optim.LBFGS, optim.SGD):
            with pytest.raises((TypeError, ValueError)):
                ShardedOptimizer([*ddp.parameters(), nn.Parameter(torch.ones(4))], kind, comm, lr=0.1)
        assert type(ddp.hook) is AllReduce
        training_checks.backward(ddp, 0)
        training_checks.assert_gradients(ddp, [0])

    run_threads(job, 2, timeout_s=30)


def test_a_class_derived_from_an_elementwise_one_passes() -> None:
    class Mine(optim.AdamW):
        pass

    def job(comm: Communicator) -> None:
        ddp = wrapped(comm)
        assert type(ShardedOptimizer(ddp.parameters(), Mine, comm, lr=0.1).inner) is Mine

    run_threads(job, 2)


def test_hooks_see_no_gradients_of_a_pass_that_broke_off() -> None:
    """An optimizer in a hook would take a step with gradients that are half reduced."""

    def job(comm: Communicator) -> None:
        ddp = wrapped(comm, bucket_cap_mb=1e-5)
        seen = []
        ddp.register_reduced_grad_hook(seen.append)
        handle = ddp.module[0].weight.register_hook(training_checks._fail_on_purpose)
        with pytest.raises(ArithmeticError):
            ddp(torch.ones(2, 5)).sum().backward()
        handle.remove()
        output = ddp(torch.ones(2, 5))
        assert not seen
        output.sum().backward()
        assert len(seen) == 4

    run_threads(job, 2, timeout_s=30)


# Resuming ---------------------------------------------------------------------------------------


def test_state_moves_to_another_number_of_ranks() -> None:
    """Trained on 3 ranks, all with the same batches, then on 2: the bits of one rank that never stopped."""

    def job(comm: Communicator, state: list[dict], steps: range) -> list[dict]:
        ddp = training_checks.wrapped(training_checks.CASES["mlp"], comm)
        optimizer = ShardedOptimizer(ddp.parameters(), optim.AdamW, comm, lr=0.1)
        if state:
            ddp.module.load_state_dict(state[0])
            optimizer.load_state_dict(state[1])
        for step in steps:
            inputs, target = training_checks.batch(step, 0)
            optimizer.zero_grad()
            training_checks.loss_of(ddp(inputs), target).backward()
            optimizer.step()
        return copy.deepcopy([ddp.module.state_dict(), optimizer.state_dict()])

    def train(world_size: int, state: list[dict], *steps: int) -> list[dict]:
        return run_threads(lambda comm: job(comm, state, range(*steps)), world_size, timeout_s=30)[0]

    expected = train(1, [], 6)
    resumed = train(2, train(4, train(3, [], 2), 2, 4), 4, 6)
    sharded_checks.assert_same(resumed, expected, tolerance=1e-12)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_engine_resumes_to_the_same_bits(tmp_path: Path, world_size: int) -> None:
    """With shares, without, and from the one to the other, accumulation and schedule included."""

    def job(comm: Communicator, where: Path, epochs: int, resume: bool, in_shares: bool) -> list[torch.Tensor]:
        checkpoints = Checkpoints(where, comm, resume=resume)
        engine = make_engine(comm, accumulation_steps=2, checkpoints=checkpoints, in_shares=in_shares)
        engine.fit(shard(comm, samples()), epochs=epochs)
        return parameters(engine)

    def train(where: Path, *arguments: object) -> list[list[torch.Tensor]]:
        return run_threads(lambda comm: job(comm, where, *arguments), world_size, timeout_s=30)

    expected = train(tmp_path / "whole", 4, False, False)
    sharded_checks.assert_same(train(tmp_path / "shares", 4, False, True), expected)
    for before, after in ((True, True), (True, False), (False, True)):
        where = tmp_path / f"{before}-{after}"
        train(where, 2, False, before)
        sharded_checks.assert_same(train(where, 4, True, after), expected)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_engine_clips(world_size: int) -> None:
    def job(comm: Communicator, in_shares: bool) -> list[torch.Tensor]:
        engine = make_engine(comm, max_grad_norm=0.1, in_shares=in_shares)
        engine.fit(shard(comm, samples()), epochs=2)
        return parameters(engine)

    clipped, expected = (run_threads(lambda c, s=s: job(c, s), world_size, timeout_s=30) for s in (True, False))
    sharded_checks.assert_same(clipped, expected, tolerance=1e-12)
