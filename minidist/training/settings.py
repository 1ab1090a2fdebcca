"""What an engine can be asked for, checked before it trains."""

from __future__ import annotations

import torch


def check_settings(
    accumulation_steps: int, log_every: int, max_grad_norm: float | None, autocast_dtype: torch.dtype | None
) -> None:
    """Raise ValueError for what `minidist.engine.Engine` cannot do."""
    for name, value in (("accumulation_steps", accumulation_steps), ("log_every", log_every)):
        if value < 1:
            raise ValueError(f"Engine: {name} must be at least 1, got {value}")
    if max_grad_norm is not None and not max_grad_norm > 0:
        raise ValueError(
            f"Engine: max_grad_norm must be greater than 0, got {max_grad_norm}; None leaves gradients alone"
        )
    if autocast_dtype is torch.float16:
        raise ValueError(
            "Engine: autocast_dtype float16 needs loss scaling, or small gradients vanish; use torch.bfloat16"
        )
