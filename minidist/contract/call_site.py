"""Where in the user's code an operation was called: the last frame outside of minidist, its backends and torch."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from pathlib import Path
from typing import NamedTuple

import torch

_ROOT = Path(__file__).parent.parent.parent
_LIBRARIES = (
    *(str(_ROOT / package) + os.sep for package in ("minidist", "backends")),
    str(Path(torch.__file__).parent) + os.sep,
    threading.__file__,  # beneath all that a thread of a library runs
    contextlib.__file__,  # and between a library's context manager and whoever uses it
)
_is_library: dict[str, bool] = {}
"""By file, so that each is looked at once: a cache, and the same for all communicators of the process."""


class CallSite(NamedTuple):
    """A line of code.

    Attributes:
        file: its path, as Python knows it.
        line: its number.
        function: what it is in.
        first_line: where that begins.
    """

    file: str
    line: int
    function: str
    first_line: int

    def __str__(self) -> str:
        here = os.getcwd() + os.sep
        return f"{self.file.removeprefix(here)}:{self.line}"


def call_site() -> CallSite | None:
    """Return where the user's code is in this thread; None where it is not, as in a library's."""
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        name = code.co_filename
        is_library = _is_library.get(name)
        if is_library is None:
            is_library = _is_library[name] = name.startswith(_LIBRARIES)
        if not is_library:
            return CallSite(name, frame.f_lineno, code.co_qualname, code.co_firstlineno)
        frame = frame.f_back  # type: ignore[assignment]  # None at the end
    return None
