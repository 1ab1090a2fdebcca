"""An optimizer whose work and state are shared out: each rank steps its share of the parameters, all get the result.

ZeRO, stage 1 (Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models", 2020). Data
parallelism as it is has every rank reduce all gradients and take the same step; here ::

    backward      reduce-scatter of each bucket       a rank gets the mean gradients of its share, and only those
    step          the optimizer on the share          1/n of the arithmetic, and 1/n of momenta and the like
    after it      all-gather of the parameters        every rank has all of them for the next forward

For a model of M bytes on n ranks that sends as much as the all-reduce, 2(n-1) M in all: an all-reduce is these two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NoReturn

import torch
from torch import Tensor, nn, optim
from torch.optim import Optimizer

from minidist.communicator import Communicator
from minidist.ddp import DistributedDataParallel
from minidist.gradients.backward import listener_of
from minidist.gradients.fused import can_fuse, fused_steps
from minidist.gradients.hooks import AllReduce, ReduceScatter
from minidist.gradients.sharded_state import consolidated, cut
from minidist.gradients.sharding import Sharding

ELEMENTWISE = (
    optim.SGD,
    optim.Adam,
    optim.AdamW,
    optim.NAdam,
    optim.RAdam,
    optim.RMSprop,
    optim.Adagrad,
    optim.Adadelta,
    optim.Adamax,
    optim.ASGD,
)
"""What computes each element from that element's gradient and state alone, so that it can be given any part."""
_NOT_OPTIONS = ("params", "param_names")


