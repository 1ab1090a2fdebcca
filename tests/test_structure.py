"""A model that is changed after it was wrapped: refused by name, before its replicas drift apart."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

from backends.thread import run_threads
from minidist.communicator import Communicator
from minidist.ddp import DistributedDataParallel
from tests import models


class _Doubled(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 2 * weight


class _Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return self.scale * weight


class _Model(nn.Sequential):
    """A small network with a frozen layer beside it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for name, layer in self.named_children():
            x = x if name == "frozen" else layer(x)
        return x


def _model() -> nn.Module:
    model = models.seeded(_Model(*models.mlp()), 0)
    model.frozen = nn.Linear(2, 2).requires_grad_(False)
    return model


def _assign(model: nn.Module) -> None:
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)


CHANGES: dict[str, tuple[Callable[[nn.Module], object], str]] = {
    "assigned": (_assign, r"parameter 0.weight was added or replaced after it was wrapped"),
    "replaced": (lambda m: setattr(m, "2", nn.Linear(8, 3)), r"parameter 2.weight was added or replaced"),
    "added": (lambda m: m.append(nn.Linear(3, 3)), r"parameter 4.weight was added or replaced"),
    "removed": (lambda m: delattr(m, "2"), r"parameter 2.weight was removed"),
    "unfrozen": (lambda m: m.frozen.bias.requires_grad_(), r"parameter frozen.bias was frozen when it was wrapped"),
    "frozen": (lambda m: m[0].bias.requires_grad_(False), r"parameter 0.bias was frozen after it was wrapped"),
    "parametrized": (
        lambda m: parametrize.register_parametrization(m[0], "weight", _Scaled()),
        r"parameter 0.parametrizations.weight.0.scale was added",
    ),
    "weight norm": (lambda m: nn.utils.parametrizations.weight_norm(m[0]), r"was (added or replaced|removed)"),
    "dtype": (lambda m: m[2].double(), r"parameter 2.* is float64 .* now and was float32"),
    "bfloat16": (lambda m: m.bfloat16(), r"is bfloat16 .* now and was float32"),
    "shape": (lambda m: setattr(m[2].bias, "data", torch.zeros(1)), r"parameter 2.bias is float32 \(1,\)"),
    "layout": (
        lambda m: setattr(m[0].weight, "data", m[0].weight.data.t().contiguous().t()),
        r"parameter 0.weight is float32 \(8, 5\) on cpu with strides \(1, 8\) now",
    ),
    "device": (lambda m: setattr(m[0], "weight", nn.Parameter(m[0].weight.to("meta"))), r"parameter 0.weight was"),
}


@pytest.mark.parametrize(
    ("name", "find_unused"),
    [(name, False) for name in CHANGES] + [(name, True) for name in CHANGES if name != "frozen"],
)
def test_a_change_is_named(name: str, find_unused: bool) -> None:
    change, message = CHANGES[name]

    def job(comm: Communicator) -> None:
        ddp = DistributedDataParallel(_model(), comm, find_unused_parameters=find_unused)
        ddp(torch.ones(2, 5))
        change(ddp.module)
        with pytest.raises(RuntimeError, match=rf"\[rank ./2\] .*{message}.*wrap the module again"):
            ddp(torch.ones(2, 5))

    run_threads(job, 2, timeout_s=30)


def test_another_module_is_named() -> None:
    def job(comm: Communicator) -> None:
        ddp = DistributedDataParallel(_model(), comm)
        ddp.module = copy.deepcopy(ddp.module)
        with pytest.raises(RuntimeError, match=r"wrap the module again"):
            ddp(torch.ones(2, 5))

    run_threads(job, 2)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.append(nn.Tanh()),
        lambda m: prune.ln_structured(m[0], "weight", 0.5, n=2, dim=0),
        lambda m: parametrize.register_parametrization(m[2], "bias", _Doubled()),
    ],
)
def test_other_modules_around_the_same_parameters_are_followed(change: Callable[[nn.Module], object]) -> None:
    def job(comm: Communicator) -> None:
        ddp = DistributedDataParallel(_model(), comm)
        change(ddp.module)
        for _ in range(2):
            ddp(torch.full((2, 5), comm.rank + 1.0)).sum().backward()
        gathered = comm.all_gather_object([p.grad.tolist() for p in ddp.parameters() if p.requires_grad])
        assert gathered[0] == gathered[1]

    run_threads(job, 2)


def test_parameters_may_be_frozen_where_they_may_be_unused() -> None:
    def job(comm: Communicator) -> None:
        ddp = DistributedDataParallel(_model(), comm, find_unused_parameters=True)
        ddp.module[0].requires_grad_(False)
        ddp(torch.full((2, 5), comm.rank + 1.0)).sum().backward()
        assert ddp.module[0].weight.grad is None
        gathered = comm.all_gather_object(ddp.module[2].weight.grad.tolist())
        assert gathered[0] == gathered[1]

    run_threads(job, 2)


def test_the_whole_model_may_be_frozen_for_a_while() -> None:
    """The discriminator while its generator learns: no gradients, nothing to communicate, and no complaint."""

    def job(comm: Communicator) -> None:
        ddp = DistributedDataParallel(_model(), comm)
        trained = [parameter for parameter in ddp.parameters() if parameter.requires_grad]
        for parameter in trained:
            parameter.requires_grad_(False)
        inputs = torch.ones(2, 5, requires_grad=True)
        before = comm.traffic.messages
        ddp(inputs).sum().backward()
        assert inputs.grad is not None
        assert comm.traffic.messages == before
        for parameter in trained:
            parameter.requires_grad_()
        ddp(torch.full((2, 5), float(comm.rank))).sum().backward()
        gathered = comm.all_gather_object(ddp.module[0].weight.grad.tolist())
        assert gathered[0] == gathered[1]

    run_threads(job, 2)


def test_wrapped_again_the_first_wrapper_is_refused() -> None:
    """Both would reduce the same gradients."""

    def job(comm: Communicator) -> list[float]:
        first = DistributedDataParallel(_model(), comm)
        second = DistributedDataParallel(first.module, comm)
        with pytest.raises(RuntimeError, match=r"sends its gradient to a wrapper that was made after this one"):
            first(torch.ones(2, 5))
        second(torch.full((2, 5), comm.rank + 1.0)).sum().backward()
        return second.module[2].bias.grad.tolist()

    assert run_threads(job, 2) == [[2.0] * 3] * 2


def test_wrapped_again_after_a_change_it_trains() -> None:
    def job(comm: Communicator) -> None:
        ddp = DistributedDataParallel(_model(), comm)
        ddp.module[0].weight.requires_grad_(False)
        ddp.module[2] = nn.Linear(8, 2)
        ddp = DistributedDataParallel(ddp.module, comm)
        ddp(torch.full((2, 5), comm.rank + 1.0)).sum().backward()
        gathered = comm.all_gather_object([p.grad.tolist() for p in ddp.parameters() if p.requires_grad])
        assert gathered[0] == gathered[1]

    run_threads(job, 2)
