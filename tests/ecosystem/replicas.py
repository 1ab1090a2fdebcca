"""What each program of this folder checks at its end."""

from __future__ import annotations

import hashlib
import os
import sys

import torch
import torch.distributed as dist
from torch import Tensor, nn


def digest(module: nn.Module) -> str:
    """Return a name for the bits of all parameters."""
    tensors = [parameter.detach().contiguous().view(-1).view(torch.uint8) for parameter in module.parameters()]
    return hashlib.sha256(torch.cat(tensors).numpy().tobytes()).hexdigest()[:16]


def check(module: nn.Module, before: str) -> None:
    """Check that the model was trained, and to the same parameters by all ranks; say so, and what they ran on."""
    mine = digest(module)
    assert mine != before, "the parameters are what they were"
    found: list[Tensor] = [torch.zeros(16, dtype=torch.uint8) for _ in range(dist.get_world_size())]
    dist.all_gather(found, torch.frombuffer(bytearray(mine.encode()), dtype=torch.uint8))
    assert len(found) == int(os.environ["WORLD_SIZE"]) > 1
    assert {bytes(other.tolist()).decode() for other in found} == {mine}, "the replicas have drifted"
    backend = type(dist.group.WORLD._get_backend(torch.device("cpu"))).__name__
    sys.stdout.write(f"replicas {mine} on {backend}\n")
