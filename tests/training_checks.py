"""What data-parallel training has to do, as functions of a communicator: any backend can be put to them.

Batches and initial weights have closed forms in (step, rank), so every rank can compute what one process would do with
all batches, without communication, and compare.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from minidist.communicator import Communicator
from minidist.ddp import DistributedDataParallel
from tests import models

NUM_STEPS = 8
BATCH_SIZE = 4


@dataclass(frozen=True)
class Case:
    """A model and how to train it.

    Attributes:
        build: makes the model.
        joined: whether one process may see all batches as one: not where a batch has its own statistics or branch.
        tolerance: of the difference to one process; rounding differs in the order of sums.
        find_unused: whether parameters stay without a gradient.
    """

    build: Callable[[], nn.Module]
    joined: bool = True
    tolerance: float = 1e-10
    find_unused: bool = False

    def model(self, seed: int = 0) -> nn.Module:
        model = self.build()
        return models.seeded(model if self.build is models.MixedDtypes else model.double(), seed)


CASES = {
    "mlp": Case(models.mlp),
    "batch_norm": Case(models.batch_norm, joined=False),
    "tied": Case(models.Tied),
    "frozen": Case(models.frozen),
    "branches": Case(models.Branches, joined=False, find_unused=True),
    "lstm": Case(models.Lstm),
    "checkpoint": Case(partial(models.Checkpointed, use_reentrant=False)),
    "checkpoint_reentrant": Case(partial(models.Checkpointed, use_reentrant=True)),
    "checkpoint_shared": Case(partial(models.SharedCheckpoint, use_reentrant=False)),
    "several_outputs": Case(models.SeveralOutputs),
    "mixed_dtypes": Case(models.MixedDtypes, tolerance=1e-5),
}


def batch(step: int, rank: int) -> tuple[Tensor, Tensor]:
    """Return the inputs and targets of one rank's (micro) step."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(1000 * step + rank)
    inputs = torch.randn(BATCH_SIZE, models.NUM_INPUTS, generator=generator, dtype=torch.float64)
    return inputs, torch.randn(BATCH_SIZE, models.NUM_OUTPUTS, generator=generator, dtype=torch.float64)


def loss_of(output: object, target: Tensor) -> Tensor:
    """Return the mean squared error, added up over the outputs that have the target's shape."""
    outputs = [leaf for leaf in tree_leaves(output) if leaf.shape == target.shape]
    return sum(((leaf - target) ** 2).mean() for leaf in outputs)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


@dataclass(frozen=True)
class Snapshot:
    """One process's model after a step, and which of its parameters had a gradient in it."""

    model: nn.Module
    has_gradient: list[bool]


@functools.cache
def one_process(name: str, world_size: int, num_micro: int = 1) -> list[Snapshot]:
    """Train on the batches of all ranks in this process, step by step."""
    case = CASES[name]
    model = case.model()
    optimizer = sgd(model)
    snapshots = []
    for step in range(NUM_STEPS):
        optimizer.zero_grad()
        for micro in range(step * num_micro, (step + 1) * num_micro):
            shards = [batch(micro, rank) for rank in range(world_size)]
            if case.joined:
                shards = [tuple(torch.cat(parts) for parts in zip(*shards, strict=True))]
            _backward_by_shard(model, shards, num_micro)
        optimizer.step()
        snapshots.append(Snapshot(copy.deepcopy(model), [p.grad is not None for p in model.parameters()]))
    return snapshots


def _backward_by_shard(model: nn.Module, shards: list[tuple[Tensor, Tensor]], num_micro: int, keep: int = 0) -> None:
    """Add up the gradients of the shards; each starts from the same buffers, and those of shard ``keep`` stay."""
    before = copy.deepcopy(list(model.buffers()))
    kept = before
    for index, (inputs, target) in enumerate(shards):
        _restore(model, before)
        (loss_of(model(inputs), target) / len(shards) / num_micro).backward()
        if index == keep:
            kept = copy.deepcopy(list(model.buffers()))
    _restore(model, kept)


def _restore(model: nn.Module, buffers: list[Tensor]) -> None:
    for buffer, value in zip(model.buffers(), buffers, strict=True):
        buffer.copy_(value)


def train(
    ddp: DistributedDataParallel,
    optimizer: torch.optim.Optimizer,
    step: int,
    num_micro: int = 1,
) -> None:
    """Take one step on this rank's batches."""
    optimizer.zero_grad()
    for index in range(num_micro):
        inputs, target = batch(step * num_micro + index, ddp.comm.rank)
        with ddp.no_sync() if index < num_micro - 1 else nullcontext():
            (loss_of(ddp(inputs), target) / num_micro).backward()
    optimizer.step()


