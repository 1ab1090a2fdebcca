"""How torch.distributed learns of the backend, and what it calls to make a process group's."""

from __future__ import annotations

import functools
import os
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch._C._distributed_c10d import Backend
from torch.distributed import distributed_c10d as c10d

from minidist.c10d.backend import MinidistBackend
from minidist.c10d.choice import Choice, made
from minidist.c10d.meeting import find_place
from minidist.communicator import Communicator
from minidist.contract.records import RecordsOnSignal

NAME = "minidist"
VARIABLE = "MINIDIST_COMM"


def register(name: str = NAME) -> None:
    """Make ``init_process_group(name)`` use minidist, in place of what had that name.

    Torch calls it for ``minidist`` itself, by the entry point.
    """
    # Without a type it is CUSTOM: to keep that of another backend makes C++ take it for one.
    dist.Backend.register_backend(name, _Creator(name), extended_api=True, devices=["cpu", "cuda"])


class _Creator:
    """What torch calls to make the backend of a group."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._on_signal: RecordsOnSignal | None = None

    def __call__(self, given: Any, options: Any) -> MinidistBackend:
        choice = None if isinstance(options, Backend.Options) else options
        backend = self._make(given.store, given.group_rank, given.group_size, given.timeout, choice)
        recorder = backend.comm.recorder
        recorder.name = f"group {given.group_id}"
        recorder.ranks = tuple(given.global_ranks_in_group) or recorder.ranks  # none of the default group
        if recorder.folder and self._on_signal is None:
            self._on_signal = RecordsOnSignal()
            self._on_signal.start()
        return backend

    def _make(
        self, store: dist.Store, rank: int, world_size: int, timeout: timedelta, choice: Choice | None
    ) -> MinidistBackend:
        choice = choice or os.environ.get(VARIABLE) or _of_default_group()
        timeout_s = timeout.total_seconds()
        comm = made(choice, find_place(store, rank, world_size, timeout_s), timeout_s)
        options = Backend.Options(self._name, timeout)
        # A communicator is of its own ranks alone; all else makes one for any group.
        general = None if isinstance(choice, Communicator) else choice
        return MinidistBackend(comm, store, options, functools.partial(self._make_child, general), general)

    def _make_child(
        self, choice: Choice | None, store: dist.Store, rank: int, world_size: int, timeout: timedelta
    ) -> MinidistBackend:
        return self._make(store, rank, world_size, timeout, choice)


def _of_default_group() -> Choice | None:
    """Return what the default group was told to run on: the others run on the same, unless told otherwise."""
    if not dist.is_initialized():
        return None
    group: Any = c10d._get_default_group()
    backend = group._get_backend(next(iter(group._device_types)))
    return backend.choice if isinstance(backend, MinidistBackend) else None
