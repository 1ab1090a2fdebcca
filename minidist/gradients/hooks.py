"""What happens to a full bucket: all-reduce it, cast it, compress it.

A hook is any callable ``hook(bucket, comm) -> Work``. It finds in ``bucket.flat`` this rank's gradients divided by the
world size, and has to leave their sum over the ranks there once the Work has been waited for. It is called in the
middle of backward, so it should start its communication and return, unless ``comm.overlaps`` says that nothing is
gained by that; `Work.then` holds what is left to do after it.

Every rank calls it for the same buckets in the same order, once per synchronised backward pass. A hook may keep state
per ``bucket.index``, such as the error that a compression left behind; then every wrapped model needs its own::

    class TopK:
        def __init__(self):
            self.errors = {}                  # bucket.index: what was not sent yet

        def __call__(self, bucket, comm): ...
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from minidist.communicator import Communicator, Work
from minidist.contract.work import DONE
from minidist.gradients.buckets import Bucket

Hook = Callable[[Bucket, Communicator], Work]


class AllReduce:
    """Sum the gradients as they are."""

    def __call__(self, bucket: Bucket, comm: Communicator) -> Work:
        return comm.all_reduce(bucket.flat, async_op=comm.overlaps)


class ReduceScatter:
    """Sum the gradients, on each rank its share of the bucket alone; put into place by `minidist.ShardedOptimizer`.

    Args:
        shares: of each bucket, by its index, where this rank wants the mean.

    Attributes:
        waits: whether to leave the gradients in the buckets until `reduce`, for a step that reduces them itself; they
            are not divided yet then.
        in_use: whether there are gradients that the next backward pass would overwrite.
    """

    def __init__(self, shares: Sequence[Tensor]) -> None:
        self.shares = shares
        self.waits = False
        self.in_use = False
        self._waiting: dict[int, Bucket] = {}

    def __call__(self, bucket: Bucket, comm: Communicator) -> Work:
        if self.in_use:
            raise RuntimeError(
                f"{comm.who('ShardedOptimizer')}: the gradients of the backward pass before are still there; call the "
                "optimizer's zero_grad() between two passes, or add up gradients in the wrapper's no_sync()"
            )
        if self.waits:
            bucket.held = True
            self._waiting[bucket.index] = bucket
            return DONE
        return self._start(bucket, comm)

    def _start(self, bucket: Bucket, comm: Communicator) -> Work:
        return comm.reduce_scatter(self.shares[bucket.index], bucket.flat, async_op=comm.overlaps)

    def reduce(self, comm: Communicator) -> None:
        """Reduce what waits; all ranks call it."""
        waiting = self.let_go()
        for work in [self._start(bucket, comm) for bucket in waiting]:
            work.wait()
        for bucket in waiting:
            self.shares[bucket.index].div_(comm.world_size)

    def let_go(self) -> list[Bucket]:
        """Forget what waits, and return it."""
        waiting, self._waiting = list(self._waiting.values()), {}
        for bucket in waiting:
            bucket.held = False
        return waiting

    @property
    def all_wait(self) -> bool:
        """Whether the gradients of every bucket wait to be reduced."""
        return len(self._waiting) == len(self.shares)

    def __deepcopy__(self, memo: dict[int, Any]) -> AllReduce:
        """Return the hook of a wrapper's copy: the sharded optimizer is the original's, and the copy has none."""
        return AllReduce()


class CastHook:
    """Sum the gradients in another dtype: fewer bytes for fewer digits. They are cast back afterwards.

    Args:
        dtype: what they are sent in, a floating-point dtype. Buckets that are no wider are sent as they are.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        if not dtype.is_floating_point:
            raise TypeError(f"CastHook: dtype must be floating point, got {dtype}; use torch.bfloat16 or torch.float16")
        self.dtype = dtype
        # Kept between calls, as fresh pages cost more than the cast; by bucket, so that one hook can serve two models.
        self._memory: WeakKeyDictionary[Bucket, Tensor] = WeakKeyDictionary()

    def __call__(self, bucket: Bucket, comm: Communicator) -> Work:
        # A complex number is cast as two real ones: a cast to a real dtype would drop one of them.
        flat = torch.view_as_real(bucket.flat) if bucket.flat.is_complex() else bucket.flat
        if flat.dtype.itemsize <= self.dtype.itemsize:
            return comm.all_reduce(flat, async_op=comm.overlaps)
        if bucket not in self._memory:
            self._memory[bucket] = comm.empty(flat.shape, self.dtype, flat.device)
        cast = self._memory[bucket].copy_(flat)
        return comm.all_reduce(cast, async_op=comm.overlaps).then(partial(_copy, cast, flat))


def _copy(source: Tensor, target: Tensor) -> None:
    target.copy_(source)


class BFloat16(CastHook):
    """Sum in bfloat16: half the bytes of float32, its range, 8 bits of precision."""

    def __init__(self) -> None:
        super().__init__(torch.bfloat16)


class Float16(CastHook):
    """Sum in float16: half the bytes of float32, 11 bits of precision; beyond 65504 it overflows."""

    def __init__(self) -> None:
        super().__init__(torch.float16)
