"""What happens to a full bucket."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from backends.thread import run_threads
from minidist.communicator import Communicator, Work
from minidist.ddp import DistributedDataParallel
from minidist.gradients.buckets import Bucket
from minidist.gradients.hooks import BFloat16, CastHook, Float16
from tests import models, training_checks


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize(
    ("make_hook", "dtype"),
    [(BFloat16, torch.bfloat16), (Float16, torch.float16), (lambda: CastHook(torch.float32), torch.float32)],
)
def test_cast(make_hook: Callable[[], CastHook], dtype: torch.dtype, world_size: int) -> None:
    run_threads(lambda comm: training_checks.check_hook_result(comm, make_hook, dtype), world_size)


def test_cast_sends_fewer_bytes() -> None:
    def bytes_of_a_step(hook: CastHook, comm: Communicator) -> int:
        ddp = DistributedDataParallel(models.seeded(models.mlp().double()), comm, hook=hook)
        before = comm.traffic.bytes
        training_checks.backward(ddp, 0)
        return comm.traffic.bytes - before

    hooks = [CastHook(torch.float64), CastHook(torch.float32), BFloat16()]  # shared by the ranks, which they may be
    double, single, half = run_threads(lambda comm: [bytes_of_a_step(hook, comm) for hook in hooks], 2)[0]
    assert (double, single) == (4 * half, 2 * half)


def test_cast_never_widens() -> None:
    def job(comm):
        ddp = DistributedDataParallel(models.seeded(models.mlp().bfloat16()), comm, hook=Float16())
        ddp(torch.ones(2, 5, dtype=torch.bfloat16)).sum().backward()
        training_checks.assert_replicas_identical(ddp, [parameter.grad for parameter in ddp.parameters()])

    run_threads(job, 2)


def test_cast_needs_a_floating_point_dtype() -> None:
    with pytest.raises(TypeError, match=r"dtype must be floating point, got torch.int32"):
        CastHook(torch.int32)


class ErrorFeedback:
    """Send the gradients rounded to multiples of 1/8, and what that leaves behind with the next ones."""

    def __init__(self) -> None:
        self.errors: dict[int, torch.Tensor] = {}

    def __call__(self, bucket: Bucket, comm: Communicator) -> Work:
        wanted = bucket.flat + self.errors.get(bucket.index, 0)
        bucket.flat.copy_((wanted * 8).round() / 8)
        self.errors[bucket.index] = wanted - bucket.flat
        return comm.all_reduce(bucket.flat, async_op=True)


def test_hook_with_state() -> None:
    """The interface is fit for compression: over many steps nothing of the gradients is lost."""

    def job(comm):
        ddp = DistributedDataParallel(
            models.seeded(models.mlp().double()), comm, hook=ErrorFeedback(), bucket_cap_mb=1e-4
        )
        total = [torch.zeros_like(parameter) for parameter in ddp.parameters()]
        for _ in range(50):
            ddp.zero_grad()
            training_checks.backward(ddp, 0)
            total = [so_far + parameter.grad for so_far, parameter in zip(total, ddp.parameters(), strict=True)]
        expected = training_checks.mean_gradients(ddp.module, [0], comm.world_size)
        for so_far, gradient in zip(total, expected, strict=True):
            torch.testing.assert_close(so_far / 50, gradient, rtol=0, atol=comm.world_size / 16 / 50 + 1e-12)

    run_threads(job, 2)


def test_error_of_a_hook_reaches_the_caller() -> None:
    def hook(bucket: Bucket, comm: Communicator) -> Work:
        raise ArithmeticError("in the hook")

    def job(comm):
        ddp = DistributedDataParallel(models.mlp(), comm, hook=hook)
        with pytest.raises(ArithmeticError, match="in the hook"):
            ddp(torch.ones(1, 5)).sum().backward()

    run_threads(job, 2)
