"""The same model on every rank: compare the models, and give all of them the values of one."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

import torch
from torch import Tensor, nn

from minidist.communicator import Communicator, ReduceOp, Work
from minidist.contract.checks import spell
from minidist.errors import MismatchError
from minidist.gradients.broadcast import Broadcast, kinds
from minidist.gradients.buckets import Bucket, layout
from minidist.gradients.wrapping import complaint

Description = list[tuple[str, str]]
"""What has to be equal on all ranks, as (name, value)."""
ARGUMENTS = "(bucket_cap_mb, broadcast_buffers, find_unused_parameters)"


def make_replicas(
    comm: Communicator, module: nn.Module, arguments: tuple[float, bool, bool], wrapper: type[nn.Module]
) -> None:
    """Check that every rank has the same model and arguments; then give ``module`` the values that it has on rank 0.

    Args:
        comm: every rank calls it.
        module: changed in place.
        arguments: bucket_cap_mb, broadcast_buffers and find_unused_parameters.
        wrapper: the class that wraps the module.

    Raises:
        ValueError: on every rank, what of a rank's module or arguments cannot be trained.
        MismatchError: names the first entry that differs, on rank 0 and on the first rank where it differs.
    """
    who = comm.who("DistributedDataParallel")
    why = complaint(module, arguments[0], wrapper)
    description = [] if why else [(ARGUMENTS, str(arguments)), *describe(module)]
    answers: list[tuple[str | None, Description]] = comm.all_gather_object((why, description))
    for rank, (why, _) in enumerate(answers):
        if why:
            raise ValueError(f"{who}: {why}" if rank == comm.rank else f"{who}: on rank {rank}, {why}")
    first = answers[0][1]
    for rank, (_, other) in enumerate(answers):
        if first != other:
            raise MismatchError(
                f"{who}: {_difference(first, other, rank)}; build the same model with the same arguments on every rank"
            )
    broadcast_module(comm, module)


def describe(module: nn.Module) -> Description:
    """Return each parameter and buffer, but for its values."""
    parameters = [(f"parameter {name}", tensor) for name, tensor in module.named_parameters()]
    buffers = [(f"buffer {name}", tensor) for name, tensor in module.named_buffers()]
    devices = list(dict.fromkeys(tensor.device for _, tensor in parameters + buffers))
    return [(name, _describe_tensor(tensor, devices)) for name, tensor in parameters + buffers]


def _describe_tensor(tensor: Tensor, devices: Sequence[torch.device]) -> str:
    """Say what the place in a bucket, and in a message, depends on."""
    dtype = spell(tensor.dtype)
    strides = layout(tensor)
    laid_out = "" if strides is None else f" with strides {strides}"
    # Ranks call their devices differently, but have to share out the parameters among them alike.
    number = f" number {devices.index(tensor.device)}" if len(devices) > 1 else ""
    frozen = "" if tensor.requires_grad or not isinstance(tensor, nn.Parameter) else ", frozen"
    return f"{dtype} {tuple(tensor.shape)}{laid_out} on {tensor.device.type}{number}{frozen}"


def _difference(first: Description, other: Description, rank: int) -> str:
    pairs = zip_longest(first, other, fillvalue=("", ""))
    (name, value), (other_name, other_value) = next((ours, theirs) for ours, theirs in pairs if ours != theirs)
    if name == other_name:
        return f"{name} is {value} on rank 0, but {other_value} on rank {rank}"
    if name and name not in dict(other):
        return f"{name} ({value}) exists on rank 0, but not on rank {rank}"
    if other_name and other_name not in dict(first):
        return f"{other_name} ({other_value}) exists on rank {rank}, but not on rank 0"
    return f"rank 0 has {name or 'nothing'} where rank {rank} has {other_name or 'nothing'}"


def broadcast_module(comm: Communicator, module: nn.Module, src: int = 0) -> None:
    """Give ``module`` on every rank the parameters and buffers that it has on rank ``src``."""
    tensors = [*module.parameters(), *module.buffers()]
    Broadcast(comm, tensors).send(tensors, src)


class SharedBuffers:
    """The buffers of a module, which one rank can give to all of them, as often as before each forward.

    Args:
        comm: every rank calls `send` together.
        module: its buffers may be replaced meanwhile, on all ranks alike.
    """

    def __init__(self, comm: Communicator, module: nn.Module) -> None:
        self._comm = comm
        self._module = module
        self._broadcast = Broadcast(comm, [])

    def send(self, src: int) -> None:
        """Give every rank the values of rank ``src``."""
        buffers = tuple(self._module.buffers())
        if self._broadcast.kinds != kinds(buffers):
            self._broadcast = Broadcast(self._comm, buffers)
        # A forward that is not differentiated yet may have saved them, as batch normalisation does, without a use for
        # their values: to count this as a change would fail its backward.
        with torch.autograd._unsafe_preserve_version_counter(buffers):
            self._broadcast.send(buffers, src)


def share_used(comm: Communicator, buckets: Sequence[Bucket]) -> Work:
    """Give every parameter that some rank has a gradient for its summed gradient on every rank, once waited for.

    A parameter that no rank used keeps the gradient None, so that an optimizer passes it over on every rank alike.
    """
    gradients = [place for bucket in buckets for place in zip(bucket.parameters, bucket.views, strict=True)]
    used = torch.tensor([parameter.grad is not None for parameter, _ in gradients], dtype=torch.uint8)
    used = used.to(comm.device_type)

    def adopt() -> None:
        for (parameter, view), is_used in zip(gradients, used.tolist(), strict=True):
            if is_used:
                parameter.grad = view

    return comm.all_reduce(used, ReduceOp.MAX, async_op=comm.overlaps).then(adopt)
