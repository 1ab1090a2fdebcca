"""What a sharded optimizer has to do, as functions of a communicator: the same as the unsharded one.

Each trains twice, with the optimizer over whole parameters and with its shares, and compares: bit for bit, but for
fused kernels and clipping.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn, optim

from backends.thread import ThreadCommunicator
from minidist import ShardedOptimizer
from minidist.communicator import Communicator
from minidist.ddp import DistributedDataParallel
from minidist.sharded import ELEMENTWISE
from tests import models, training_checks
from tests.training_checks import CASES, Case

NUM_STEPS = 4
EXTRA: dict[type, dict[str, Any]] = {
    optim.SGD: {"momentum": 0.9, "nesterov": True},
    optim.Adam: {"amsgrad": True},
    optim.RMSprop: {"momentum": 0.5, "centered": True},
}
"""What makes an optimizer keep all the state that it can."""


def options(kind: type[optim.Optimizer], **more: Any) -> dict[str, Any]:
    return {"lr": 0.02, "weight_decay": 0.01, **EXTRA.get(kind, {}), **more}


def in_two_groups(ddp: DistributedDataParallel) -> list[dict[str, Any]]:
    """Decay the matrices alone, as people do; neighbours in a bucket are in different groups then."""
    matrices = [parameter for parameter in ddp.parameters() if parameter.ndim > 1]
    rest = [parameter for parameter in ddp.parameters() if parameter.ndim <= 1]
    return [{"params": matrices}, {"params": rest, "weight_decay": 0.0, "lr": 0.01}]


def pair(
    case: Case, comm: Communicator, kind: type[optim.Optimizer], **settings: Any
) -> list[tuple[DistributedDataParallel, optim.Optimizer]]:
    """Return the same replica and optimizer twice, unsharded and sharded."""
    plain, sharded = (training_checks.wrapped(case, comm, bucket_cap_mb=2e-4) for _ in range(2))
    return [
        (plain, kind(in_two_groups(plain), **settings)),
        (sharded, ShardedOptimizer(in_two_groups(sharded), kind, comm, **settings)),
    ]


def tolerance(comm: Communicator) -> float:
    """Return by how much results may differ; not at all with one order of sums: of two ranks, and among threads."""
    return 0.0 if comm.world_size <= 2 or isinstance(comm, ThreadCommunicator) else 1e-6


def assert_same(left: Any, right: Any, tolerance: float = 0.0) -> None:
    """Compare tensors and nests of dicts, lists and tuples of them, bit for bit unless there is a tolerance."""
    if isinstance(left, torch.Tensor):
        torch.testing.assert_close(left, right, rtol=tolerance, atol=tolerance)
    elif isinstance(left, dict):
        assert left.keys() == right.keys()
        for key, value in left.items():
            assert_same(value, right[key], tolerance)
    elif isinstance(left, list | tuple):
        assert len(left) == len(right)
        for one, other in zip(left, right, strict=True):
            assert_same(one, other, tolerance)
    else:
        assert left == right


def check_equals_unsharded(comm: Communicator, name: str, kind: type[optim.Optimizer], **more: Any) -> None:
    """The same parameters, buffers and consolidated state after some steps, with a schedule and accumulation."""
    plain, sharded = pair(CASES[name], comm, kind, **options(kind, **more))
    schedulers = [optim.lr_scheduler.StepLR(optimizer, 2, 0.5) for _, optimizer in (plain, sharded)]
    for step in range(NUM_STEPS):
        for ddp, optimizer in (plain, sharded):
            training_checks.train(ddp, optimizer, step, num_micro=1 + step % 2)
        for scheduler in schedulers:
            scheduler.step()
        assert_same(list(plain[0].parameters()), list(sharded[0].parameters()), tolerance(comm))
        training_checks.assert_replicas_identical(sharded[0])
        assert all(parameter.grad is None for parameter in sharded[0].parameters())
    assert_same(plain[0].module.state_dict(), sharded[0].module.state_dict(), tolerance(comm))
    assert_same(plain[1].state_dict(), sharded[1].state_dict(), tolerance(comm))


def check_all_optimizers(comm: Communicator) -> None:
    for kind in ELEMENTWISE:
        for foreach in (False, True):
            check_equals_unsharded(comm, "mlp", kind, foreach=foreach)


def check_some_optimizers(comm: Communicator) -> None:
    for kind in (optim.SGD, optim.AdamW):
        for foreach in (False, True):
            check_equals_unsharded(comm, "mlp", kind, foreach=foreach)
    check_state_moves(comm, optim.AdamW)


def check_some_models(comm: Communicator) -> None:
    for name in ("batch_norm", "branches", "mixed_dtypes"):
        check_equals_unsharded(comm, name, optim.AdamW)


def check_all_models(comm: Communicator) -> None:
    for name in CASES:
        check_equals_unsharded(comm, name, optim.AdamW)


def check_fused(comm: Communicator) -> None:
    """Fused kernels round the last elements of a tensor in another way, and a share ends elsewhere: to rounding."""
    for kind in (optim.SGD, optim.Adam, optim.AdamW, optim.Adagrad):
        plain, sharded = pair(CASES["mlp"], comm, kind, **options(kind, fused=True))
        for step in range(NUM_STEPS):
            for ddp, optimizer in (plain, sharded):
                training_checks.train(ddp, optimizer, step)
        training_checks.assert_models_close(sharded[0].module, plain[0].module, 1e-9)
        training_checks.assert_replicas_identical(sharded[0])


def check_unused_are_passed_over(comm: Communicator) -> None:
    """A parameter that no rank used keeps its value and gets no state, though its weight would decay."""
    _, (ddp, optimizer) = pair(CASES["branches"], comm, optim.AdamW, lr=0.1, weight_decay=0.5)
    unused = ddp.module.branches[2].weight
    before = unused.detach().clone()
    for step in range(NUM_STEPS):
        training_checks.train(ddp, optimizer, step)
    assert torch.equal(unused, before)
    names = [name for name, _ in ddp.module.named_parameters()]
    flat = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    with_state = {flat[index] for index in optimizer.state_dict()["state"]}
    assert [name for name, parameter in ddp.module.named_parameters() if parameter not in with_state] == names[4:]


def check_clipping(comm: Communicator) -> None:
    check_clipping_to(comm, 0.1)
    check_clipping_to(comm, 1e6)


def check_clipping_to(comm: Communicator, max_norm: float) -> None:
    """The norm is that of whole parameters, and so are the steps, but for rounding."""
    plain, sharded = pair(CASES["mlp"], comm, optim.SGD, lr=0.1, momentum=0.9)
    for step in range(NUM_STEPS):
        norms = []
        for ddp, optimizer in (plain, sharded):
            optimizer.zero_grad()
            training_checks.backward(ddp, step)
            if isinstance(optimizer, ShardedOptimizer):
                norms.append(optimizer.clip_grad_norm_(max_norm))
            else:
                norms.append(nn.utils.clip_grad_norm_(ddp.parameters(), max_norm))
            optimizer.step()
        torch.testing.assert_close(*norms, rtol=1e-9, atol=0)
    training_checks.assert_models_close(sharded[0].module, plain[0].module, 1e-9)


def check_states_move(comm: Communicator) -> None:
    for kind in ELEMENTWISE:
        check_state_moves(comm, kind)


def check_state_moves(comm: Communicator, kind: type[optim.Optimizer]) -> None:
    """A state goes from shares to whole parameters and back, and training goes on to the same bits."""
    plain, sharded = pair(CASES["tied"], comm, kind, **options(kind))
    for step in range(2):
        for ddp, optimizer in (plain, sharded):
            training_checks.train(ddp, optimizer, step)
    states = [copy.deepcopy(optimizer.state_dict()) for _, optimizer in (plain, sharded)]
    assert_same(*states, tolerance(comm))
    plain[1].load_state_dict(copy.deepcopy(states[0]))  # which rounds NAdam's mu_product, in torch as it is
    crossed = pair(CASES["tied"], comm, kind, **options(kind, lr=0.5))
    for (ddp, optimizer), state in zip(crossed, reversed(states), strict=True):
        ddp.module.load_state_dict(sharded[0].module.state_dict())
        optimizer.load_state_dict(state)
    assert_same(crossed[0][1].state_dict(), crossed[1][1].state_dict(), tolerance(comm))
    for step in range(2, 4):
        for ddp, optimizer in (plain, *crossed):
            training_checks.train(ddp, optimizer, step)
    for ddp, _ in crossed:
        assert_same(list(plain[0].parameters()), list(ddp.parameters()), tolerance(comm))


def check_group_added_later(comm: Communicator) -> None:
    """A layer that is thawed by a new group trains from then on; what is not the model's is refused."""
    case = CASES["mlp"]
    runs: list[DistributedDataParallel] = []
    for make in (lambda p: optim.Adam(p, lr=0.1), lambda p: ShardedOptimizer(p, optim.Adam, comm, lr=0.1)):
        ddp = training_checks.wrapped(case, comm)
        optimizer = make(ddp.module[2].parameters())
        for step in range(NUM_STEPS):
            if step == 2:
                with pytest.raises(ValueError, match=r"shape \(2,\) is not one of|more than one"):
                    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2)), ddp.module[2].weight]})
                optimizer.add_param_group({"params": ddp.module[0].parameters(), "lr": 0.01})
            training_checks.train(ddp, optimizer, step)
        runs.append(ddp)
    assert_same(list(runs[0].parameters()), list(runs[1].parameters()), tolerance(comm))


