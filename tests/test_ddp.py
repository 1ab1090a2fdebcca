"""What DistributedDataParallel does, on ranks that are threads; the checks themselves are in training_checks.py.

That training equals that of one process is in conformance_training.py, for every communicator.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import nn

from backends.thread import run_threads
from minidist.communicator import Communicator, Work
from minidist.ddp import DistributedDataParallel
from minidist.gradients.buckets import Bucket
from tests import models, training_checks
from tests.training_checks import CASES


def run(check: Callable[..., None], world_size: int, *args: object) -> None:
    run_threads(lambda comm: check(comm, *args), world_size, timeout_s=60)


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize(
    "check",
    [
        training_checks.check_backward_passes_add_up,
        training_checks.check_several_backwards_of_one_forward,
        training_checks.check_several_forwards_of_one_backward,
        training_checks.check_no_sync_after_a_forward_that_communicates,
        training_checks.check_no_sync_sends_nothing,
        training_checks.check_autograd_grad_sends_nothing,
        training_checks.check_gradients_are_views,
        training_checks.check_buckets_start_in_order,
        training_checks.check_hook_starts_during_backward,
        training_checks.check_missing_gradient_is_named,
        training_checks.check_second_gradient_is_named,
        training_checks.check_sparse_gradient_is_named,
        training_checks.check_goes_on_after_an_exception,
        training_checks.check_wrapped_again,
    ],
)
def test_behaviour(check: Callable[..., None], world_size: int) -> None:
    run(check, world_size)


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("name", ["mlp", "batch_norm", "branches"])
def test_join(name: str, world_size: int) -> None:
    run(training_checks.check_join, world_size, name)


def test_join_without_batches() -> None:
    def job(comm):
        ddp = DistributedDataParallel(models.seeded(models.mlp(), comm.rank), comm)
        with ddp.join():
            pass
        training_checks.assert_replicas_identical(ddp)

    run_threads(job, 2)


def _reorder(model: nn.Module) -> None:
    layer = model[3]
    weight = layer.weight
    del layer.weight
    layer.weight = weight


def _rename(model: nn.Module) -> None:
    model[3].kernel = model[3].weight
    del model[3].weight


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda model: setattr(model, "3", nn.Linear(8, 4).double()),
            "parameter 3.weight is float64 (3, 8) on cpu on rank 0, but float64 (4, 8) on cpu on rank 2",
        ),
        (
            lambda model: model[3].float(),
            "parameter 3.weight is float64 (3, 8) on cpu on rank 0, but float32 (3, 8) on cpu on rank 2",
        ),
        (
            lambda model: model[0].requires_grad_(False),
            "parameter 0.weight is float64 (8, 5) on cpu on rank 0, but float64 (8, 5) on cpu, frozen on rank 2",
        ),
        (_reorder, "rank 0 has parameter 3.weight where rank 2 has parameter 3.bias"),
        (_rename, "parameter 3.weight (float64 (3, 8) on cpu) exists on rank 0, but not on rank 2"),
        (
            lambda model: model.register_buffer("extra", torch.zeros(1)),
            "buffer extra (float32 (1,) on cpu) exists on rank 2, but not on rank 0",
        ),
    ],
)
def test_mismatch_is_named(change: Callable[[nn.Module], None], message: str) -> None:
    run(training_checks.check_mismatch_is_named, 3, change, re.escape(message))


def test_arguments_that_differ_are_named() -> None:
    def job(comm):
        DistributedDataParallel(models.mlp(), comm, bucket_cap_mb=1 + comm.rank)

    with pytest.raises(
        RuntimeError,
        match=r"\[rank ./2\] .*\(bucket_cap_mb, .*\) is \(1, True, False\) on rank 0, but \(2, True, False\) on rank 1",
    ):
        run_threads(job, 2)


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match=r"bucket_cap_mb must be > 0, got 0"):
        run_threads(lambda comm: DistributedDataParallel(models.mlp(), comm, bucket_cap_mb=0), 1)
    with pytest.raises(RuntimeError, match=r"no parameter requires a gradient"):
        run_threads(lambda comm: DistributedDataParallel(models.mlp().requires_grad_(False), comm), 1)


def test_a_failing_rank_ends_the_others() -> None:
    """A gradient that is missing on one rank only must not leave the other one waiting."""

    def job(comm):
        ddp = DistributedDataParallel(models.mlp(), comm, bucket_cap_mb=1e-5)
        output = ddp(torch.ones(2, 5))
        (ddp.module[2].bias.sum() if comm.rank else output.sum()).backward()

    with pytest.raises(
        RuntimeError, match=r"\[rank 1/2\] DistributedDataParallel: no gradient for 2.weight, 0.bias, 0.weight"
    ):
        run_threads(job, 2)


def test_buffers_follow_rank_0() -> None:
    def job(comm):
        ddp = training_checks.wrapped(CASES["batch_norm"], comm)
        training_checks.backward(ddp, 0)
        ddp.sync_buffers()
        training_checks.assert_replicas_identical(ddp, list(ddp.module.buffers()))
        alone = DistributedDataParallel(CASES["batch_norm"].model(), comm, broadcast_buffers=False)
        for step in range(2):
            training_checks.backward(alone, step)
        return alone.module[1].running_mean

    first, second = run_threads(job, 2)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("world_size", [1, 2])
def test_output_that_cannot_be_watched(world_size: int) -> None:
    """An object that is no nest of tensors: the first gradient of a parameter announces the backward pass."""

    class Wrapping(nn.Sequential):
        def forward(self, x):
            return partial(super().forward, x)

    def job(comm):
        ddp = DistributedDataParallel(models.seeded(Wrapping(*models.mlp()).double(), 0), comm)
        inputs, target = training_checks.batch(0, comm.rank)
        training_checks.loss_of(ddp(inputs)(), target).backward()
        training_checks.assert_replicas_identical(ddp, [parameter.grad for parameter in ddp.parameters()])

    run_threads(job, world_size)


class _Failing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, grad: torch.Tensor) -> torch.Tensor:
        raise ZeroDivisionError


@pytest.mark.parametrize("set_to_none", [False, True])
@pytest.mark.parametrize("find_unused", [False, True])
def test_no_gradient_of_a_pass_that_failed_is_left(find_unused: bool, set_to_none: bool) -> None:
    """Its buckets were on their way while the user zeroed the gradients."""

    def arriving_late(bucket: Bucket, comm: Communicator) -> Work:
        sent = bucket.flat.clone()
        return comm.all_reduce(sent, async_op=True).then(lambda: bucket.flat.copy_(sent))

    def job(comm: Communicator) -> None:
        model = CASES["mlp"].model()
        ddp = DistributedDataParallel(model, comm, 1e-4, find_unused_parameters=find_unused, hook=arriving_late)
        handle = ddp.module[1].register_forward_hook(lambda *args: _Failing.apply(args[-1]))
        with pytest.raises(ZeroDivisionError):
            training_checks.backward(ddp, 0)
        handle.remove()
        ddp.zero_grad(set_to_none)
        training_checks.backward(ddp, 1)
        training_checks.assert_gradients(ddp, [1])

    run_threads(job, 2, timeout_s=30)
