"""What cannot be trained data-parallel is refused by name, on every rank, before anything is sent."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from backends.serial import SerialCommunicator
from backends.thread import run_threads
from minidist.communicator import Communicator
from minidist.ddp import DistributedDataParallel
from minidist.errors import MismatchError
from minidist.gradients.replicas import describe
from tests import models


def _with_buffer(buffer: torch.Tensor) -> nn.Module:
    model = models.mlp()
    model.register_buffer("extra", buffer)
    return model


@torch.inference_mode()
def _made_in_inference() -> torch.Tensor:
    return torch.zeros(3)


def _freed() -> nn.Module:
    model = models.mlp()
    model[0].weight.untyped_storage().resize_(0)
    return model


def _overlapping_windows() -> torch.Tensor:
    return torch.zeros(5).as_strided((3, 3), (1, 1))


def _own_process_group() -> nn.Module:
    model = models.mlp()
    model[1].process_group = None
    return model


REFUSED = {
    "expanded buffer": (lambda: _with_buffer(torch.zeros(1).expand(4)), r"buffer extra has elements that share memory"),
    "overlapping buffer": (
        lambda: _with_buffer(_overlapping_windows()),
        r"buffer extra has elements that share memory",
    ),
    "expanded parameter": (
        lambda: nn.ParameterList([nn.Parameter(torch.zeros(1).expand(4))]),
        r"parameter 0 has elements that share memory.*\.clone\(\)",
    ),
    "lazy parameter": (lambda: nn.Sequential(nn.LazyLinear(3)), r"parameter 0.weight is lazy .*run one batch"),
    "lazy buffer": (lambda: nn.Sequential(nn.LazyBatchNorm1d(affine=False)), r"buffer 0.running_mean is lazy"),
    "meta parameter": (lambda: nn.Linear(2, 2, device="meta"), r"parameter weight is on the meta device"),
    "freed parameter": (_freed, r"parameter 0.weight has no memory"),
    "inference buffer": (
        lambda: _with_buffer(_made_in_inference()),
        r"buffer extra was made in inference mode.*\.clone\(\)",
    ),
    "sparse buffer": (lambda: _with_buffer(torch.zeros(3).to_sparse()), r"buffer extra is not dense"),
    "dtype": (lambda: nn.Linear(2, 2).to(torch.float8_e5m2), r"parameter weight has dtype torch.float8_e5m2"),
    "torch's SyncBatchNorm": (
        lambda: nn.SyncBatchNorm.convert_sync_batchnorm(models.batch_norm()),
        r"module 1 is a SyncBatchNorm, .*minidist.sync_batch_norm.convert_sync_batchnorm\(module, comm\)",
    ),
    "a wrapper": (
        lambda: nn.Sequential(DistributedDataParallel(models.mlp(), SerialCommunicator())),
        r"module 0 is a DistributedDataParallel, which reduces gradients itself; wrap its \.module",
    ),
    "rows that are shortened where they are looked up": (
        lambda: nn.Sequential(nn.Embedding(3, 2, max_norm=1.0), nn.EmbeddingBag(3, 2)),
        r"module 0 is a Embedding, whose max_norm shortens .* max_norm=None",
    ),
    "a process group of torch's": (
        _own_process_group,
        r"module 1 is a Tanh, which asks torch's process group, and there is none",
    ),
}


@pytest.mark.parametrize("ranks", ["all", "last"])
@pytest.mark.parametrize("name", REFUSED)
def test_refused_on_every_rank(name: str, ranks: str) -> None:
    make, message = REFUSED[name]

    def job(comm: Communicator) -> None:
        model = make() if ranks == "all" or comm.rank == 2 else models.mlp()
        before = comm.traffic.messages
        with pytest.raises(ValueError, match=message) as caught:
            DistributedDataParallel(model, comm)
        where = "" if ranks == "all" or comm.rank == 2 else "on rank 2, "
        assert str(caught.value).startswith(f"[rank {comm.rank}/3] DistributedDataParallel: {where}")
        told = comm.traffic.messages - before
        comm.all_gather_object("nothing but the refusal was sent")
        assert comm.traffic.messages - before == 2 * told

    run_threads(job, 3, timeout_s=30)


@pytest.mark.parametrize("cap", [0, -1, float("nan"), float("inf")])
def test_a_bad_cap_on_one_rank_is_refused_on_all(cap: float) -> None:
    def job(comm: Communicator) -> None:
        with pytest.raises(ValueError, match=r"bucket_cap_mb must be > 0"):
            DistributedDataParallel(models.mlp(), comm, bucket_cap_mb=cap if comm.rank else 25)

    run_threads(job, 2, timeout_s=30)


def test_frozen_parameters_and_buffers_may_have_any_dtype() -> None:
    def job(comm: Communicator) -> torch.Tensor:
        model = _with_buffer(torch.full((3,), comm.rank, dtype=torch.int16))
        model.frozen = nn.Parameter(torch.full((2,), comm.rank, dtype=torch.int8), requires_grad=False)
        ddp = DistributedDataParallel(model, comm)
        return torch.cat([ddp.module.extra, ddp.module.frozen])

    assert [values.tolist() for values in run_threads(job, 2)] == [[0] * 5] * 2


def test_what_is_laid_out_in_an_unusual_way_may_be_wrapped() -> None:
    """Interleaved, but no element in the place of another; and rows that are shortened but never learn."""

    def job(comm: Communicator) -> None:
        model = _with_buffer(torch.zeros(8).as_strided((2, 3), (3, 2)))
        model.append(nn.Embedding(3, 2, max_norm=1.0).requires_grad_(False))
        DistributedDataParallel(model, comm)

    run_threads(job, 2, timeout_s=30)


def _conv(dense: bool) -> nn.Module:
    model = nn.Conv2d(3, 4, 3)
    return model.to(memory_format=torch.channels_last) if dense else model


def _transposed(is_transposed: bool) -> nn.Module:
    weight = torch.zeros(3, 4).t() if is_transposed else torch.zeros(4, 3)
    return nn.ParameterList([nn.Parameter(weight)])


@pytest.mark.parametrize("make", [_conv, _transposed])
def test_layouts_that_differ_are_named(make: Callable[[bool], nn.Module]) -> None:
    def job(comm: Communicator) -> None:
        with pytest.raises(MismatchError, match=r"parameter .* with strides \(.*\) on cpu on rank 1"):
            DistributedDataParallel(make(comm.rank == 1), comm)
        comm.barrier()

    run_threads(job, 2, timeout_s=30)


def test_layouts_that_do_not_matter_are_not_compared() -> None:
    """A dimension of size 1 may have any stride, and what has gaps is laid out without them."""

    def job(comm: Communicator) -> list[list[float]]:
        weight = torch.zeros(2, 1, 1, 1).as_strided((2, 1, 1, 1), (1, 2 + comm.rank, 1, 1))
        gaps = torch.zeros(3, 8)[:, :4] if comm.rank else torch.zeros(3, 4)
        ddp = DistributedDataParallel(nn.ParameterList([nn.Parameter(weight), nn.Parameter(gaps)]), comm)
        sum(((comm.rank + 1.0) * parameter).sum() for parameter in ddp.parameters()).backward()
        return [p.grad.flatten().tolist() for p in ddp.parameters()]

    assert run_threads(job, 2) == [[[1.5] * 2, [1.5] * 12]] * 2


def test_the_share_of_each_device_is_described() -> None:
    """Ranks that spread one model over their devices in different ways have different buckets."""
    both = nn.ModuleList([nn.Linear(1, 1), nn.Linear(1, 1, device="meta")])
    other = nn.ModuleList([nn.Linear(1, 1, device="meta"), nn.Linear(1, 1)])
    one = nn.ModuleList([nn.Linear(1, 1), nn.Linear(1, 1)])
    assert dict(describe(both))["parameter 1.bias"] == "float32 (1,) on meta number 1"
    assert dict(describe(other))["parameter 1.bias"] == "float32 (1,) on cpu number 1"
    assert dict(describe(one))["parameter 1.bias"] == "float32 (1,) on cpu"
