"""Weight gradients that are computed where they are sent from, instead of being copied there.

Autograd computes each gradient in fresh memory, which costs its page faults and a copy into the bucket. Of a linear or
an embedding layer, whose weights are most of most models, the gradient is one operation that can write anywhere: here
it writes into the weight's place in its bucket, and ``parameter.grad`` is that place from the start.

It is the same operation as autograd's, so not a bit differs. Where something else may look at the gradient on its way,
or add to it, it is computed and copied as ever: a gradient is there already, the weight is used a second time in the
pass, it has hooks, `torch.autograd.grad` or ``create_graph`` asks, or autocast computes in another dtype.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from minidist.gradients.backward import place_of


def set_direct(module: nn.Module, direct: bool) -> None:
    """Let the layers in ``module`` write their weight gradients directly, or not any more.

    Only of layers whose class is torch's own: one derived from it, or parametrized, may do anything with its weight.
    """
    classes = _DIRECT if direct else {ours: torchs for torchs, ours in _DIRECT.items()}
    for each in module.modules():
        if type(each) in classes:
            each.__class__ = classes[type(each)]


class DirectLinear(nn.Linear):
    """A linear layer that writes its weight gradient into a bucket, if it is in one."""

    def forward(self, input: Tensor) -> Tensor:
        if not _may_be_direct(self.weight, input) or input.dtype != self.weight.dtype or input.dim() < 2:
            return super().forward(input)
        output: Tensor = _Linear.apply(input, self.weight, self.bias)
        return output

    def _get_name(self) -> str:
        return "Linear"


class DirectEmbedding(nn.Embedding):
    """An embedding that writes its weight gradient into a bucket, if it is in one."""

    def forward(self, input: Tensor) -> Tensor:
        if (
            not _may_be_direct(self.weight, input)
            or self.sparse
            or self.scale_grad_by_freq
            or self.max_norm is not None
        ):
            return super().forward(input)
        output: Tensor = _Embedding.apply(input, self.weight, self.padding_idx)
        return output

    def _get_name(self) -> str:
        return "Embedding"


_DIRECT: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: DirectLinear, nn.Embedding: DirectEmbedding}


class _Linear(torch.autograd.Function):
    """``functional.linear``; its gradients are those of autograd's formulas, operation by operation."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: nn.Parameter, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(input, weight)
        ctx.parameter = weight  # itself, and not what a checkpoint may give back for it
        return functional.linear(input, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        input, weight = ctx.saved_tensors
        needs_input, needs_weight, needs_bias = ctx.needs_input_grad
        rows, input_rows = grad.reshape(-1, grad.shape[-1]), input.reshape(-1, input.shape[-1])
        grad_input = rows.mm(weight).reshape(input.shape) if needs_input else None
        grad_bias = rows.sum(0) if needs_bias else None
        if not needs_weight:
            return grad_input, None, grad_bias
        place = place_of(ctx.parameter)
        if place is None:
            return grad_input, rows.t().mm(input_rows), grad_bias
        return grad_input, torch.mm(rows.t(), input_rows, out=place), grad_bias


class _Embedding(torch.autograd.Function):
    """``functional.embedding`` with a dense gradient."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: nn.Parameter, padding_idx: int | None) -> Tensor:
        ctx.save_for_backward(input)
        ctx.parameter = weight
        ctx.padding_idx = -1 if padding_idx is None else padding_idx
        return functional.embedding(input, weight, padding_idx)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None]:
        (input,) = ctx.saved_tensors
        place = place_of(ctx.parameter)
        if place is None:
            num_rows = len(ctx.parameter)
            whole = torch.ops.aten.embedding_backward(grad, input, num_rows, ctx.padding_idx, False, False)
            return None, whole, None
        indices, rows = input.reshape(-1), grad.reshape(-1, grad.shape[-1])
        if ctx.padding_idx >= 0:
            kept = indices != ctx.padding_idx
            indices, rows = indices[kept], rows[kept]
        return None, place.zero_().index_add_(0, indices, rows), None


def _may_be_direct(weight: Tensor, input: Tensor) -> bool:
    """Whether a forward now can be one whose gradient is written directly."""
    return (
        weight.requires_grad
        and torch.is_grad_enabled()
        and weight.is_contiguous()
        and input.is_contiguous()
        and not weight.is_complex()
        and not torch.is_autocast_enabled(weight.device.type)
        and not torch.compiler.is_compiling()
    )