def check_goes_on_after_an_exception(comm: Communicator) -> None:
    """A backward pass that breaks off after some buckets went off leaves no gradient behind, nor a hook's step."""
    plain, sharded = pair(CASES["mlp"], comm, optim.SGD, lr=0.1, momentum=0.9)
    for ddp, optimizer in (plain, sharded):
        handle = ddp.module[0].weight.register_hook(training_checks._fail_on_purpose)
        optimizer.zero_grad()
        with pytest.raises(ArithmeticError):
            training_checks.backward(ddp, 0)
        handle.remove()
        for step in range(2):
            training_checks.train(ddp, optimizer, step)
    assert_same(list(plain[0].parameters()), list(sharded[0].parameters()), tolerance(comm))


def check_values_are_kept(comm: Communicator) -> None:
    """Values, strides and ties stay; load_state_dict and the module's own changes in place are what is trained."""
    model = models.seeded(models.cnn(), comm.rank)
    ddp = DistributedDataParallel(model, comm)
    before = [(parameter.detach().clone(), parameter.stride()) for parameter in ddp.parameters()]
    ShardedOptimizer(ddp.parameters(), optim.SGD, comm, lr=0.1)
    for parameter, (value, stride) in zip(ddp.parameters(), before, strict=True):
        assert torch.equal(parameter, value)
        assert parameter.stride() == stride
    model.load_state_dict(models.seeded(models.cnn(), 7).state_dict())
    images = torch.randn(2, 1, 12, 12, generator=torch.Generator().manual_seed(comm.rank))
    ddp(images.to(memory_format=torch.channels_last)).sum().backward()


