"""Batch normalisation over the batches of all ranks, as if one process had them as one batch.

Source: Ioffe and Szegedy, "Batch normalization" (2015); the statistics of all ranks are combined as in Chan, Golub and
LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances" (1979), which does not cancel.

Nomenclature: per channel, rank r has n_r elements with mean m_r and sum of squared deviations s_r; N, m and s are
those of all ranks together:  m = sum n_r m_r / N,  s = sum (s_r + n_r (m_r - m)^2).  Batches may differ in size.

Cost: per layer one all-gather of 2 C + 1 numbers in forward and one all-reduce of 2 C in backward, for C channels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm, _LazyNormBase

from minidist.communicator import Communicator
from minidist.contract.opaque import opaque


class SyncBatchNorm(_BatchNorm):
    """`torch.nn.BatchNorm1d` to ``3d`` with the statistics of all ranks' batches while training.

    Every rank's forward and backward communicate, in the order of the layers; so all ranks have to run the same layers.
    In evaluation mode, with running statistics, nothing is communicated.

    Args:
        num_features, eps, momentum, affine, track_running_stats: see `torch.nn.BatchNorm1d`.
        comm: whose ranks' batches are normalised together.

    Raises (forward):
        ValueError: the input has fewer than two dimensions, or all ranks together one element per channel.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        comm: Communicator,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats)
        self.comm = comm

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"SyncBatchNorm: the input must have 2 dimensions or more, got {input.dim()}")

    def forward(self, input: Tensor) -> Tensor:
        """Normalise ``input``, (N, C) or (N, C, ...), over all of its dimensions but the second, on all ranks."""
        self._check_input_dim(input)
        if not self.training:
            return super().forward(input)
        output, mean, variance, count = _normalise(input, self.weight, self.bias, self.eps, self.comm)
        if self.track_running_stats:
            self._update_running_stats(mean, variance, count)
        return output

    @torch.no_grad()
    def _update_running_stats(self, mean: Tensor, variance: Tensor, count: Tensor) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        factor = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        unbiased = variance * (count / (count - 1))
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), factor)
        self.running_var.lerp_(unbiased.to(self.running_var.dtype), factor)


def convert_sync_batchnorm(module: nn.Module, comm: Communicator) -> nn.Module:
    """Return ``module`` with every batch normalisation in it, torch's `SyncBatchNorm` too, made one over ``comm``.

    As in torch the layers are replaced in place, with the same parameters and buffers; what is returned is ``module``
    itself, unless it is such a layer. Do it before you make the optimizer and the wrapper. With ``comm.split(0)`` the
    layers have a communicator of their own, and need not wait for gradients that are on their way.

    Raises:
        ValueError: a layer is lazy and has no channels yet, or does more than to normalise.
    """
    return _convert(module, comm, {})


def _convert(module: nn.Module, comm: Communicator, done: dict[nn.Module, nn.Module]) -> nn.Module:
    if module not in done:
        done[module] = _converted(module, comm) if isinstance(module, _BatchNorm) else module
        for name, child in module._modules.items():  # all of them: named_children() leaves out a layer's second place
            if child is not None:
                module._modules[name] = _convert(child, comm, done)
    return done[module]


def _converted(layer: _BatchNorm, comm: Communicator) -> SyncBatchNorm:
    if isinstance(layer, _LazyNormBase):
        raise ValueError(f"convert_sync_batchnorm: a {type(layer).__name__} is lazy; run one batch through it first")
    known = (_BatchNorm.forward, nn.SyncBatchNorm.forward, SyncBatchNorm.forward)
    if layer._modules or "forward" in vars(layer) or type(layer).forward not in known:
        raise ValueError(
            f"convert_sync_batchnorm: {type(layer).__name__} has a forward or modules of its own, which would be lost; "
            "replace it by a torch.nn.BatchNorm and what it does besides"
        )
    new = SyncBatchNorm.__new__(SyncBatchNorm)
    not_kept = ("process_group", "_compiled_call_impl")  # the second, of layer.compile(), calls the old layer
    new.__dict__.update({name: value for name, value in vars(layer).items() if name not in not_kept})
    new.comm = comm
    return new


@opaque
def _normalise(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, comm: Communicator
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _Normalise.apply(input, weight, bias, eps, comm)  # type: ignore[no-any-return]


class _Normalise(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, comm: Communicator
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        mean, variance, count = _statistics(input, comm)
        shape = _per_channel(input)
        inverse = (variance + eps).rsqrt()
        normal = (input - mean.view(shape)) * inverse.view(shape)
        ctx.save_for_backward(normal.to(input.dtype), inverse, weight, count)
        ctx.comm = comm
        ctx.has_bias = bias is not None
        ctx.mark_non_differentiable(mean, variance, count)
        output = normal if weight is None else normal * weight.view(shape)
        output = output if bias is None else output + bias.view(shape)
        return output.to(input.dtype), mean, variance, count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient of the sum of all ranks' losses; those of weight and bias are this rank's part of it."""
        normal, inverse, weight, count = ctx.saved_tensors
        grad = grads[0]
        dims = _all_but_channels(grad)
        shape = _per_channel(grad)
        wide = grad.to(inverse.dtype)
        grad_bias = wide.sum(dims)
        grad_weight = (wide * normal).sum(dims)
        sums = torch.stack([grad_bias, grad_weight])
        ctx.comm.all_reduce(sums)
        mean_grad, mean_product = (sums / count).unbind()
        scale = inverse if weight is None else inverse * weight
        grad_input = (wide - mean_grad.view(shape) - normal * mean_product.view(shape)) * scale.view(shape)
        return (
            grad_input.to(grad.dtype),
            None if weight is None else grad_weight.to(weight.dtype),
            grad_bias.to(grad.dtype if weight is None else weight.dtype) if ctx.has_bias else None,
            None,
            None,
        )


def _statistics(input: Tensor, comm: Communicator) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean, biased variance, both (C,), and the number of elements per channel, over all ranks."""
    wide = input.double() if input.dtype == torch.float64 else input.float()
    dims = _all_but_channels(input)
    channels = input.shape[1]
    num = input.numel() // channels
    variance, mean = torch.var_mean(wide, dims, correction=0) if num else wide.new_zeros((2, channels)).unbind()
    mine = torch.cat([mean, variance * num, wide.new_tensor([num])])
    everybody = mine.new_empty((comm.world_size, mine.numel()))
    comm.all_gather(everybody, mine)
    means, deviations, nums = torch.split(everybody, [channels, channels, 1], dim=1)
    count = nums.sum()
    if count <= 1:
        raise ValueError(f"SyncBatchNorm: expected more than 1 value per channel when training, got {count:.0f}")
    mean = (means * nums).sum(0) / count
    deviation = (deviations + nums * (means - mean) ** 2).sum(0)
    return mean, deviation / count, count


def _all_but_channels(tensor: Tensor) -> list[int]:
    return [dim for dim in range(tensor.dim()) if dim != 1]


def _per_channel(tensor: Tensor) -> list[int]:
    return [1, -1] + [1] * (tensor.dim() - 2)
