"""What steps in one pass have to come to, on a communicator that fuses them: those of torch's optimizers, unsharded.

Not of torch's fused ones: fused SGD fails where a parameter with momentum gets its first gradient after others.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn, optim

from minidist import ShardedOptimizer
from minidist.communicator import Communicator
from minidist.ddp import DistributedDataParallel
from tests import models, training_checks
from tests.sharded_checks import in_two_groups

KINDS: tuple[tuple[type[optim.Optimizer], dict[str, Any]], ...] = (
    (optim.SGD, {}),
    (optim.SGD, {"momentum": 0.9}),
    (optim.SGD, {"momentum": 0.9, "nesterov": True}),
    (optim.Adam, {"eps": 1e-3}),
    (optim.AdamW, {"eps": 1e-3}),
)
"""With an eps that keeps Adam from making a whole step of the rounding of a gradient that is nearly zero."""
TOLERANCE = 5e-6


def large() -> nn.Module:
    """A model of several buckets, in which shares and tiles end in the middle of parameters."""
    return nn.Sequential(nn.Linear(5, 701), nn.Tanh(), nn.Linear(701, 37), nn.Tanh(), nn.Linear(37, 3))


def pair(
    comm: Communicator, build: Callable[[], nn.Module], kind: type[optim.Optimizer], **options: Any
) -> list[tuple[DistributedDataParallel, optim.Optimizer]]:
    """Return the same replica and optimizer twice, unsharded, and in shares with direct gradients."""
    options = {"lr": 0.02, "weight_decay": 0.1, **options}
    plain, shares = (
        DistributedDataParallel(
            models.seeded(build()), comm, bucket_cap_mb=0.02, find_unused_parameters=True, direct_gradients=direct
        )
        for direct in (False, True)
    )
    return [
        (plain, kind(in_two_groups(plain), **options)),
        (shares, ShardedOptimizer(in_two_groups(shares), kind, comm, **options, fused=True)),
    ]


def backward(ddp: DistributedDataParallel, step: int) -> None:
    inputs, target = (part.float() for part in training_checks.batch(step, ddp.comm.rank))
    training_checks.loss_of(ddp(inputs), target).backward()


def tensors(optimizer: optim.Optimizer) -> dict[tuple[int, str], torch.Tensor]:
    state = optimizer.state_dict()["state"]
    return {(number, name): value for number, of in state.items() for name, value in of.items() if value is not None}


def assert_close(left: Any, right: Any) -> None:
    torch.testing.assert_close(left, right, rtol=TOLERANCE, atol=TOLERANCE)


def assert_models_close(pairs: list[tuple[DistributedDataParallel, optim.Optimizer]]) -> None:
    (plain, _), (shares, _) = pairs
    training_checks.assert_replicas_identical(shares)
    for one, other in zip(plain.parameters(), shares.parameters(), strict=True):
        assert_close(one, other)


def check_equals_torch(comm: Communicator) -> None:
    """Parameters and state, with a schedule, accumulation, and parameters that nobody used."""
    for build in (large, models.Branches, models.Tied):
        for kind, options in KINDS:
            both = pair(comm, build, kind, **options)
            schedulers = [optim.lr_scheduler.StepLR(optimizer, 2, 0.5) for _, optimizer in both]
            for step in range(5):
                for ddp, optimizer in both:
                    optimizer.zero_grad()
                    if step % 2:
                        with ddp.no_sync():
                            backward(ddp, 10 + step)
                    backward(ddp, step)
                    optimizer.step()
                for scheduler in schedulers:
                    scheduler.step()
            assert_models_close(both)
            assert_close(*(tensors(optimizer) for _, optimizer in both))


def check_reduces_in_the_step(comm: Communicator) -> None:
    """Nothing of a bucket moves before: only which parameters were used."""
    _, (ddp, optimizer) = pair(comm, large, optim.SGD)
    before = comm.traffic.bytes
    backward(ddp, 0)
    assert comm.traffic.bytes - before < 100
    optimizer.step()
    assert comm.traffic.bytes - before > 10_000


def check_clipping_and_other_steps(comm: Communicator) -> None:
    """Reduced early by a clip, stepped twice, or with options that are not fused any more: as without."""
    for kind, options in KINDS:
        both = pair(comm, large, kind, **options)
        for step in range(4):
            for ddp, optimizer in both:
                optimizer.zero_grad()
                backward(ddp, step)
                if step == 1 and isinstance(optimizer, ShardedOptimizer):
                    optimizer.clip_grad_norm_(0.01)
                elif step == 1:
                    nn.utils.clip_grad_norm_(ddp.parameters(), 0.01)
                if step == 3:
                    for group in optimizer.param_groups:
                        group["maximize"] = True
                optimizer.step()
                optimizer.step()
        assert_models_close(both)


def check_what_waits_is_left_alone(comm: Communicator) -> None:
    """A backward pass of this rank alone, between one that communicates and its step, does not compute in its place."""
    both = pair(comm, large, optim.SGD, momentum=0.9)
    for ddp, optimizer in both:
        backward(ddp, 0)
        if isinstance(optimizer, ShardedOptimizer):
            with ddp.no_sync():
                backward(ddp, 5)
        optimizer.step()
    assert_models_close(both)


def check_goes_on_after_an_exception(comm: Communicator) -> None:
    both = pair(comm, large, optim.AdamW)
    for ddp, optimizer in both:
        handle = ddp.module[0].weight.register_hook(training_checks._fail_on_purpose)
        try:
            backward(ddp, 0)
        except ArithmeticError:
            handle.remove()
        for step in range(2):
            optimizer.zero_grad()
            backward(ddp, step)
            optimizer.step()
    assert_models_close(both)


def check_state_goes_on(comm: Communicator) -> None:
    """A state that was saved goes on to the same bits, in one pass as before."""
    for kind, options in KINDS:
        _, (ddp, optimizer) = pair(comm, large, kind, **options)
        _, (resumed, other) = pair(comm, large, kind, **options)
        for step in range(2):
            optimizer.zero_grad()
            backward(ddp, step)
            optimizer.step()
        resumed.module.load_state_dict(ddp.module.state_dict())
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        for one, its in ((ddp, optimizer), (resumed, other)):
            its.zero_grad()
            backward(one, 2)
            its.step()
        assert all(torch.equal(p, q) for p, q in zip(ddp.parameters(), resumed.parameters(), strict=True))


CHECKS = (
    check_equals_torch,
    check_reduces_in_the_step,
    check_clipping_and_other_steps,
    check_what_waits_is_left_alone,
    check_goes_on_after_an_exception,
    check_state_goes_on,
)
