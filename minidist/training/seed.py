"""Random numbers: seeds that differ where they should, and states that can be put back."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

RandomState = dict[str, Any]
"""The state of a process's global generators, of types that ``torch.load(weights_only=True)`` takes."""


def derived_seed(*parts: int) -> int:
    """Return a seed below 2**32 for ``parts``, such as a seed and a rank.

    Unlike their sum it keeps (seed 0, rank 1) and (seed 1, rank 0) apart.
    """
    return int(np.random.SeedSequence(parts).generate_state(1)[0])


def seed_everything(seed: int, rank: int = 0) -> None:
    """Seed Python's, NumPy's and torch's global generators, each rank with a stream of its own.

    Ranks draw different dropout masks and augmentations; that they start from one model is the
    business of `minidist.ddp.DistributedDataParallel`.

    Raises:
        ValueError: ``seed`` is negative.
    """
    if seed < 0:
        raise ValueError(f"seed must be 0 or more, got {seed}")
    own = derived_seed(seed, rank)
    random.seed(own)
    np.random.seed(own)
    torch.manual_seed(own)


def random_state() -> RandomState:
    """Return the state of the global generators, that of the current GPU too once it is in use."""
    numpy = np.random.get_state(legacy=False)
    return {
        "python": random.getstate(),
        "numpy": {**numpy, "state": {"key": numpy["state"]["key"].tolist(), "pos": numpy["state"]["pos"]}},
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,  # type: ignore[no-untyped-call]
    }


def restore_random_state(state: RandomState) -> None:
    """Put back what `random_state` returned, in this process or an earlier one."""
    random.setstate(state["python"])
    position = state["numpy"]["state"]
    np.random.set_state({**state["numpy"], "state": {**position, "key": np.array(position["key"], dtype=np.uint32)}})
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"])
