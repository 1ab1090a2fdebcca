"""The same model on every rank: compare the models, and give all of them the values of one."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

import torch
from torch import Tensor, nn

from minidist.buckets import Bucket, assign
from minidist.communicator import Communicator, ReduceOp, Work
from minidist.errors import MismatchError

MESSAGE_BYTES = 2**26
"""A message of a broadcast is closed once it holds this much: few messages, little memory."""

Description = list[tuple[str, str]]
"""What has to be equal on all ranks, as (name, value)."""


def make_replicas(comm: Communicator, module: nn.Module, arguments: tuple[float, bool, bool]) -> None:
    """Check that every rank has the same model and arguments; then give ``module`` the values that it has on rank 0.

    Args:
        comm: every rank calls it.
        module: changed in place.
        arguments: bucket_cap_mb, broadcast_buffers and find_unused_parameters.

    Raises:
        MismatchError: names the first entry that differs, on rank 0 and on the first rank where it differs.
    """
    check_equal(
        comm, [("(bucket_cap_mb, broadcast_buffers, find_unused_parameters)", str(arguments)), *describe(module)]
    )
    broadcast_module(comm, module)


def describe(module: nn.Module) -> Description:
    """Return each parameter and buffer, but for its values."""
    parameters = [(f"parameter {name}", tensor) for name, tensor in module.named_parameters()]
    buffers = [(f"buffer {name}", tensor) for name, tensor in module.named_buffers()]
    return [(name, _describe_tensor(tensor)) for name, tensor in parameters + buffers]


def _describe_tensor(tensor: Tensor) -> str:
    dtype = str(tensor.dtype).removeprefix("torch.")
    frozen = "" if tensor.requires_grad or not isinstance(tensor, nn.Parameter) else ", frozen"
    return f"{dtype} {tuple(tensor.shape)} on {tensor.device.type}{frozen}"


def check_equal(comm: Communicator, description: Description) -> None:
    """Raise MismatchError on every rank if any rank's description differs from rank 0's."""
    first, *others = comm.all_gather_object(description)
    for rank, other in enumerate(others, start=1):
        if first != other:
            raise MismatchError(
                f"{comm.who('DistributedDataParallel')}: {_difference(first, other, rank)}; "
                "build the same model with the same arguments on every rank"
            )


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
    broadcast_tensors(comm, [*module.parameters(), *module.buffers()], src)


def broadcast_tensors(comm: Communicator, tensors: Sequence[Tensor], src: int = 0) -> None:
    """Overwrite ``tensors`` on every rank with those of rank ``src``, in few messages."""
    # The widest dtype first: every tensor then begins at a multiple of its item size within the message.
    ordered = sorted((tensor.detach() for tensor in tensors), key=lambda tensor: -tensor.itemsize)
    kinds = [tensor.device for tensor in ordered]
    for group in assign([tensor.nbytes for tensor in ordered], kinds, MESSAGE_BYTES, MESSAGE_BYTES):
        _broadcast_group(comm, [ordered[i] for i in group], src)


def _broadcast_group(comm: Communicator, tensors: Sequence[Tensor], src: int) -> None:
    """Send the tensors as bytes, which move alike whatever their dtype, so that one message does for all."""
    sizes = [tensor.nbytes for tensor in tensors]
    message = comm.empty(sum(sizes), torch.uint8, tensors[0].device)
    places = torch.split(message, sizes)
    views = [place.view(tensor.dtype).view(tensor.shape) for place, tensor in zip(places, tensors, strict=True)]
    if comm.rank == src:
        for view, tensor in zip(views, tensors, strict=True):
            view.copy_(tensor)
    comm.broadcast(message, src)
    if comm.rank != src:
        for view, tensor in zip(views, tensors, strict=True):
            tensor.copy_(view)


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

    return comm.all_reduce(used, ReduceOp.MAX, async_op=True).then(adopt)
