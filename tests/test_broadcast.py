"""Buffers that one rank gives to all: in which forwards, at which cost, and what a forward that is still open sees."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from backends.thread import run_threads
from minidist.communicator import Communicator
from minidist.ddp import DistributedDataParallel
from minidist.errors import CommError, MismatchError
from minidist.gradients.broadcast import Broadcast
from tests import models, training_checks
from tests.training_checks import CASES

DTYPES = (torch.uint8, torch.float64, torch.bfloat16, torch.complex128, torch.int16, torch.bool, torch.complex64)


def test_every_dtype_shape_and_layout_arrives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minidist.gradients.broadcast.MESSAGE_BYTES", 200)  # some messages

    def tensors(rank: int) -> list[Tensor]:
        flat = [(torch.arange(12) % 2 + rank).to(dtype) for dtype in DTYPES]
        return [*flat, flat[1].view(3, 4).t(), flat[2][::3], torch.empty(0), torch.tensor(float(rank))]

    def job(comm: Communicator) -> None:
        broadcast = Broadcast(comm, tensors(comm.rank))
        for src in range(comm.world_size):
            mine = tensors(comm.rank)
            broadcast.send(mine, src)
            assert all(torch.equal(got, sent) for got, sent in zip(mine, tensors(src), strict=True))

    run_threads(job, 3)


def test_tensors_of_other_shapes_are_a_mismatch() -> None:
    """Of the same size in bytes, too, which no transport can see."""

    def job(comm: Communicator) -> None:
        shape, dtype = ((2, 3), torch.float32) if comm.rank == 0 else ((6,), torch.int32)
        tensors = [torch.zeros(shape, dtype=dtype)]
        Broadcast(comm, tensors).send(tensors, 0)

    with pytest.raises(MismatchError, match=r"rank 0 sends tensors of other shapes or dtypes than here"):
        run_threads(job, 2, timeout_s=30)


class Counting(nn.Module):
    """Buffers that are replaced and resized while the model trains."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 3)
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.seen = torch.cat([self.seen, x.mean().detach().view(1)])
        return self.linear(x)


def test_a_buffer_may_be_replaced_by_another_on_all_ranks() -> None:
    def job(comm: Communicator) -> list[float]:
        ddp = DistributedDataParallel(Counting(), comm)
        for step in range(3):
            ddp(torch.full((2, 5), 10.0 * step + comm.rank)).sum().backward()
        ddp.sync_buffers()
        return ddp.module.seen.tolist()

    assert run_threads(job, 2) == [[0, 0, 10, 20]] * 2


def test_a_buffer_that_differs_between_ranks_is_an_error() -> None:
    def job(comm: Communicator) -> None:
        ddp = DistributedDataParallel(Counting(), comm)
        if comm.rank:
            ddp.module.seen = torch.zeros(2)
        ddp(torch.ones(2, 5))
        comm.barrier()

    with pytest.raises(CommError):
        run_threads(job, 2, timeout_s=30)


class Scaled(nn.Module):
    """A constant buffer that backward needs."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = models.batch_norm()
        self.register_buffer("scale", torch.full((3,), 2.0, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x) * self.scale


@pytest.mark.parametrize("build", [models.batch_norm, Scaled])
def test_two_forwards_before_one_backward(build: type[nn.Module]) -> None:
    """What a forward keeps for its backward is not spoilt by the buffers of the next one."""

    def gradients(wrapped: nn.Module, rank: int) -> list[Tensor]:
        losses = [training_checks.loss_of(wrapped(x), y) for x, y in (training_checks.batch(s, rank) for s in (0, 1))]
        sum(losses).backward()
        return [parameter.grad for parameter in wrapped.parameters()]

    alone = [gradients(models.seeded(build().double()), rank) for rank in range(3)]
    expected = [sum(each) / 3 for each in zip(*alone, strict=True)]

    def job(comm: Communicator) -> list[Tensor]:
        return gradients(DistributedDataParallel(models.seeded(build().double(), comm.rank), comm), comm.rank)

    for got in run_threads(job, 3, timeout_s=30):
        for gradient, value in zip(got, expected, strict=True):
            torch.testing.assert_close(gradient, value, rtol=0, atol=1e-12)


def test_many_small_buffers_are_one_message_and_planned_once() -> None:
    def job(comm: Communicator) -> None:
        model = nn.Sequential(nn.Linear(5, 3), *(nn.BatchNorm1d(3) for _ in range(200)))
        ddp = DistributedDataParallel(model, comm)
        ddp(torch.ones(2, 5))
        plan, before = ddp._shared_buffers._broadcast, comm.traffic.messages
        ddp(torch.ones(2, 5))
        assert ddp._shared_buffers._broadcast is plan
        assert comm.traffic.messages - before <= 1

    run_threads(job, 2)


def test_communication_in_the_thread_of_backward_where_another_one_gains_nothing() -> None:
    """The bitmap of used parameters follows ``comm.overlaps`` as the buckets do."""

    def job(comm: Communicator) -> None:
        comm.overlaps = False
        ddp = training_checks.wrapped(CASES["branches"], comm)
        training_checks.backward(ddp, 0)
        assert comm._progress._thread is None

    run_threads(job, 2)
