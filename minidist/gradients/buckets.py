"""Parameters to buckets: which gradients travel together, and the memory that they travel in. No communication.

Small messages are expensive, one message per model starts too late: so gradients are collected in buckets of some
megabytes. Backward reaches the last layer first, so buckets take the parameters in reverse order of registration, and
a full one can leave while backward goes on (Li et al., "PyTorch Distributed", 2020)::

    registered   conv1  conv2  fc1    fc2
    buckets      [conv2 conv1]   [fc1 fc2]
                  index 1         index 0: full first, sent first
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence

import torch
from torch import Tensor, nn

FIRST_BUCKET_BYTES = 2**20
"""The first bucket of a kind is closed early, so that communication starts early."""


def assign(sizes: Sequence[int], kinds: Sequence[Hashable], cap_bytes: int, first_cap_bytes: int) -> list[list[int]]:
    """Cut items into groups of one kind, in order.

    Args:
        sizes: bytes of each item.
        kinds: what each item must share with the others of its group.
        cap_bytes: a group is closed as soon as it holds that much; a larger item makes it larger.
        first_cap_bytes: the same for the first group of each kind.

    Returns:
        The indices of the items of each group; the groups in the order in which they become complete.
    """
    caps: dict[Hashable, int] = {}
    opened: dict[Hashable, list[int]] = {}
    filled: dict[Hashable, int] = {}
    closed = []
    for index, (size, kind) in enumerate(zip(sizes, kinds, strict=True)):
        opened.setdefault(kind, []).append(index)
        filled[kind] = filled.get(kind, 0) + size
        if filled[kind] >= caps.setdefault(kind, min(first_cap_bytes, cap_bytes)):
            closed.append(opened.pop(kind))
            caps[kind] = cap_bytes
            filled[kind] = 0
    return sorted(closed + list(opened.values()), key=lambda group: group[-1])


class Bucket:
    """Some gradients of one dtype and device in one piece of memory.

    Attributes:
        index: its place among the buckets; they are communicated in this order.
        flat: all the memory, 1-d and contiguous: what a hook sends.
        names, parameters: whose gradients it holds.
        title: what errors call it.
        views: the place of each parameter's gradient in ``flat``, in the parameter's shape.
        held: whether gradients wait there to be reduced, so that nothing may be computed there.
        missing: the slots (places in ``parameters``) whose gradient is not there yet in this backward pass.
    """

    def __init__(self, index: int, flat: Tensor, named: Mapping[str, nn.Parameter]) -> None:
        self.index = index
        self.names = list(named)
        self.parameters = list(named.values())
        self.title = f"bucket {index} of DDP ({self.names[0]}..{self.names[-1]})"
        self.lay_out(flat)
        self.reset()
        self.held = False
        self._claimed: tuple[set[int], set[int]] = (set(), set())

    def lay_out(self, flat: Tensor) -> None:
        """Let the gradients live in ``flat`` from now on, which may be longer; what was there before is not copied."""
        self.flat = flat
        self.views = self.places(flat)

    def places(self, flat: Tensor) -> list[Tensor]:
        """Return the place of each parameter in a ``flat`` that is laid out like this bucket's, in its shape."""
        numels = [parameter.numel() for parameter in self.parameters]
        places = torch.split(flat[: sum(numels)], numels)
        return [shaped(place, parameter) for place, parameter in zip(places, self.parameters, strict=True)]

    def reset(self) -> None:
        """Begin the next backward pass."""
        self.missing = set(range(len(self.parameters)))

    def claim(self, slot: int) -> Tensor | None:
        """Return the place of ``parameters[slot]`` to compute its gradient in, once in each backward pass."""
        if self.held:
            return None
        missing, slots = self._claimed
        if missing is not self.missing:  # which is another set in each pass
            self._claimed = (self.missing, slots := set())
        if slot in slots:
            return None
        slots.add(slot)
        return self.views[slot].detach()

    def fits(self, slot: int) -> bool:
        """Whether the gradient that just came for ``parameters[slot]`` can be put into its place."""
        grad = self.parameters[slot].grad
        return slot in self.missing and (grad is None or (grad.layout is torch.strided and not grad.requires_grad))

    def complaint(self, slot: int) -> str:
        """Return why a gradient does not fit."""
        grad = self.parameters[slot].grad
        if grad is not None and grad.layout is not torch.strided:
            return f"{self.names[slot]} has a sparse gradient; make its layer with sparse=False"
        if grad is not None and grad.requires_grad:
            return (
                f"{self.names[slot]} has a gradient that is to be differentiated too, by backward(create_graph=True), "
                "and what is reduced is not; get such gradients from torch.autograd.grad(..., create_graph=True)"
            )
        return (
            f"{self.names[slot]} got a second gradient in one backward pass, as re-entrant checkpoints that share "
            "parameters cause; checkpoint with use_reentrant=False"
        )

    def put(self, slot: int, divisor: int) -> None:
        """Write a parameter's gradient, divided by ``divisor``, into its place, where it lives from now on.

        Without a gradient the place is zeroed. A division and not a product with 1 / divisor: the result then has
        the bits of a reference that divides.
        """
        parameter = self.parameters[slot]
        view = self.views[slot]
        if parameter.grad is None:
            view.zero_()
        elif divisor > 1 or parameter.grad.data_ptr() != view.data_ptr():
            # One pass scales and copies. After zero_grad(set_to_none=True) autograd hands over the memory in which
            # it computed the gradient, which is cheaper than to have it add to zeros in the bucket.
            torch.div(parameter.grad.detach(), divisor, out=view)
            parameter.grad = view
        self.missing.remove(slot)

    def put_missing(self, divisor: int) -> None:
        """Put what the backward pass left out: the gradient of earlier passes, or zeros."""
        for slot in tuple(self.missing):
            self.put(slot, divisor)


def make_buckets(
    module: nn.Module, cap_bytes: int, empty: Callable[[int, torch.dtype, torch.device], Tensor]
) -> list[Bucket]:
    """Return buckets for the parameters that require a gradient, in memory from ``empty(numel, dtype, device)``."""
    trained = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
    trained.reverse()
    kinds = [(parameter.dtype, parameter.device) for _, parameter in trained]
    groups = assign([parameter.nbytes for _, parameter in trained], kinds, cap_bytes, FIRST_BUCKET_BYTES)
    buckets = []
    for index, group in enumerate(groups):
        numel = sum(trained[i][1].numel() for i in group)
        buckets.append(Bucket(index, empty(numel, *kinds[group[0]]), dict(trained[i] for i in group)))
    return buckets


def layout(tensor: Tensor) -> tuple[int, ...] | None:
    """Return the strides of a tensor's place in a bucket, 0 for dimensions of size 1; None if it is contiguous there.

    A place has the tensor's own layout where that fills the memory exactly.
    """
    if tensor.is_contiguous() or not _is_dense(tensor):
        return None
    return tuple(0 if size == 1 else stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def shaped(place: Tensor, parameter: Tensor) -> Tensor:
    """Return ``place``, 1-d and as long as the parameter, in the parameter's shape and, if it is dense, its strides."""
    if _is_dense(parameter):
        return place.as_strided(parameter.shape, parameter.stride())
    return place.view(parameter.shape)


def _is_dense(tensor: Tensor) -> bool:
    """Whether the strides lead to every element once, in some order of the dimensions (channels_last does)."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return tensor.numel() > 0
