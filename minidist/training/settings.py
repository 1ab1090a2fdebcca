"""What an engine can be asked for, checked before it trains."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from minidist.communicator import Communicator


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


def check_fit(epochs: int, eval_loader: Iterable[Any] | None, comm: Communicator) -> None:
    """Raise ValueError, on every rank, for what `minidist.engine.Engine.fit` cannot do. Collective."""
    if epochs < 1:
        raise ValueError(f"{comm.who('Engine.fit')}: epochs must be at least 1, got {epochs}")
    lengths = comm.all_gather_object(_length(eval_loader))
    if any((length is None) != (lengths[0] is None) for length in lengths):
        given = ", ".join(f"rank {rank} {'none' if length is None else 'one'}" for rank, length in enumerate(lengths))
        raise ValueError(f"{comm.who('Engine.fit')}: give all ranks an eval_loader or none of them; got {given}")
    if all(length == 0 for length in lengths):
        raise ValueError(f"{comm.who('Engine.fit')}: the eval_loader has no batch on any rank; give samples, or None")


def _length(loader: Iterable[Any] | None) -> int | str | None:
    if loader is None:
        return None
    try:
        return len(loader)  # type: ignore[arg-type]  # that is the question
    except TypeError:
        return "unknown"
