"""Threads that are inside of a C++ library when the interpreter ends.

Before Python 3.14 a thread that comes back to an interpreter that is ending is unwound by force, through the frames of
the library, which C++ answers with std::terminate: a program that has done its work ends by SIGABRT. From 3.14 on such
a thread hangs, and ends with the process. Here it hangs in all versions: just before the interpreter ends, what still
waits in a library gets a signal whose handler is the C function ``pause``.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import os
import signal
import sys
import threading
import weakref

_threads: weakref.WeakSet[threading.Thread] = weakref.WeakSet()


def waits_in_library(thread: threading.Thread) -> threading.Thread:
    """Return a thread that waits inside of a library, maybe still when the interpreter ends."""
    _threads.add(thread)
    return thread


def _hang() -> None:
    """Keep those that wait now from coming back. None of them has the GIL, as this thread has it."""
    left = [thread.ident for thread in _threads if thread.is_alive() and thread.ident is not None]
    if not left or sys.version_info >= (3, 14) or not hasattr(signal, "SIGRTMAX"):
        return
    libc = ctypes.CDLL(None)
    libc.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
    libc.signal(signal.SIGRTMAX, ctypes.cast(libc.pause, ctypes.c_void_p))
    for ident in left:
        with contextlib.suppress(OSError):  # it has just ended
            signal.pthread_kill(ident, signal.SIGRTMAX)


# Registered when this is imported, so it runs after what users of it have registered, and what they end by themselves.
atexit.register(_hang)
os.register_at_fork(after_in_child=_threads.clear)
