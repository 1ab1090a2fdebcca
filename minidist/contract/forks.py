"""A process acts only on what it made.

A fork, such as a worker of a DataLoader, has a copy of every object of its parent and none of its threads. The memory,
the connections and the peers behind those objects are still the parent's: garbage that is collected in the fork, or
its exit, must not reach them, and whoever uses them there is told so.
"""

from __future__ import annotations

import ctypes
import gc
import os
import socket
import threading
import weakref
from collections.abc import Callable
from typing import Generic, TypeVar

from minidist.errors import CommError

T = TypeVar("T")
# What was garbage at the fork is the parent's as well: to collect it would run destructors that need its threads.
os.register_at_fork(after_in_child=gc.freeze)


class Living(Generic[T]):
    """The things of one kind that this process made and that still live; a fork begins with none.

    It lives as long as the module that makes it, as nothing that is told of forks can be forgotten again.

    Args:
        in_fork: what a fork does with each thing that it inherits.
    """

    def __init__(self, in_fork: Callable[[T], object] | None = None) -> None:
        self._in_fork = in_fork
        self._things: weakref.WeakSet[T] = weakref.WeakSet()
        self._lock = threading.Lock()
        os.register_at_fork(after_in_child=self._begin_anew)

    def add(self, thing: T) -> T:
        """Add a thing, and return it."""
        with self._lock:
            self._things.add(thing)
        return thing

    def all(self) -> list[T]:
        """Return those that live now."""
        with self._lock:
            return list(self._things)

    def _begin_anew(self) -> None:
        inherited = self._things
        self._things = weakref.WeakSet()
        self._lock = threading.Lock()  # a thread that is not here may have held the other one
        if self._in_fork is not None:
            for thing in list(inherited):
                self._in_fork(thing)


class Maker:
    """The process that made something, and where that thing may be used.

    Args:
        who: how messages begin: the thing, or the rank that it belongs to.

    Attributes:
        is_here: whether this process made it, and is not a fork of the one that did.
    """

    def __init__(self, who: str = "") -> None:
        self._who = who
        self._pid = os.getpid()
        self.is_here = True
        _makers.add(self)

    def leave(self) -> None:
        """Note that this process is a fork."""
        self.is_here = False

    def ensure_here(self, operation: str) -> None:
        """Raise CommError in a fork."""
        if not self.is_here:
            raise CommError(
                f"{self._who}{operation}: this process ({os.getpid()}) was forked from the rank's own "
                f"({self._pid}), which alone can communicate; do it there and hand the fork the result"
            )


# Per process, as forks are: they know of no communicator to ask.
_makers: Living[Maker] = Living(Maker.leave)


def only_here(action: Callable[..., object]) -> Callable[..., None]:
    """Return what does ``action`` in this process and nothing in its forks, which inherit finalizers and exits."""
    maker = Maker()

    def act(*args: object) -> None:
        if maker.is_here:
            action(*args)

    return act


def never_destroy(thing: object) -> None:
    """Keep a thing until the process ends: its destructor would wait for what never comes."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(thing))


_connections: Living[socket.socket] = Living(socket.socket.close)
_with_threads: Living[object] = Living(never_destroy)


def closed_in_forks(connection: socket.socket) -> socket.socket:
    """Return ``connection``, which ends with this process although forks of it live on."""
    return _connections.add(connection)


def kept_in_forks(thing: T) -> T:
    """Return ``thing``, which forks never destroy: its destructor would wait there for threads that they lack."""
    _with_threads.add(thing)
    return thing