def wrapped(case: Case, comm: Communicator, **options: object) -> DistributedDataParallel:
    """Wrap a model that starts with other weights on every rank, those of rank 0 excepted."""
    return DistributedDataParallel(case.model(comm.rank), comm, find_unused_parameters=case.find_unused, **options)


def assert_replicas_identical(ddp: DistributedDataParallel, tensors: list[Tensor] | None = None) -> None:
    tensors = list(ddp.parameters()) if tensors is None else tensors
    mine = torch.cat([tensor.detach().reshape(-1).view(torch.uint8) for tensor in tensors])
    everywhere = mine.new_empty((ddp.comm.world_size, mine.numel()))
    ddp.comm.all_gather(everywhere, mine)
    assert all(torch.equal(other, mine) for other in everywhere)


def assert_models_close(model: nn.Module, expected: nn.Module, tolerance: float) -> None:
    for (name, parameter), reference in zip(model.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(parameter, reference, rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


def check_equals_one_process(comm: Communicator, name: str, num_micro: int = 1) -> None:
    """N ranks take the steps of one process with all batches, and stay bit-identical."""
    case = CASES[name]
    ddp = wrapped(case, comm)
    optimizer = sgd(ddp)
    for step, expected in enumerate(one_process(name, comm.world_size, num_micro)):
        train(ddp, optimizer, step, num_micro)
        assert_replicas_identical(ddp)
        assert_models_close(ddp.module, expected.model, case.tolerance)
        assert [parameter.grad is not None for parameter in ddp.module.parameters()] == expected.has_gradient
    ddp.sync_buffers()
    for buffer, reference in zip(ddp.module.buffers(), expected.model.buffers(), strict=True):
        torch.testing.assert_close(buffer, reference, rtol=0, atol=case.tolerance)


def check_equals_one_process_bit_for_bit(comm: Communicator) -> None:
    """In the same order of reduction (two ranks have only one) not a bit differs, in float32."""
    model = models.seeded(models.mlp(), 0)
    expected = copy.deepcopy(model)
    ddp = DistributedDataParallel(model, comm, bucket_cap_mb=1e-4)
    optimizers = sgd(ddp), sgd(expected)
    for step in range(NUM_STEPS):
        batches = [[part.float() for part in batch(step, rank)] for rank in range(comm.world_size)]
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss_of(ddp(batches[comm.rank][0]), batches[comm.rank][1]).backward()
        grads = [torch.autograd.grad(loss_of(expected(x), y), list(expected.parameters())) for x, y in batches]
        for parameter, *parts in zip(expected.parameters(), *grads, strict=True):
            parameter.grad = sum(part / comm.world_size for part in parts)
        for optimizer in optimizers:
            optimizer.step()
        assert all(torch.equal(p, q) for p, q in zip(ddp.module.parameters(), expected.parameters(), strict=True))


def mean_gradients(model: nn.Module, steps: list[int], world_size: int) -> list[Tensor]:
    """Return what the gradients have to be after one backward pass per step, added up."""
    model = copy.deepcopy(model)
    model.zero_grad()
    for step in steps:
        for rank in range(world_size):
            inputs, target = batch(step, rank)
            (loss_of(model(inputs), target) / world_size).backward()
    return [parameter.grad for parameter in model.parameters()]


def assert_gradients(ddp: DistributedDataParallel, steps: list[int]) -> None:
    expected = mean_gradients(ddp.module, steps, ddp.comm.world_size)
    for parameter, gradient in zip(ddp.module.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=0, atol=1e-12)


def backward(ddp: DistributedDataParallel, step: int) -> None:
    inputs, target = batch(step, ddp.comm.rank)
    loss_of(ddp(inputs), target).backward()


def check_backward_passes_add_up(comm: Communicator) -> None:
    """Passes that communicate, passes that do not, and gradients that are zeroed in place."""
    ddp = wrapped(CASES["mlp"], comm)
    backward(ddp, 0)
    backward(ddp, 1)
    assert_gradients(ddp, [0, 1])
    with ddp.no_sync():
        backward(ddp, 2)
        backward(ddp, 3)
    backward(ddp, 4)
    assert_gradients(ddp, [0, 1, 2, 3, 4])
    ddp.zero_grad(set_to_none=False)
    backward(ddp, 5)
    assert_gradients(ddp, [5])
    assert_replicas_identical(ddp, [parameter.grad for parameter in ddp.parameters()])


def check_several_backwards_of_one_forward(comm: Communicator) -> None:
    ddp = wrapped(CASES["mlp"], comm)
    inputs, target = batch(0, comm.rank)
    loss = loss_of(ddp(inputs), target)
    loss.backward(retain_graph=True)
    loss.backward()
    assert_gradients(ddp, [0, 0])


def check_several_forwards_of_one_backward(comm: Communicator) -> None:
    ddp = wrapped(CASES["mlp"], comm)
    losses = []
    for step in range(2):
        inputs, target = batch(step, comm.rank)
        losses.append(loss_of(ddp(inputs), target))
    sum(losses).backward()
    assert_gradients(ddp, [0, 1])


def check_no_sync_after_a_forward_that_communicates(comm: Communicator) -> None:
    """One backward through both reduces; once it has, or where it never comes, no_sync() holds."""
    ddp = wrapped(CASES["mlp"], comm)
    inputs, target = batch(0, comm.rank)
    loss = loss_of(ddp(inputs), target)
    with ddp.no_sync():
        inputs, target = batch(1, comm.rank)
        loss = loss + loss_of(ddp(inputs), target)
    loss.backward()
    assert_gradients(ddp, [0, 1])
    assert_replicas_identical(ddp, [parameter.grad for parameter in ddp.parameters()])
    ddp(batch(2, comm.rank)[0])
    before = comm.traffic.messages
    with ddp.no_sync():
        backward(ddp, 2)
    assert comm.traffic.messages == before
    backward(ddp, 3)
    assert_gradients(ddp, [0, 1, 2, 3])


def check_no_sync_sends_nothing(comm: Communicator) -> None:
    ddp = wrapped(CASES["batch_norm"], comm)
    before = comm.traffic.messages
    with ddp.no_sync():
        backward(ddp, 0)
    with torch.no_grad():
        ddp(batch(0, comm.rank)[0])
    ddp.eval()
    with torch.inference_mode():
        ddp(batch(0, comm.rank)[0])
    assert comm.traffic.messages == before
    ddp.train()
    backward(ddp, 1)
    assert comm.world_size == 1 or comm.traffic.messages > before


def check_autograd_grad_sends_nothing(comm: Communicator) -> None:
    """A gradient penalty differentiates with respect to the inputs first."""
    ddp = wrapped(CASES["mlp"], comm)
    before = comm.traffic.messages
    inputs, target = batch(0, comm.rank)
    output = ddp(inputs.requires_grad_())
    torch.autograd.grad(output.sum(), inputs, create_graph=True)
    assert comm.traffic.messages == before
    loss_of(output, target).backward()
    assert_gradients(ddp, [0])


def check_gradients_are_views(comm: Communicator) -> None:
    """Gradients live in the buckets, in the layout of their parameters."""
    ddp = DistributedDataParallel(models.seeded(models.cnn()), comm)
    images = torch.randn(2, 1, 12, 12, generator=torch.Generator(torch.get_default_device()).manual_seed(comm.rank))
    ddp(images.to(memory_format=torch.channels_last)).sum().backward()
    memory = {bucket.flat.untyped_storage().data_ptr() for bucket in ddp.buckets}
    for parameter in ddp.parameters():
        assert parameter.grad.untyped_storage().data_ptr() in memory
        assert parameter.grad.stride() == parameter.stride()
    assert ddp.module[3].weight.grad.is_contiguous(memory_format=torch.channels_last)


def check_buckets_start_in_order(comm: Communicator) -> None:
    """Every rank starts the buckets in order of index, even if backward reaches the parameters in another order."""
    started = []

    def hook(bucket, comm):
        started.append(bucket.index)
        return comm.all_reduce(bucket.flat, async_op=True)

    model = CASES["branches"].model(comm.rank)
    ddp = DistributedDataParallel(model, comm, bucket_cap_mb=1e-5, find_unused_parameters=True, hook=hook)
    assert len(ddp.buckets) == 6
    for step in range(3):
        backward(ddp, step)
    assert started == [0, 1, 2, 3, 4, 5] * 3


def check_hook_starts_during_backward(comm: Communicator) -> None:
    """The bucket of the last layer is on its way before backward reaches the first layer."""
    events = []

    def hook(bucket, comm):
        events.append(bucket.names)
        return comm.all_reduce(bucket.flat, async_op=True)

    model = CASES["mlp"].model()
    model[0].register_full_backward_pre_hook(lambda *_: events.append("backward of the first layer"))
    ddp = DistributedDataParallel(model, comm, bucket_cap_mb=1e-5, hook=hook)
    inputs, target = batch(0, comm.rank)
    loss_of(ddp(inputs.requires_grad_()), target).backward()
    assert events.index(["2.bias"]) < events.index("backward of the first layer") < events.index(["0.weight"])


def check_mismatch_is_named(comm: Communicator, change: Callable[[nn.Module], None], message: str) -> None:
    """A model that differs on the last rank is refused on every rank, with the difference."""
    model = CASES["batch_norm"].model()
    if comm.rank == comm.world_size - 1:
        change(model)
    with pytest.raises(RuntimeError, match=message):
        DistributedDataParallel(model, comm)
    comm.barrier()


def check_missing_gradient_is_named(comm: Communicator) -> None:
    """The error names the parameters and the fix; the wrapper goes on from there."""
    ddp = DistributedDataParallel(CASES["branches"].model(), comm)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"no gradient for branches.2.*find_unused_parameters=True"):
            ddp(torch.ones(BATCH_SIZE, models.NUM_INPUTS, dtype=torch.float64)).sum().backward()
    comm.barrier()


def check_second_gradient_is_named(comm: Communicator) -> None:
    """Re-entrant checkpoints that share a block would be averaged twice."""
    ddp = DistributedDataParallel(
        models.seeded(models.SharedCheckpoint(use_reentrant=True)).double(), comm, find_unused_parameters=True
    )
    with pytest.raises(RuntimeError, match=r"blocks.0.0.*second gradient.*use_reentrant=False"):
        backward(ddp, 0)


def check_sparse_gradient_is_named(comm: Communicator) -> None:
    ddp = DistributedDataParallel(nn.Embedding(4, 3, sparse=True), comm)
    with pytest.raises(RuntimeError, match=r"weight has a sparse gradient"):
        ddp(torch.tensor([1, 2])).sum().backward()


def check_goes_on_after_an_exception(comm: Communicator) -> None:
    """A backward pass that raises, at another place on each rank, does not disturb the next one."""
    ddp = DistributedDataParallel(CASES["mlp"].model(), comm, bucket_cap_mb=1e-5)
    layer = ddp.module[2 * (comm.rank % 2)]
    handle = layer.weight.register_hook(_fail_on_purpose)
    with pytest.raises(ArithmeticError):
        backward(ddp, 0)
    handle.remove()
    ddp.zero_grad()
    backward(ddp, 1)
    assert_gradients(ddp, [1])


def _fail_on_purpose(_: Tensor) -> None:
    raise ArithmeticError("on purpose")


def check_wrapped_again(comm: Communicator) -> None:
    """A module can be wrapped again once the first wrapper is gone."""
    model = CASES["mlp"].model()
    DistributedDataParallel(model, comm)
    ddp = DistributedDataParallel(model, comm)
    backward(ddp, 0)
    assert_gradients(ddp, [0])


def check_join(comm: Communicator, name: str) -> None:
    """Rank r has r + 1 batches; those that ran out add zeros, and end with the model of the one that did not."""
    case = CASES[name]
    ddp = wrapped(case, comm)
    optimizer = sgd(ddp)
    with ddp.join():
        for step in range(comm.rank + 1):
            train(ddp, optimizer, step)
    expected = case.model()
    reference = sgd(expected)
    for step in range(comm.world_size):
        reference.zero_grad()
        _backward_joined(expected, step, comm.world_size)
        reference.step()
    assert_models_close(ddp.module, expected, 1e-10)
    assert_replicas_identical(ddp, [*ddp.module.parameters(), *ddp.module.buffers()])
    for buffer, wanted in zip(ddp.module.buffers(), expected.buffers(), strict=True):
        torch.testing.assert_close(buffer, wanted, rtol=0, atol=1e-10)


def _backward_joined(model: nn.Module, step: int, world_size: int) -> None:
    """Ranks below ``step`` have run out. The buffers that count next are those of the lowest rank that goes on."""
    shards = [batch(step, rank) for rank in range(step, world_size)]
    _backward_by_shard(model, shards, 1, keep=min(1, len(shards) - 1))
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad.mul_(len(shards) / world_size)


def check_hook_result(comm: Communicator, make_hook: Callable[[], object], dtype: torch.dtype) -> None:
    """A cast hook sums the divided gradients, rounded to its dtype, on every rank alike."""
    ddp = wrapped(CASES["mlp"], comm, hook=make_hook())
    for step in range(2):
        ddp.zero_grad()
        backward(ddp, step)
        expected = mean_gradients(ddp.module, [step], comm.world_size)
        for parameter, gradient in zip(ddp.parameters(), expected, strict=True):
            torch.testing.assert_close(parameter.grad, gradient, rtol=0.05, atol=0.02)
            assert torch.equal(parameter.grad, parameter.grad.to(dtype).double())
        assert_replicas_identical(ddp, [parameter.grad for parameter in ddp.parameters()])
