"""Fused steps: torch's SGD, Adam and AdamW with ``fused=True``, told to a backend that can take them in one pass.

The state is torch's, by its names, so that a step can also be taken without. The arithmetic is torch's but for its
rounding, as with any fused kernel. The numbers of a row:

    sgd     lr, weight_decay, momentum, 1 for nesterov
    adam    lr / (1 - beta1^t), weight_decay (of Adam), 1 - lr weight_decay (of AdamW), 1 - beta1, beta2, 1 - beta2,
            eps, and the root of 1 - beta2^t, after t steps
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, optim
from torch.optim import Optimizer

from minidist.contract.fused_step import FusedStep, Row
from minidist.gradients.sharding import Sharding

KINDS: dict[type[Optimizer], str] = {optim.SGD: "sgd", optim.Adam: "adam", optim.AdamW: "adam"}
"""By the very class: one derived from it may step in another way."""
_OTHERS = ("maximize", "amsgrad", "capturable", "differentiable", "dampening")
Group = dict[str, Any]


def can_fuse(optimizer: Optimizer) -> bool:
    """Whether a backend could take the optimizer's steps, with the options that it has now."""
    return type(optimizer) in KINDS and all(
        group.get("fused") and not any(group.get(name) for name in _OTHERS) and isinstance(group["lr"], float | int)
        for group in optimizer.param_groups
    )


def fused_steps(optimizer: Optimizer, sharding: Sharding, divisor: int) -> Iterator[FusedStep]:
    """Yield the step of each bucket, and count it in the optimizer's state: they have to be taken."""
    groups = {id(tensor): group for group in optimizer.param_groups for tensor in group["params"]}
    kind = KINDS[type(optimizer)]
    row = _sgd if kind == "sgd" else _adam
    for bucket in sharding.buckets:
        pieces = [piece.values for piece in bucket.pieces if piece is not None and piece.values.grad is not None]
        rows = []
        for values in pieces:
            start = int(values.storage_offset()) - int(bucket.share.storage_offset())
            rows.append(Row(start, values.numel(), *row(optimizer, values, groups[id(values)])))
        yield FusedStep(kind, divisor, bucket.memory, rows)


def _sgd(optimizer: Optimizer, values: Tensor, group: Group) -> tuple[tuple[Tensor, ...], tuple[float, ...]]:
    numbers = group["lr"], group["weight_decay"], group["momentum"], float(group["nesterov"])
    if not group["momentum"]:
        return (), numbers
    state = optimizer.state[values]
    if state.get("momentum_buffer") is None:
        state["momentum_buffer"] = torch.zeros_like(values)
    return (state["momentum_buffer"],), numbers


def _adam(optimizer: Optimizer, values: Tensor, group: Group) -> tuple[tuple[Tensor, ...], tuple[float, ...]]:
    state = optimizer.state[values]
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32)
        state["exp_avg"] = torch.zeros_like(values)
        state["exp_avg_sq"] = torch.zeros_like(values)
    state["step"] += 1
    step = state["step"].item()
    lr, decay, (beta1, beta2) = group["lr"], group["weight_decay"], group["betas"]
    decoupled = isinstance(optimizer, optim.AdamW) or group.get("decoupled_weight_decay", False)
    numbers = (
        lr / (1 - beta1**step),
        0.0 if decoupled else decay,
        1 - lr * decay if decoupled else 1.0,
        1 - beta1,
        beta2,
        1 - beta2,
        group["eps"],
        math.sqrt(1 - beta2**step),
    )
    return (state["exp_avg"], state["exp_avg_sq"]), numbers
