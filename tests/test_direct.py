"""Gradients that are computed in their buckets: the same bits as those that are copied there, where they may be."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn, optim
from torch.nn.utils import parametrizations

from backends.thread import run_threads
from minidist import ShardedOptimizer
from minidist.communicator import Communicator
from minidist.ddp import DistributedDataParallel
from tests import models, training_checks
from tests.sharded_checks import assert_same
from tests.training_checks import CASES, Case


class Embedded(nn.Module):
    """Words, some of them twice and some padding; the output layer has the embedding's weight."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.words = nn.Embedding(11, 6, padding_idx=3)
        self.layer = nn.Linear(6, 6)
        self.act = nn.ReLU(inplace=True)
        self.head = nn.Linear(6, 11, bias=False)
        if tied:
            self.head.weight = self.words.weight

    def forward(self, x: Tensor) -> Tensor:
        words = (x * 7).long().abs() % 11
        return self.head(self.act(self.layer(self.words(words)))).mean(dim=1)[..., : models.NUM_OUTPUTS]


class TwiceTheSame(nn.Module):
    """A layer that is used two times, with a branch that leads around it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(torch.tanh(self.layer(x))) + x)


class Scaled(nn.Linear):
    """A linear layer with a forward of its own."""

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input, 2 * self.weight, self.bias)


def hooked() -> nn.Module:
    model = models.mlp()
    model[0].weight.register_hook(lambda grad: grad * 0.5)
    return model


def parametrized() -> nn.Module:
    model = models.mlp()
    parametrizations.weight_norm(model[0])
    return model


def with_a_sequence() -> nn.Module:
    return nn.Sequential(nn.Unflatten(1, (5, 1)), nn.Linear(1, 4), nn.Tanh(), nn.Flatten(), nn.Linear(20, 3))


MORE = {
    "embedding": Case(Embedded),
    "tied_embedding": Case(lambda: Embedded(tied=True)),
    "twice": Case(TwiceTheSame),
    "own_forward": Case(lambda: nn.Sequential(Scaled(5, 4), nn.Linear(4, 3))),
    "hooked": Case(hooked),
    "parametrized": Case(parametrized),
    "sequence": Case(with_a_sequence),
}
ALL = CASES | MORE


def pair(case: Case, comm: Communicator) -> list[DistributedDataParallel]:
    """Return the same replica twice, with gradients that are copied and that are computed in place."""
    return [training_checks.wrapped(case, comm, bucket_cap_mb=2e-4, direct_gradients=on) for on in (False, True)]


def in_place(ddp: DistributedDataParallel) -> list[str]:
    """Return the parameters whose gradient lies in its bucket."""
    places = [zip(bucket.names, bucket.parameters, bucket.views, strict=True) for bucket in ddp.buckets]
    rows = itertools.chain.from_iterable(places)
    return sorted(name for name, p, view in rows if p.grad is not None and p.grad.data_ptr() == view.data_ptr())


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("name", ALL)
def test_not_a_bit_differs(name: str, world_size: int) -> None:
    """With accumulation, and with an optimizer in shares."""

    def job(comm: Communicator) -> None:
        copied, direct = pair(ALL[name], comm)
        optimizers = [
            optim.AdamW(copied.parameters(), lr=0.1),
            ShardedOptimizer(direct.parameters(), optim.AdamW, comm, lr=0.1, foreach=True),
        ]
        for step in range(4):
            for ddp, optimizer in zip((copied, direct), optimizers, strict=True):
                training_checks.train(ddp, optimizer, step, num_micro=1 + step % 2)
            assert_same(list(copied.parameters()), list(direct.parameters()))

    run_threads(job, world_size, timeout_s=60)


def local_gradients(ddp: DistributedDataParallel, times: int = 1, step: int = 0) -> None:
    """Compute gradients that stay where autograd puts them: the wrapper does not communicate."""
    with ddp.no_sync():
        for _ in range(times):
            training_checks.backward(ddp, step)


def gradients_in_buckets(ddp: DistributedDataParallel) -> list[Tensor]:
    """Compute such gradients, and return a copy of each bucket: with zeros where autograd did not write."""
    for bucket in ddp.buckets:
        bucket.flat.zero_()
    local_gradients(ddp)
    return [bucket.flat.clone() for bucket in ddp.buckets]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mlp", ["0.weight", "2.weight"]),
        ("embedding", ["head.weight", "layer.weight", "words.weight"]),
        ("tied_embedding", ["layer.weight"]),
        ("twice", ["head.weight"]),
        ("own_forward", ["1.weight"]),
        ("hooked", ["2.weight"]),
        ("parametrized", ["2.weight"]),
        ("checkpoint", [f"{name}.weight" for name in ("blocks.0.0", "blocks.1.0", "blocks.2.0", "first", "head")]),
        ("frozen", ["2.weight"]),
    ],
)
def test_computed_in_place_where_nothing_stands_against_it(name: str, expected: list[str]) -> None:
    def job(comm: Communicator) -> None:
        copied, direct = pair(ALL[name], comm)
        for ddp in (copied, direct):
            local_gradients(ddp)
        assert in_place(copied) == []
        assert in_place(direct) == expected
        for ddp in (copied, direct):
            local_gradients(ddp)
        assert in_place(direct) == expected, "what is added is added in place"
        for one, other in zip(copied.parameters(), direct.parameters(), strict=True):
            assert (one.grad is None) == (other.grad is None)
            assert one.grad is None or torch.equal(one.grad, other.grad)

    run_threads(job, 1)


def a_gradient_that_is_asked_for(ddp: DistributedDataParallel) -> list[Tensor]:
    inputs, target = training_checks.batch(0, 0)
    return list(torch.autograd.grad(training_checks.loss_of(ddp(inputs), target), list(ddp.parameters())))


def a_gradient_of_some(ddp: DistributedDataParallel) -> list[Tensor]:
    inputs, target = training_checks.batch(0, 0)
    with ddp.no_sync():
        training_checks.loss_of(ddp(inputs), target).backward(inputs=[ddp.module[2].bias])
    return [ddp.module[2].bias.grad]


def a_gradient_of_gradients(ddp: DistributedDataParallel) -> list[Tensor]:
    """As a gradient penalty has it."""
    inputs, target = training_checks.batch(0, 0)
    inputs.requires_grad_()
    output = ddp(inputs)
    (grad,) = torch.autograd.grad(output.sum(), inputs, create_graph=True)
    (training_checks.loss_of(output, target) + grad.square().sum()).backward()
    return [parameter.grad for parameter in ddp.parameters()]


def gradients_in_bfloat16(ddp: DistributedDataParallel) -> list[Tensor]:
    inputs, _ = training_checks.batch(0, 0)
    ddp.module.float()
    with torch.autocast("cpu", torch.bfloat16), ddp.no_sync():
        output = ddp(inputs.float())
    assert output.dtype == torch.bfloat16
    output.float().sum().backward()
    return [parameter.grad for parameter in ddp.parameters()]


@pytest.mark.parametrize(
    "ask", [a_gradient_that_is_asked_for, a_gradient_of_some, a_gradient_of_gradients, gradients_in_bfloat16]
)
def test_other_uses_of_autograd(ask: Callable[[DistributedDataParallel], list[Tensor]]) -> None:
    """They give what they give without."""

    def job(comm: Communicator) -> None:
        copied, direct = pair(CASES["mlp"], comm)
        assert_same(ask(direct), ask(copied))

    run_threads(job, 1)


def test_a_gradient_that_is_asked_for_leaves_those_in_the_buckets_alone() -> None:
    def job(comm: Communicator) -> None:
        ddp = training_checks.wrapped(CASES["mlp"], comm, direct_gradients=True)
        before = gradients_in_buckets(ddp)
        a_gradient_that_is_asked_for(ddp)
        ddp.zero_grad()
        a_gradient_that_is_asked_for(ddp)
        assert_same([bucket.flat for bucket in ddp.buckets], before)

    run_threads(job, 1)


def test_the_layers_are_as_before_without_the_wrapper() -> None:
    """A copy, a pickle and another wrapper of the module do not write anywhere."""

    def job(comm: Communicator) -> None:
        ddp = training_checks.wrapped(CASES["mlp"], comm, direct_gradients=True)
        assert repr(ddp.module) == repr(models.mlp())
        twin = copy.deepcopy(ddp.module)
        before = gradients_in_buckets(ddp)
        training_checks.loss_of(twin(training_checks.batch(5, 0)[0]), training_checks.batch(5, 0)[1]).backward()
        assert_same([bucket.flat for bucket in ddp.buckets], before)
        again = DistributedDataParallel(ddp.module, comm)
        again.zero_grad()
        local_gradients(again)
        assert in_place(again) == []
        assert type(again.module[0]) is nn.Linear

    run_threads(job, 1)


def test_goes_on_after_an_exception() -> None:
    def job(comm: Communicator) -> None:
        ddp = training_checks.wrapped(CASES["mlp"], comm, direct_gradients=True)
        handle = ddp.module[0].bias.register_hook(training_checks._fail_on_purpose)
        with pytest.raises(ArithmeticError):
            training_checks.backward(ddp, 0)
        handle.remove()
        training_checks.backward(ddp, 1)
        training_checks.assert_gradients(ddp, [1])

    run_threads(job, 2, timeout_s=30)
