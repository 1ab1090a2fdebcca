"""When a backward pass begins and ends, and which gradients it brings: what autograd tells, and what it does not."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from minidist.buckets import Bucket


class BackwardPass:
    """Calls ``on_end()`` once, in the thread of ``backward()``, when a pass has brought all its gradients.

    Attributes:
        running: whether a pass has begun and not ended; an exception in a pass leaves it so until `end`.
    """

    def __init__(self, on_end: Callable[[], None]) -> None:
        self._on_end = weakref.WeakMethod(on_end)
        self.running = False

    @property
    def broke_off(self) -> bool:
        """Whether a pass began and ended in an exception. False inside of a pass, as where a checkpoint recomputes."""
        return self.running and torch._C._current_graph_task_id() == -1

    def watch(self, output: Any) -> None:
        """Let the first gradient of a tensor in ``output`` (a tensor, or a nest of dicts, lists, tuples) begin a pass.

        A parameter's hook can be too deep for that: in a re-entrant checkpoint it runs in a backward pass of its own,
        which ends long before the whole one does.
        """
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor) and leaf.grad_fn is not None:
                leaf.register_hook(lambda _: self.begin())  # type: ignore[no-untyped-call]

    def begin(self) -> None:
        """Begin the pass if it has not begun. Call it on each gradient: not every output can be watched."""
        if not self.running:
            self.running = True
            torch.autograd.Variable._execution_engine.queue_callback(partial(_call, self._on_end))

    def end(self) -> None:
        """Be ready for the next pass."""
        self.running = False


def listen(buckets: Sequence[Bucket], method: Callable[[Bucket, int], None]) -> None:
    """Call ``method(bucket, slot)`` whenever a backward pass has written the gradient of a parameter.

    The method's object is not kept alive: the parameters outlive what wraps their module, which can be wrapped again.
    """
    for bucket in buckets:
        for slot, parameter in enumerate(bucket.parameters):
            call = partial(_call, weakref.WeakMethod(method), bucket, slot)
            parameter.register_post_accumulate_grad_hook(_ignoring_argument(call))  # type: ignore[no-untyped-call]


def _ignoring_argument(call: Callable[[], None]) -> Callable[[Tensor], None]:
    return lambda _: call()


def _call(method: weakref.WeakMethod[Callable[..., None]], *args: object) -> None:
    if (bound := method()) is not None:
        bound(*args)
