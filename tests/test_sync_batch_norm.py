"""Batch normalisation over all ranks: as one process on the joined batch."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from backends.thread import run_threads
from minidist.communicator import Communicator
from minidist.ddp import DistributedDataParallel
from minidist.sync_batch_norm import SyncBatchNorm, convert_sync_batchnorm
from tests import models

SHAPES = {1: (5,), 2: (5, 3, 4), 3: (5, 2, 3, 2)}
LAYERS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


def _share(rank: int, dims: int, sizes: tuple[int, ...], shift: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(sizes[rank], *SHAPES[dims], generator=generator, dtype=torch.float64) * (rank + 1) + shift + rank


def _run(layer: nn.Module, inputs: Tensor, weights: Tensor) -> dict[str, Any]:
    inputs = inputs.clone().requires_grad_()
    output = layer(inputs)
    (output * weights).sum().backward()
    state = {name: value.clone() for name, value in layer.state_dict().items()}
    grads = {f"{name}.grad": p.grad for name, p in layer.named_parameters()}
    return {"output": output.detach(), "input.grad": inputs.grad, **state, **grads}


@pytest.mark.parametrize("sizes", [(3,), (3, 3, 3), (1, 4, 2), (0, 3, 2)])
@pytest.mark.parametrize(
    "options", [{}, {"momentum": None}, {"affine": False}, {"track_running_stats": False}], ids=str
)
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_equals_one_process(dims: int, options: dict[str, Any], sizes: tuple[int, ...]) -> None:
    plain = models.seeded(LAYERS[dims](5, **options).double())
    everything = [_share(rank, dims, sizes) for rank in range(len(sizes))]
    expected = _run(copy.deepcopy(plain), torch.cat(everything), torch.cat([each.sin() for each in everything]))

    def job(comm: Communicator) -> dict[str, Any]:
        layer = convert_sync_batchnorm(copy.deepcopy(plain), comm)
        return _run(layer, everything[comm.rank], everything[comm.rank].sin())

    by_rank = run_threads(job, len(sizes), timeout_s=30)
    for name, value in expected.items():
        if name in ("output", "input.grad"):
            got = torch.cat([each[name] for each in by_rank])
        elif name.endswith(".grad"):
            got = sum(each[name] for each in by_rank)
        else:
            got = by_rank[0][name]
            assert all(torch.equal(each[name], got) for each in by_rank)
        torch.testing.assert_close(got, value, rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


def test_a_large_mean_does_not_cancel() -> None:
    """In float32 the difference of two sums of squares would be noise."""
    everything = [_share(rank, 1, (8, 8), shift=1e4).float() for rank in range(2)]
    expected = nn.BatchNorm1d(5)(torch.cat(everything))
    by_rank = run_threads(lambda comm: SyncBatchNorm(5, comm=comm)(everything[comm.rank]).detach(), 2)
    torch.testing.assert_close(torch.cat(by_rank), expected, rtol=1e-2, atol=1e-2)


def _batch(step: int, rank: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 * step + rank)
    return tuple(torch.randn(4, n, generator=generator, dtype=torch.float64) for n in (models.NUM_INPUTS, 3))


def test_training_equals_one_process_on_the_joined_batch() -> None:
    model = models.seeded(models.batch_norm().double())

    def train(module: nn.Module, wrapper: nn.Module, ranks: list[int]) -> dict[str, Tensor]:
        optimizer = torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9)
        for step in range(10):
            inputs, targets = (torch.cat(part) for part in zip(*(_batch(step, r) for r in ranks), strict=True))
            optimizer.zero_grad()
            nn.functional.mse_loss(wrapper(inputs), targets).backward()
            optimizer.step()
        module.eval()
        return {**module.state_dict(), "evaluation": module(_batch(99, 0)[0]).detach()}

    def job(comm: Communicator) -> dict[str, Tensor]:
        own = convert_sync_batchnorm(copy.deepcopy(model), comm)
        return train(own, DistributedDataParallel(own, comm), [comm.rank])

    expected = train(one := copy.deepcopy(model), one, [0, 1, 2])
    for got in run_threads(job, 3, timeout_s=60):
        for name, value in expected.items():
            torch.testing.assert_close(got[name], value, rtol=0, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


def test_evaluation_sends_nothing() -> None:
    def job(comm: Communicator) -> None:
        layer = SyncBatchNorm(5, comm=comm).eval()
        before = comm.traffic.messages
        assert torch.equal(layer(torch.ones(2, 5)), nn.BatchNorm1d(5).eval()(torch.ones(2, 5)))
        assert comm.traffic.messages == before

    run_threads(job, 2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_inputs_are_normalised_in_float32(dtype: torch.dtype) -> None:
    def job(comm: Communicator) -> None:
        layer = SyncBatchNorm(5, comm=comm)
        inputs = _share(comm.rank, 1, (8, 8)).to(dtype).requires_grad_()
        output = layer(inputs)
        output.sum().backward()
        assert output.dtype == inputs.grad.dtype == dtype
        assert layer.running_mean.dtype == layer.weight.grad.dtype == torch.float32

    run_threads(job, 2)


def test_convert_keeps_what_a_layer_has() -> None:
    def job(comm: Communicator) -> None:
        norm = nn.BatchNorm1d(4, eps=0.1, momentum=0.3)
        norm.weight.requires_grad_(False)
        seen: list[nn.Module] = []
        handle = norm.register_forward_hook(lambda *args: seen.append(args[0]))
        norm.compile(backend="eager")
        model = nn.ModuleDict({"a": norm, "b": nn.ModuleList([norm, nn.BatchNorm2d(3).eval()])})
        own = nn.Sequential(nn.SyncBatchNorm(2))
        converted = convert_sync_batchnorm(model, comm)
        assert converted is model
        assert isinstance(model["a"], SyncBatchNorm)
        assert model["b"][0] is model["a"]  # one layer in two places stays one
        assert (model["a"].eps, model["a"].momentum, model["a"].weight is norm.weight) == (0.1, 0.3, True)
        assert not model["b"][1].training
        model["a"](torch.ones(2, 4))
        handle.remove()
        model["a"](torch.ones(2, 4))
        assert seen == [model["a"]]
        DistributedDataParallel(convert_sync_batchnorm(own, comm), comm)
        assert convert_sync_batchnorm(copy.deepcopy(model), comm)["a"].comm is comm

    run_threads(job, 1)


class _Activated(nn.BatchNorm1d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).relu()


def _parametrized() -> nn.Module:
    norm = nn.BatchNorm1d(3)
    return nn.utils.parametrize.register_parametrization(norm, "weight", nn.Softplus())


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (_Activated(3), r"_Activated has a forward or modules of its own"),
        (_parametrized(), r"ParametrizedBatchNorm1d has a forward or modules of its own"),
        (nn.LazyBatchNorm1d(), r"LazyBatchNorm1d is lazy"),
    ],
)
def test_convert_refuses_what_it_would_break(layer: nn.Module, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run_threads(lambda comm: convert_sync_batchnorm(nn.Sequential(layer), comm), 1)


def test_too_few_values_and_uneven_batches_are_refused() -> None:
    def job(comm: Communicator) -> None:
        layer = SyncBatchNorm(5, comm=comm)
        with pytest.raises(ValueError, match=r"expected more than 1 value per channel when training, got 1"):
            layer(torch.ones(1 - comm.rank, 5))
        ddp = DistributedDataParallel(nn.Sequential(layer), comm)
        with pytest.raises(ValueError, match=r"join: SyncBatchNorm needs every rank in every forward"), ddp.join():
            pass

    run_threads(job, 2)
