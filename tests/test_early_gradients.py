"""Whoever looks at a gradient before it is reduced, and where to look instead."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from backends.thread import run_threads
from minidist.communicator import Communicator
from minidist.ddp import DistributedDataParallel
from tests import models, training_checks
from tests.training_checks import CASES


def _step_in_hooks(module: nn.Module, optimizers: dict[nn.Parameter, torch.optim.Optimizer]) -> None:
    """The memory-saving pattern: an optimizer per parameter that steps as soon as its gradient is there."""

    def step(parameter: Tensor) -> None:
        optimizers[parameter].step()
        parameter.grad = None

    for parameter in module.parameters():
        parameter.register_post_accumulate_grad_hook(step)


def _optimizers(module: nn.Module) -> dict[nn.Parameter, torch.optim.Optimizer]:
    return {parameter: torch.optim.SGD([parameter], lr=0.1, momentum=0.9) for parameter in module.parameters()}


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_hook_on_unreduced_gradients_is_refused(when: str) -> None:
    def job(comm: Communicator) -> None:
        model = models.mlp()
        if when == "before":
            _step_in_hooks(model, _optimizers(model))
        ddp = DistributedDataParallel(model, comm)
        if when == "after":
            _step_in_hooks(model, _optimizers(model))
        with pytest.raises(
            RuntimeError, match=r"parameter 2.bias has a post-accumulate-grad hook.*register_reduced_grad"
        ):
            ddp(torch.ones(2, 5))

    run_threads(job, 2, timeout_s=30)


def _on_accumulation(model: nn.Module, step: Callable[[nn.Parameter], None]) -> list[object]:
    """As torch's own ``_apply_optimizer_in_backward`` does it."""
    nodes = []
    for parameter in model.parameters():
        node = parameter.view_as(parameter).grad_fn.next_functions[0][0]
        node.register_hook(lambda *_, p=parameter: step(p))
        nodes.append(node)
    return nodes


def _on_modules(model: nn.Module, step: Callable[[nn.Parameter], None]) -> list[object]:
    def step_all(module: nn.Module, *_: object) -> None:
        for parameter in module.parameters(recurse=False):
            step(parameter)

    return [layer.register_full_backward_hook(step_all) for layer in model]


@pytest.mark.parametrize("find_unused", [False, True])
@pytest.mark.parametrize("register", [_on_accumulation, _on_modules])
def test_a_step_inside_of_backward_is_noticed(register: Callable[..., list[object]], find_unused: bool) -> None:
    """However it got there: what it saw was not reduced, and the replicas would drift apart."""

    def job(comm: Communicator) -> None:
        ddp = DistributedDataParallel(models.mlp(), comm, find_unused_parameters=find_unused)
        optimizers = _optimizers(ddp.module)
        kept = register(ddp.module, lambda parameter: optimizers[parameter].step())
        for _ in range(2):  # a full backward hook comes before there is a gradient: it steps with that of the last pass
            ddp(torch.randn(2, 5, requires_grad=True)).sum().backward()
        assert kept

    with pytest.raises(
        RuntimeError, match=r"[02].(weight|bias) was changed while backward ran, before its gradient was reduced"
    ):
        run_threads(job, 2, timeout_s=30)


def test_an_optimizer_per_parameter_steps_once_its_gradient_is_reduced() -> None:
    def job(comm: Communicator) -> list[Tensor]:
        ddp, plain = (training_checks.wrapped(CASES["mlp"], comm) for _ in range(2))
        optimizers = _optimizers(ddp.module)
        seen: list[str] = []

        def step(parameter: nn.Parameter) -> None:
            optimizers[parameter].step()
            parameter.grad = None
            seen.append("step")

        handle = ddp.register_reduced_grad_hook(step)
        reference = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
        for number in range(5):
            reference.zero_grad()
            training_checks.backward(plain, number)
            reference.step()
            training_checks.backward(ddp, number)
            assert all(parameter.grad is None for parameter in ddp.parameters())
        with ddp.no_sync():
            training_checks.backward(ddp, 9)
        handle.remove()
        training_checks.backward(ddp, 10)
        assert len(seen) == 5 * 4
        for parameter, expected in zip(ddp.parameters(), plain.parameters(), strict=True):
            assert torch.equal(parameter, expected)
        return list(ddp.parameters())

    run_threads(job, 3, timeout_s=60)


def test_a_gradient_of_a_gradient_is_refused() -> None:
    def job(comm: Communicator) -> None:
        ddp = DistributedDataParallel(models.mlp(), comm)
        with pytest.raises(
            RuntimeError, match=r"2.bias has a gradient .* backward\(create_graph=True\).*autograd.grad"
        ):
            ddp(torch.ones(2, 5)).square().sum().backward(create_graph=True)

    run_threads(job, 2, timeout_s=30)
