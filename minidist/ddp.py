"""Data-parallel training: every rank has the model, sees its own part of the batch, and takes the same step.

The path of one gradient: ``loss.backward()`` adds it to ``parameter.grad``; the parameter's hook divides it by the
world size and puts it into its bucket; the last gradient of a bucket starts the bucket's all-reduce, which runs while
backward goes on; at the end of backward all of them are waited for, and ``parameter.grad``, a view of the bucket,
holds the mean over the ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch import nn

from minidist.backward import BackwardPass, listen
from minidist.buckets import Bucket, make_buckets
from minidist.communicator import Communicator, Work
from minidist.hooks import AllReduce, Hook
from minidist.join import Join
from minidist.replicas import broadcast_tensors, make_replicas, share_used


class DistributedDataParallel(nn.Module):
    """Wraps ``module`` so that after ``backward()`` every rank holds the mean of all ranks' gradients.

    All ranks make it, and call it, in step: construction compares the models and gives every rank the values of
    rank 0; each backward pass of a forward outside `no_sync` communicates. Gradients are views of the buckets: keep
    a copy, not a reference, of one that has to survive the next backward pass. Set ``requires_grad`` before wrapping.
    After an exception in backward the next forward starts clean, provided that every rank goes on with it.

    Args:
        module: the model, on its device.
        comm: how the ranks talk.
        bucket_cap_mb: a bucket of gradients is sent once it holds this much (2**20 bytes).
        broadcast_buffers: give every rank rank 0's buffers before each forward in training mode that will communicate.
        find_unused_parameters: allow a backward pass to leave out parameters, not the same ones on every rank; costs
            one more small all-reduce per pass. A gradient stays None where no rank used the parameter.
        hook: what happens to a full bucket; see `minidist.hooks`.

    Raises:
        MismatchError: on every rank, if the models or the arguments differ between ranks.
        ValueError: ``bucket_cap_mb`` is not positive.
        RuntimeError: no parameter requires a gradient. From ``backward()``: a parameter got no gradient, a sparse one,
            or two in one pass.
    """

    def __init__(
        self,
        module: nn.Module,
        comm: Communicator,
        bucket_cap_mb: float = 25,
        broadcast_buffers: bool = True,
        find_unused_parameters: bool = False,
        hook: Hook = AllReduce(),  # noqa: B008  (an AllReduce has no state)
    ) -> None:
        super().__init__()
        self.module, self.comm, self.hook = module, comm, hook
        self.broadcast_buffers, self.find_unused_parameters = broadcast_buffers, find_unused_parameters
        if not bucket_cap_mb > 0:
            raise ValueError(f"{comm.who('DistributedDataParallel')}: bucket_cap_mb must be > 0, got {bucket_cap_mb}")
        make_replicas(comm, module, (bucket_cap_mb, broadcast_buffers, find_unused_parameters))
        self.buckets = make_buckets(module, int(bucket_cap_mb * 2**20), comm.empty)
        if not self.buckets:
            self._fail("no parameter requires a gradient; use the module without this wrapper")
        self._works: list[Work] = []
        self._sync_wanted = self._sync = True
        self._join: Join | None = None
        self._backward_pass = BackwardPass(self._on_backward_end)
        listen(self.buckets, self._on_gradient)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module; what it returns is returned unchanged."""
        if self._backward_pass.broke_off:  # as on the other ranks, that may have got further in it
            self.reduce_gradients()
        will_sync = self._sync_wanted and torch.is_grad_enabled()
        src = 0 if self._join is None else self._join.announce(will_sync)
        if will_sync and self.training:
            self.sync_buffers(src)
        output = self.module(*args, **kwargs)
        if torch.is_grad_enabled():
            self._sync = will_sync
            self._backward_pass.watch(output)
        return output

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Let gradients add up on this rank: the backward of a forward inside does not communicate."""
        before, self._sync_wanted = self._sync_wanted, False
        try:
            yield
        finally:
            self._sync_wanted = before

    @contextmanager
    def join(self) -> Iterator[None]:
        """Allow ranks to have different numbers of batches inside; see `minidist.join`."""
        self._join = join = Join(self)
        try:
            yield
        finally:
            self._join = None
        join.follow()

    def sync_buffers(self, src: int = 0) -> None:
        """Give every rank the buffers of rank ``src``, if ``broadcast_buffers``; for instance before an evaluation."""
        if self.broadcast_buffers:
            broadcast_tensors(self.comm, list(self.module.buffers()), src)

    def reduce_gradients(self) -> None:
        """Communicate what this backward pass has not yet, with zeros for what is missing, and wait for all of it.

        Backward ends with it. Call it yourself only where the other ranks have a backward pass and this one has none.
        """
        for bucket in self.buckets:
            bucket.put_missing(self.comm.world_size)
        self._start_full_buckets()
        if self.find_unused_parameters:
            self._works.append(share_used(self.comm, self.buckets))
        for work in self._works:
            work.wait()
        self._reset()

    def _on_gradient(self, bucket: Bucket, slot: int) -> None:
        if not self._sync:
            return
        self._backward_pass.begin()
        if complaint := bucket.complaint(slot):
            self._fail(complaint)
        bucket.put(slot, self.comm.world_size)
        self._start_full_buckets()

    def _start_full_buckets(self) -> None:
        """Start what can start, in the order of the buckets: it has to be the same on every rank."""
        for bucket in self.buckets[len(self._works) :]:
            if bucket.missing:
                break
            self._works.append(self.hook(bucket, self.comm))

    def _on_backward_end(self) -> None:
        missing = [bucket.names[slot] for bucket in self.buckets for slot in bucket.missing]
        nothing_came = len(missing) == sum(len(bucket.names) for bucket in self.buckets)
        if nothing_came and not (self._sync and self.find_unused_parameters):
            self._reset()  # torch.autograd.grad() gets here too
        elif missing and not self.find_unused_parameters:
            fix = "use find_unused_parameters=True, or set requires_grad=False before wrapping"
            self._fail(f"no gradient for {', '.join(missing)}; {fix}")
        else:
            self.reduce_gradients()

    def _reset(self) -> None:
        self._works = []
        self._backward_pass.end()
        for bucket in self.buckets:
            bucket.reset()

    def _fail(self, message: str) -> NoReturn:
        raise RuntimeError(f"{self.comm.who('DistributedDataParallel')}: {message}")
