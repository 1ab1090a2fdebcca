"""Data-parallel training: every rank has the model, sees its own part of the batch, and takes the same step.

The path of one gradient: ``loss.backward()`` adds it to ``parameter.grad``; the parameter's hook divides it by the
world size and puts it into its bucket; the last gradient of a bucket starts the bucket's all-reduce, which runs while
backward goes on; at the end of backward all of them are waited for, and ``parameter.grad``, a view of the bucket,
holds the mean over the ranks.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn, Self

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from minidist.communicator import Communicator, Work
from minidist.contract.opaque import opaque
from minidist.gradients.backward import USE_HOOK, BackwardPass, call_hooks, listen
from minidist.gradients.buckets import Bucket, make_buckets
from minidist.gradients.direct import set_direct
from minidist.gradients.hooks import AllReduce, Hook, ReduceScatter
from minidist.gradients.join import Join
from minidist.gradients.replicas import SharedBuffers, make_replicas, share_used
from minidist.gradients.structure import Structure

_MADE_ANEW = ("buckets", "_works", "_join", "_shared_buffers", "_reduced_grad_hooks", "_backward_pass", "_structure")
"""Attributes that belong to one wrapper and not to a copy of it."""


class DistributedDataParallel(nn.Module):
    """Wraps ``module`` so that after ``backward()`` every rank holds the mean of all ranks' gradients.

    All ranks make it, and call it, in step: construction compares the models and gives every rank the values of
    rank 0; each backward pass of a forward outside `no_sync` communicates. Gradients are views of the buckets: keep
    a copy, not a reference, of one that has to survive the next backward pass. Change the
    module before wrapping: a parameter that is replaced, unfrozen or converted later is an error in the next forward.
    After an exception in backward the next forward starts clean, with no gradients, provided that every rank goes on
    with it. What `torch.autograd.grad` returns is this rank's own.

    Args:
        module: the model, on its device.
        comm: how the ranks talk.
        bucket_cap_mb: a bucket of gradients is sent once it holds this much (2**20 bytes).
        broadcast_buffers: give every rank rank 0's buffers before each forward in training mode that will communicate.
        find_unused_parameters: allow a backward pass to leave out parameters, not the same ones on every rank; costs
            one more small all-reduce per pass. A gradient stays None where no rank used the parameter.
        hook: what happens to a full bucket; see `minidist.gradients.hooks`.
        direct_gradients: let linear and embedding layers compute their weight gradients in the buckets, instead of
            copying them there; their forward is another one then, see `minidist.gradients.direct`.

    Attributes:
        divisor: what gradients are divided by on their way into the buckets; the hook adds up the results.

    Raises:
        MismatchError: on every rank, if the models or the arguments differ between ranks.
        ValueError: on every rank, if ``bucket_cap_mb`` is not positive, or the module has what cannot be trained
            data-parallel (see `minidist.gradients.wrapping`); the message names it.
        RuntimeError: no parameter requires a gradient. From ``forward()``: the module was changed. From ``backward()``:
            a parameter got no gradient, a sparse one, two in one pass, or was changed before its gradient was reduced.
    """

    def __init__(
        self,
        module: nn.Module,
        comm: Communicator,
        bucket_cap_mb: float = 25,
        broadcast_buffers: bool = True,
        find_unused_parameters: bool = False,
        hook: Hook = AllReduce(),  # noqa: B008  (an AllReduce has no state)
        direct_gradients: bool = False,
    ) -> None:
        super().__init__()
        self.module = module
        self.comm = comm
        self.hook = hook
        self.bucket_cap_mb = bucket_cap_mb
        self.broadcast_buffers = broadcast_buffers
        self.find_unused_parameters = find_unused_parameters
        self.direct_gradients = direct_gradients
        arguments = bucket_cap_mb, broadcast_buffers, find_unused_parameters
        make_replicas(comm, module, arguments, DistributedDataParallel)
        self._prepare()

    def _prepare(self) -> None:
        """Make what belongs to this wrapper alone, without communication."""
        self.buckets = make_buckets(self.module, int(self.bucket_cap_mb * 2**20), self.comm.empty)
        if not self.buckets:
            self._fail("no parameter requires a gradient; use the module without this wrapper")
        set_direct(self.module, self.direct_gradients)
        self.divisor = self.comm.world_size
        self._works: list[Work] = []
        self._sync_wanted = True
        self._join: Join | None = None
        self._shared_buffers = SharedBuffers(self.comm, self.module)
        self._reduced_grad_hooks: dict[int, Callable[[nn.Parameter], None]] = OrderedDict()
        self._backward_pass = BackwardPass(self._on_backward_end, self.buckets)
        self._structure = Structure(self.module, self.buckets, listen(self.buckets, self._on_gradient))

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Return a wrapper of a copy of the module, over the same communicator; nothing is communicated."""
        memo[id(self)] = other = self.__new__(type(self))
        kept = {name: value for name, value in vars(self).items() if name not in _MADE_ANEW}
        other.__dict__.update(copy.deepcopy(kept, memo))
        other._prepare()
        return other

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError(
            f"{self.comm.who('DistributedDataParallel')}: cannot be pickled; use ddp.module, or its state_dict()"
        )

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module; what it returns is returned unchanged."""
        self._before_forward()
        output = self.module(*args, **kwargs)
        self._after_forward(output)
        return output

    @opaque
    def _before_forward(self) -> None:
        if self._backward_pass.broke_off:  # as on the other ranks, that may have got further in it
            self.reduce_gradients(broke_off=True)
            self.module.zero_grad()  # what was in flight may have come after the user's own zero_grad()
        will_sync = self._sync_wanted and torch.is_grad_enabled()
        if will_sync and (change := self._structure.change(self.module, self.find_unused_parameters)):
            self._fail(change)
        src = 0 if self._join is None else self._join.announce(will_sync)
        if will_sync and self.training:
            self.sync_buffers(src)

    @opaque
    def _after_forward(self, output: Any) -> None:
        if torch.is_grad_enabled():
            self._backward_pass.watch(output, self._sync_wanted)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Let gradients add up on this rank: the backward of a forward inside does not communicate.

        A backward pass through a forward outside as well does.
        """
        before = self._sync_wanted
        self._sync_wanted = False
        try:
            yield
        finally:
            self._sync_wanted = before

    @contextmanager
    def join(self) -> Iterator[None]:
        """Allow ranks to have different numbers of batches inside; see `minidist.gradients.join`."""
        self._refuse_if_sharded("join", "a rank without a batch takes no step; give all ranks equally many batches")
        self._join = join = Join(self)
        try:
            yield
        finally:
            self._join = None
        join.follow()

    def sync_buffers(self, src: int = 0) -> None:
        """Give every rank the buffers of rank ``src``, if ``broadcast_buffers``; for instance before an evaluation."""
        if self.broadcast_buffers:
            self._shared_buffers.send(src)

    def register_reduced_grad_hook(self, hook: Callable[[nn.Parameter], None]) -> RemovableHandle:
        """Call ``hook(parameter)`` for each parameter at the end of a backward pass that communicates.

        Its gradient is then the mean over the ranks, which it is not yet where a hook of torch sees it: this is the
        place for an optimizer per parameter, for statistics, for clipping by value. The hook may set
        ``parameter.grad`` to None. The parameters come in the same order on every rank.
        """
        instead = "no parameter has its mean; use the optimizer's register_step_pre_hook and clip_grad_norm_"
        self._refuse_if_sharded("register_reduced_grad_hook", instead)
        handle = RemovableHandle(self._reduced_grad_hooks)
        self._reduced_grad_hooks[handle.id] = hook
        return handle

    @property
    def has_reduced_grad_hooks(self) -> bool:
        """Whether some hook will see the mean of each gradient."""
        return len(self._reduced_grad_hooks) > 0

    def reduce_gradients(self, broke_off: bool = False) -> None:
        """Communicate what this backward pass has not yet, with zeros for what is missing, and wait for all of it.

        Backward ends with it. Call it yourself only where the other ranks have a backward pass and this one has none.

        Args:
            broke_off: the pass ended in an exception; what it brought is shown to no hook.
        """
        for bucket in self.buckets:
            if bucket.missing:
                bucket.put_missing(self.divisor)
        self._start_full_buckets()
        if self.find_unused_parameters:
            self._works.append(share_used(self.comm, self.buckets))
        for work in self._works:
            work.wait()
        self._end_pass(reduced=True)
        if self._reduced_grad_hooks and not broke_off:
            call_hooks(self._reduced_grad_hooks, self.buckets)

    def _on_gradient(self, bucket: Bucket, slot: int) -> None:
        """Take a gradient that autograd has just written."""
        if not self._backward_pass.communicates:
            return
        self._backward_pass.begin()
        if not bucket.fits(slot):
            self._fail(bucket.complaint(slot))
        bucket.put(slot, self.divisor)
        self._start_full_buckets()

    def _start_full_buckets(self) -> None:
        """Start what can start, in the order of the buckets: it has to be the same on every rank."""
        try:
            while len(self._works) < len(self.buckets) and not (bucket := self.buckets[len(self._works)]).missing:
                self.comm.purpose = bucket.title
                self._works.append(self.hook(bucket, self.comm))
        finally:
            self.comm.purpose = ""

    def _on_backward_end(self) -> None:
        """Reduce what backward brought, unless it left something out, or something behind."""
        if self._backward_pass.has_changed:
            self._fail(
                f"{self._backward_pass.changed()} was changed while backward ran, before its gradient was reduced "
                f"over the ranks; {USE_HOOK}"
            )
        if any(bucket.missing for bucket in self.buckets):
            self._end_incomplete()
        else:
            self.reduce_gradients()

    def _end_incomplete(self) -> None:
        """End a pass that did not bring every gradient."""
        missing = [bucket.names[slot] for bucket in self.buckets for slot in bucket.missing]
        nothing_came = len(missing) == sum(len(bucket.names) for bucket in self.buckets)
        if nothing_came and not (self._backward_pass.communicates and self.find_unused_parameters):
            self._end_pass(reduced=False)  # torch.autograd.grad() gets here too
        elif self.find_unused_parameters:
            self.reduce_gradients()
        else:
            fix = "use find_unused_parameters=True, or set requires_grad=False before wrapping"
            self._fail(f"no gradient for {', '.join(missing)}; {fix}")

    def _end_pass(self, reduced: bool) -> None:
        """Be ready for the next backward pass."""
        self._works = []
        self._backward_pass.end(reduced)
        for bucket in self.buckets:
            bucket.reset()

    def _refuse_if_sharded(self, operation: str, instead: str) -> None:
        if isinstance(self.hook, ReduceScatter):
            raise RuntimeError(f"{self.comm.who(operation)}: with a ShardedOptimizer {instead}")

    def _fail(self, message: str) -> NoReturn:
        raise RuntimeError(f"{self.comm.who('DistributedDataParallel')}: {message}")
