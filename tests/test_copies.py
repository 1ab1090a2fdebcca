"""Copies of a wrapped model: those that work, and the sentence for those that cannot."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from backends.thread import run_threads
from minidist.communicator import Communicator
from minidist.ddp import DistributedDataParallel
from minidist.gradients.hooks import BFloat16
from tests import training_checks
from tests.training_checks import CASES


def test_a_copy_trains_beside_the_original() -> None:
    def job(comm: Communicator) -> None:
        ddp = training_checks.wrapped(CASES["batch_norm"], comm, bucket_cap_mb=1e-4, hook=BFloat16())
        training_checks.backward(ddp, 0)
        copied = copy.deepcopy(ddp.eval())
        assert (copied.training, copied.bucket_cap_mb, copied.comm) == (False, 1e-4, comm)
        assert copied.hook is not ddp.hook
        assert all(p.grad is None for p in copied.parameters())
        for both in (ddp.train(), copied.train()):
            both.zero_grad()
            training_checks.backward(both, 1)
            training_checks.assert_replicas_identical(both, [p.grad for p in both.parameters()])
        for mine, other in zip(ddp.parameters(), copied.parameters(), strict=True):
            assert mine is not other
            assert torch.equal(mine.grad, other.grad)
            assert mine.grad.data_ptr() != other.grad.data_ptr()

    run_threads(job, 2, timeout_s=30)


def test_one_rank_alone_may_copy() -> None:
    """Averages are often kept on rank 0 only."""

    def job(comm: Communicator) -> None:
        ddp = training_checks.wrapped(CASES["mlp"], comm)
        if comm.rank == 0:
            copy.deepcopy(ddp)
        training_checks.backward(ddp, 0)

    run_threads(job, 2, timeout_s=30)


def test_averaged_model() -> None:
    def job(comm: Communicator) -> None:
        ddp = training_checks.wrapped(CASES["mlp"], comm)
        average = AveragedModel(ddp, multi_avg_fn=get_ema_multi_avg_fn(0.5))
        optimizer, expected = training_checks.sgd(ddp), None
        for step in range(3):
            training_checks.train(ddp, optimizer, step)
            average.update_parameters(ddp)
            now = [p.detach().clone() for p in ddp.parameters()]
            expected = now if expected is None else [(a + b) / 2 for a, b in zip(expected, now, strict=True)]
        for got, value in zip(average.parameters(), expected, strict=True):
            torch.testing.assert_close(got, value)
        inputs, _ = training_checks.batch(0, 0)
        with torch.no_grad():
            assert torch.equal(average(inputs), average.module.module(inputs))

    run_threads(job, 2, timeout_s=30)


def test_what_cannot_be_copied_says_what_to_copy() -> None:
    def job(comm: Communicator) -> None:
        ddp = training_checks.wrapped(CASES["mlp"], comm)
        for attempt in (lambda: torch.save(ddp, io.BytesIO()), lambda: pickle.dumps(ddp), lambda: copy.copy(ddp)):
            with pytest.raises(TypeError, match=r"DistributedDataParallel: cannot be pickled.*ddp.module"):
                attempt()
        with pytest.raises(TypeError, match=rf"\[rank {comm.rank}/2\] pickle: a communicator belongs to its process"):
            pickle.dumps(comm)
        restored = torch.load(_saved(ddp.module), weights_only=False)
        assert all(torch.equal(p, q) for p, q in zip(restored.parameters(), ddp.parameters(), strict=True))
        assert copy.deepcopy({"comm": comm})["comm"] is comm

    run_threads(job, 2, timeout_s=30)


def _saved(module: torch.nn.Module) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return file


def test_a_copy_of_a_wrapper_is_a_wrapper_of_its_own_kind() -> None:
    class Named(DistributedDataParallel):
        def __init__(self, *args: object) -> None:
            super().__init__(*args)
            self.notes = ["a"]

    def job(comm: Communicator) -> None:
        ddp = Named(CASES["mlp"].model(), comm)
        copied = copy.deepcopy(ddp)
        copied.notes.append("b")
        assert (type(copied), ddp.notes) == (Named, ["a"])

    run_threads(job, 1)