class ShardedOptimizer(Optimizer):
    """Steps the parameters of a wrapped model as ``optimizer_class`` would, each rank its share of them.

    Make it after the `DistributedDataParallel` whose parameters it gets, and before the first backward pass. It finds
    the wrapper by them, moves their values and gradients into memory of ``comm``, and has the wrapper reduce-scatter
    its buckets. All ranks call `step`, `clip_grad_norm_` and `state_dict` together.

    After ``backward()`` no parameter has a gradient: the mean is in the shares, and ``parameter.grad`` is None, but for
    what `no_sync` adds up. So `torch.nn.utils.clip_grad_norm_` finds nothing; use this one's. Call this one's
    `zero_grad` before each backward pass that communicates. A trained parameter that is in no group is not stepped by
    anybody.

    With ``fused=True`` over `backends.shm` and its compiled kernels, SGD, Adam and AdamW on float32 reduce, step and
    gather in one pass, all of it in `step`.

    Args:
        params: parameters of one wrapper, or groups of them, as for any optimizer.
        optimizer_class: one of `ELEMENTWISE`, or derived from one that is.
        comm: the wrapper's communicator.
        options: what ``optimizer_class`` takes besides.

    Attributes:
        inner: the optimizer of this rank's pieces. The options of its groups are overwritten by those of
            ``param_groups``, which are what learning rate schedulers change.

    Raises:
        TypeError: the class steps more than single elements.
        ValueError: the parameters are not those of one wrapper over ``comm``; or a wrong option.
        RuntimeError: the wrapper has a hook, or gradients, that need the mean of all. From ``step()``: a parameter's
            memory was replaced. From ``backward()``: the gradients of the pass before are still there.
    """

    def __init__(
        self,
        params: Iterable[Any],
        optimizer_class: type[Optimizer],
        comm: Communicator,
        **options: Any,
    ) -> None:
        ensure_elementwise(optimizer_class)
        self.comm = comm
        self._is_made = False
        self.inner: Optimizer = optimizer_class([{"params": []}], **options)
        self.inner.param_groups.clear()  # it was there to find the defaults
        super().__init__(params, self.inner.defaults)
        wrapper = self._wrapper()
        self._sharding = Sharding(wrapper.buckets, comm)
        buckets = self._sharding.buckets
        self._reduce_scatter = ReduceScatter([bucket.gradient for bucket in buckets])
        wrapper.register_reduced_grad_hook(self._take)
        wrapper.hook = self._reduce_scatter
        for group in self.param_groups:
            self._add_pieces(group)
        fuses = all(comm.fuses_steps(bucket.values.dtype) for bucket in buckets)
        if fuses and can_fuse(self.inner):
            self._reduce_scatter.waits = True
            wrapper.divisor = 1
        self._is_made = True

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters of the wrapper that were in no group."""
        super().add_param_group(param_group)
        if self._is_made:
            try:
                self._add_pieces(self.param_groups[-1])
            except ValueError:
                del self.param_groups[-1]
                raise

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Step this rank's share, then get the others'. Collective."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._ensure_in_place()
        for group, inner_group in zip(self.param_groups, self.inner.param_groups, strict=True):
            inner_group.update(_options(group))
        if self._reduce_scatter.all_wait and can_fuse(self.inner):
            self._step_fused()
        else:
            self._reduce_scatter.reduce(self.comm)
            self.inner.step()
            self._sharding.gather()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget all gradients: the reduced ones, and what this rank has added up."""
        if not set_to_none:
            self._fail("zero_grad: set_to_none=False would keep gradients of zero, which are in no parameter here")
        super().zero_grad()
        self.inner.zero_grad()
        self._reduce_scatter.let_go()
        self._reduce_scatter.in_use = False

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Scale the reduced gradients down to the global norm ``max_norm``; return the norm that they had. Collective.

        As `torch.nn.utils.clip_grad_norm_` on the means of all parameters in the groups, but for the rounding of the
        norm.
        """
        self._reduce_scatter.reduce(self.comm)
        pieces = [tensor for group in self.inner.param_groups for tensor in group["params"]]
        gradients = [tensor.grad for tensor in pieces if tensor.grad is not None]
        own = torch.nn.utils.get_total_norm(gradients)
        square = own.to(self._device, torch.float64).square().reshape(1)
        self.comm.all_reduce(square)
        norm = square.sqrt()[0].to(own.dtype)
        torch.nn.utils.clip_grads_with_norm_(pieces, max_norm, norm)
        return norm

    def state_dict(self) -> dict[str, Any]:
        """Return what ``optimizer_class`` over whole parameters would, on every rank. Collective."""
        self.state.update(consolidated(self._sharding, self.inner.state, self.comm))
        try:
            return super().state_dict()
        finally:
            self.state.clear()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a state of this class, on any number of ranks, or of ``optimizer_class`` over whole parameters."""
        super().load_state_dict(state_dict)
        packed = self.inner.state_dict()
        tensors = [tensor for group in self.inner.param_groups for tensor in group["params"]]
        numbers = {id(tensor): number for number, tensor in enumerate(tensors)}
        packed["state"] = {
            numbers[id(piece.values)]: cut(self.state[parameter], parameter, piece.part)
            for parameter, piece in self._sharding.pieces.items()
            if piece is not None and parameter in self.state
        }
        self.state.clear()
        for group, packed_group in zip(self.param_groups, packed["param_groups"], strict=True):
            packed_group.update(_options(group))
        self.inner.load_state_dict(packed)

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError(f"{self.comm.who('ShardedOptimizer')}: cannot be copied or pickled; use its state_dict()")

    def _wrapper(self) -> DistributedDataParallel:
        """Return the wrapper of the parameters, if it can be sharded."""
        trained = [p for group in self.param_groups for p in group["params"] if p.requires_grad]
        wrapper = next(map(listener_of, trained), None)
        if not isinstance(wrapper, DistributedDataParallel):
            self._refuse("the parameters are not those of a wrapped model; wrap it in DistributedDataParallel first")
        if wrapper.comm is not self.comm:
            self._refuse(f"the model is wrapped over another communicator, {wrapper.comm}; give the wrapper's comm")
        for problem in self._problems(wrapper):
            self._fail(problem)
        known = {id(parameter) for bucket in wrapper.buckets for parameter in bucket.parameters}
        self._ensure_known(trained, known)
        return wrapper

    def _problems(self, wrapper: DistributedDataParallel) -> Iterator[str]:
        if isinstance(wrapper.hook, ReduceScatter):
            yield "the wrapper has another ShardedOptimizer; give all parameters to one of them, in groups"
        if type(wrapper.hook) is not AllReduce:
            kind = getattr(wrapper.hook, "__name__", type(wrapper.hook).__name__)
            yield f"the wrapper's hook is {kind}, which reduces whole buckets; wrap with hook=AllReduce(), the default"
        if wrapper.has_reduced_grad_hooks:
            yield (
                "the wrapper has a hook from register_reduced_grad_hook, and no parameter will have its mean; remove "
                "it, and use register_step_pre_hook and clip_grad_norm_ of the optimizer"
            )
        if any(parameter.grad is not None for bucket in wrapper.buckets for parameter in bucket.parameters):
            yield "parameters have gradients already; make the optimizer before the first backward pass"

    def _ensure_known(self, trained: Iterable[nn.Parameter], known: Iterable[int]) -> None:
        for parameter in trained:
            if id(parameter) not in known:
                self._refuse(
                    f"a parameter of shape {tuple(parameter.shape)} is not one of the wrapper's; give those of the "
                    "module that was wrapped, as in ddp.parameters()"
                )

    def _add_pieces(self, group: dict[str, Any]) -> None:
        """Let the inner optimizer step this rank's part of a group."""
        trained = [parameter for parameter in group["params"] if parameter.requires_grad]
        self._ensure_known(trained, {id(parameter) for parameter in self._sharding.pieces})
        pieces = [piece.values for piece in map(self._sharding.pieces.__getitem__, trained) if piece is not None]
        self.inner.add_param_group({**_options(group), "params": pieces})

    def _step_fused(self) -> None:
        """Reduce, step and gather in one pass of the backend."""
        for step in fused_steps(self.inner, self._sharding, self.comm.world_size):
            self.comm.fused_step(step)
        self._sharding.note_changes()

    def _take(self, parameter: nn.Parameter) -> None:
        """Take a gradient that was reduced, at the end of the backward pass."""
        self._reduce_scatter.in_use = True
        piece = self._sharding.pieces[parameter]
        if piece is not None:
            piece.values.grad = piece.gradient
        parameter.grad = None

    def _ensure_in_place(self) -> None:
        if (name := self._sharding.moved()) is not None:
            self._fail(
                f"step: parameter {name} was given other memory since this was made (by .data, to() or the like); "
                "change values in place, as load_state_dict() does"
            )

    @property
    def _device(self) -> torch.device:
        return self._sharding.buckets[0].values.device

    def _refuse(self, why: str) -> NoReturn:
        raise ValueError(f"{self.comm.who('ShardedOptimizer')}: {why}")

    def _fail(self, why: str) -> NoReturn:
        raise RuntimeError(f"{self.comm.who('ShardedOptimizer')}: {why}")


def ensure_elementwise(optimizer_class: type[Optimizer]) -> None:
    """Raise TypeError unless the class can step a part of a parameter."""
    if not (isinstance(optimizer_class, type) and issubclass(optimizer_class, ELEMENTWISE)):
        name = getattr(optimizer_class, "__name__", str(optimizer_class))
        choices = ", ".join(kind.__name__ for kind in ELEMENTWISE)
        raise TypeError(
            f"ShardedOptimizer: {name} is not known to compute each element by itself, and a rank has only a part of a "
            f"parameter; use one of {choices}, or one derived from them"
        )


def _options(group: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name not in _NOT_OPTIONS}
