"""Communicators over process groups of torch, for the conformance suite."""

from __future__ import annotations

import torch.distributed as dist

from minidist.c10d import from_process_group
from minidist.communicator import Communicator


def over_gloo() -> Communicator:
    """Return one over a process group of its own, as several may be open at a time."""
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    return from_process_group(dist.new_group())
