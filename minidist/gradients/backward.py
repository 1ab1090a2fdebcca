"""When a backward pass begins and ends, and which gradients it brings: what autograd tells, and what it does not."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Mapping, Sequence
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from minidist.contract.opaque import opaque
from minidist.gradients.buckets import Bucket

USE_HOOK = "give what does it to register_reduced_grad_hook() of the wrapper instead"


class BackwardPass:
    """Calls ``on_end()`` once, in the thread of ``backward()``, when a pass has brought all its gradients.

    Attributes:
        running: whether a pass has begun and not ended; an exception in a pass leaves it so until `end`.
        communicates: whether the next pass, or the running one, reduces its gradients.
    """

    def __init__(self, on_end: Callable[[], None], buckets: Sequence[Bucket]) -> None:
        self._on_end = weakref.WeakMethod(on_end)
        named = [zip(bucket.names, bucket.parameters, strict=True) for bucket in buckets]
        self._named = list(itertools.chain.from_iterable(named))
        self._versions: list[int] = []
        self._due: weakref.WeakSet[Callable[[Tensor], None]] = weakref.WeakSet()
        self.running = False
        self.communicates = True

    @property
    def broke_off(self) -> bool:
        """Whether a pass began and ended in an exception. False inside of a pass, as where a checkpoint recomputes."""
        return self.running and torch._C._current_graph_task_id() == -1

    @opaque
    def watch(self, output: Any, communicates: bool) -> None:
        """Let the first gradient of a tensor in ``output`` (a tensor, or a nest of dicts, lists, tuples) begin a pass.

        A parameter's hook can be too deep for that: in a re-entrant checkpoint it runs in a backward pass of its own,
        which ends long before the whole one does.

        Args:
            output: of a forward.
            communicates: whether its pass reduces the gradients. That pass does so too if another forward that does
                not want it, such as one in ``no_sync()``, comes before it.
        """

        def begin(_: Tensor) -> None:
            self.begin()

        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor) and leaf.grad_fn is not None:
                leaf.register_hook(begin)  # type: ignore[no-untyped-call]
        if communicates:
            self._due.add(begin)  # forgotten with the graph, which holds it: a forward may stay without a backward
        self.communicates = communicates or len(self._due) > 0

    @opaque
    def begin(self) -> None:
        """Begin the pass if it has not begun. Call it on each gradient: not every output can be watched."""
        if not self.running:
            self.running = True
            self._versions = [parameter._version for _, parameter in self._named]
            torch.autograd.Variable._execution_engine.queue_callback(self._ended)

    @opaque
    def _ended(self) -> None:
        """Tell the wrapper that the pass has brought all its gradients, if it still lives."""
        if (on_end := self._on_end()) is not None:
            on_end()

    @property
    def has_changed(self) -> bool:
        """Whether a parameter was changed since the pass began, as by an optimizer in a hook."""
        return self.running and self._versions != [parameter._version for _, parameter in self._named]

    def changed(self) -> str:
        """Return the names of the parameters that were changed."""
        rows = zip(self._named, self._versions, strict=True)
        return ", ".join(name for (name, parameter), version in rows if parameter._version != version)

    def end(self, reduced: bool) -> None:
        """Be ready for the next pass; ``reduced``: this one reduced its gradients, so none is due any more."""
        self.running = False
        if reduced:
            self._due.clear()


class Listener:
    """What is registered on a parameter: calls ``method(bucket, slot)`` once its gradient is written.

    The method's object is not kept alive: the parameters outlive what wraps their module, which can be wrapped again.
    """

    def __init__(self, method: Callable[[Bucket, int], None], bucket: Bucket, slot: int) -> None:
        self._method = weakref.WeakMethod(method)
        self._bucket = bucket
        self._slot = slot
        parameter = bucket.parameters[slot]
        for other in [key for key, hook in _hooks(parameter).items() if isinstance(hook, Listener)]:
            del _hooks(parameter)[other]  # of an earlier wrapper: two of them would both reduce the gradient
        self._key = parameter.register_post_accumulate_grad_hook(self).id  # type: ignore[no-untyped-call]

    @opaque
    def __call__(self, _: Tensor) -> None:
        """Hand the gradient over, if its wrapper still lives."""
        if (method := self._method()) is not None:
            method(self._bucket, self._slot)

    @property
    def listening(self) -> object | None:
        """The object whose method is called, if it still lives."""
        method = self._method()
        return method.__self__ if isinstance(method, MethodType) else None

    def claim(self) -> Tensor | None:
        """Return the place of the gradient, if its wrapper lives and nobody else computes in it in this pass."""
        return None if self._method() is None else self._bucket.claim(self._slot)

    def complaint(self, parameter: nn.Parameter) -> str | None:
        """Return what is wrong with the hooks of the parameter, if this is not its only one."""
        hooks = _hooks(parameter)
        if self._key not in hooks:
            return (
                "sends its gradient to a wrapper that was made after this one, of the same module or of one that "
                "shares it; use that wrapper, or wrap one module that holds both"
            )
        if len(hooks) > 1:
            return (
                f"has a post-accumulate-grad hook, which sees gradients before they are reduced over ranks; {USE_HOOK}"
            )
        return None


def _hooks(parameter: Tensor) -> dict[int, Any]:
    return parameter._post_accumulate_grad_hooks or {}


def listener_of(parameter: Tensor) -> object | None:
    """Return the wrapper that a parameter sends its gradients to, if there is one."""
    own = [hook.listening for hook in _hooks(parameter).values() if isinstance(hook, Listener)]
    return own[0] if own else None


def place_of(parameter: Tensor) -> Tensor | None:
    """Return where this backward pass can compute the parameter's gradient, if that is in its bucket.

    Not where something is there already or may be added, or looks at the gradient before it comes to its wrapper.
    """
    own = [hook for hook in _hooks(parameter).values() if isinstance(hook, Listener)]
    if not own or parameter.grad is not None or parameter._backward_hooks or torch.is_grad_enabled():
        return None
    return own[0].claim() if _will_accumulate(parameter) else None


def _will_accumulate(parameter: Tensor) -> bool:
    """Whether this pass will write ``parameter.grad``: `torch.autograd.grad` does not."""
    node = torch.autograd.graph.get_gradient_edge(parameter).node
    try:
        return bool(torch._C._will_engine_execute_node(node))
    except RuntimeError:  # torch.autograd.grad() of this very parameter
        return False


def listen(buckets: Sequence[Bucket], method: Callable[[Bucket, int], None]) -> list[Listener]:
    """Call ``method(bucket, slot)`` whenever a backward pass has written the gradient of a parameter."""
    return [Listener(method, bucket, slot) for bucket in buckets for slot in range(len(bucket.parameters))]


def call_hooks(hooks: Mapping[int, Callable[[nn.Parameter], None]], buckets: Sequence[Bucket]) -> None:
    """Call every hook with each parameter that has a gradient."""
    for parameter in [parameter for bucket in buckets for parameter in bucket.parameters]:
        for hook in list(hooks.values()):
            if parameter.grad is not None:
                hook(parameter)