def check_copy_of_the_wrapper(comm: Communicator) -> None:
    """A copy is an ordinary wrapper, for an optimizer of its own."""
    _, (ddp, optimizer) = pair(CASES["mlp"], comm, optim.SGD, lr=0.1)
    training_checks.train(ddp, optimizer, 0)
    twin = copy.deepcopy(ddp)
    training_checks.backward(twin, 1)
    training_checks.assert_gradients(twin, [1])
    with pytest.raises(TypeError, match="cannot be copied or pickled; use its state_dict"):
        copy.deepcopy(optimizer)


def check_small(comm: Communicator) -> None:
    """A parameter of one element, of no dimension, of none: most ranks have no part of anything."""
    runs = []
    for make in (lambda p: optim.ASGD(p, lr=0.1), lambda p: ShardedOptimizer(p, optim.ASGD, comm, lr=0.1)):
        module = nn.Module()
        module.scale = nn.Parameter(torch.tensor(2.0))
        module.none = nn.Parameter(torch.ones(0, 3))
        module.forward = lambda x, m=module: (m.scale * x).sum() + m.none.sum()
        ddp = DistributedDataParallel(module, comm)
        optimizer = make(ddp.parameters())
        for _ in range(2):
            for _ in range(2):
                optimizer.zero_grad()
                ddp(torch.ones(3) + comm.rank).backward()
                optimizer.step()
            optimizer.load_state_dict(optimizer.state_dict())
        runs.append((module.scale.detach().clone(), optimizer.state_dict()["state"][0]))
    assert_same(*runs, tolerance(comm))


def check_sends_what_an_all_reduce_sends(comm: Communicator) -> None:
    """A step sends no more than without shares, up to the padding."""
    sent = []
    for ddp, optimizer in pair(CASES["mlp"], comm, optim.Adam, lr=0.1):
        training_checks.train(ddp, optimizer, 0)
        before = comm.traffic.bytes
        training_checks.train(ddp, optimizer, 1)
        sent.append(comm.traffic.bytes - before)
    padding = 64 * comm.world_size * 2 * len(list(CASES["mlp"].model().parameters()))
    assert sent[0] <= sent[1] <= sent[0] + 2 * padding


CHECKS: tuple[Callable[[Communicator], None], ...] = (
    check_all_optimizers,
    check_all_models,
    check_fused,
    check_unused_are_passed_over,
    check_clipping,
    check_states_move,
    check_group_added_later,
    check_goes_on_after_an_exception,
    check_values_are_kept,
    check_copy_of_the_wrapper,
    check_small,
)
IN_PROCESSES = (check_some_optimizers, check_some_models, check_fused, check_clipping, check_small)
"""Those that can depend on who communicates."""
