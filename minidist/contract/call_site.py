"""Where in the user's code an operation was called: the last frame outside of minidist, its backends and torch."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from concurrent import futures
from pathlib import Path
from types import CodeType, FrameType
from typing import NamedTuple

import torch

_ROOT = Path(__file__).parent.parent.parent
_TORCH = str(Path(torch.__file__).parent) + os.sep
_BACKWARD = {_TORCH + "_tensor.py", _TORCH + str(Path("autograd", "__init__.py"))}
_HANDLERS = str(Path(__file__).with_name("records.py"))
_PREFIXES = (
    *(str(_ROOT / package) + os.sep for package in ("minidist", "backends")),
    _TORCH,
    threading.__file__,  # beneath all that a thread of a library runs
    futures.thread.__file__,
    contextlib.__file__,  # and between a library's context manager and whoever uses it
)


class _Libraries(dict[str, bool]):
    """Whether a file is one of a library, so that each is looked at once."""

    def __missing__(self, file: str) -> bool:
        self[file] = file.startswith(_PREFIXES)
        return self[file]


is_library = _Libraries()
"""By file: a cache, and the same for all communicators of the process."""
Spot = tuple[CodeType, int]
"""A place in code, cheap to note: the code, and how far into it. It keeps no frame alive, and so no variable."""


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
        file = self.file
        with contextlib.suppress(FileNotFoundError):  # whoever removed this directory is not the one who asks
            file = file.removeprefix(os.getcwd() + os.sep)
        return f"{file}:{self.line}"


def call_site() -> CallSite | None:
    """Return where the user's code is in this thread; None where it is not, as in a library's."""
    return _user_site(sys._getframe(1))


def user_frame(frame: FrameType | None) -> FrameType | None:
    """Return the innermost frame of the user's beneath this one, which may be it."""
    while frame is not None and is_library[frame.f_code.co_filename]:
        frame = frame.f_back
    return frame


def site_of(spot: Spot) -> CallSite:
    """Return the line of a spot."""
    code, at = spot
    lines = (line for first, last, line in code.co_lines() if first <= at < last and line is not None)
    return _site(code, next(lines, code.co_firstlineno))


def doing(frame: FrameType | None) -> tuple[CallSite | None, str]:
    """Return where the user's code is in a thread whose innermost frame this is, and what of a library's it is in.

    That is ``backward`` anywhere inside of a backward pass, else what the user's line has called; empty if nothing.
    """
    inside = ""
    while frame is not None and is_library[frame.f_code.co_filename]:
        code = frame.f_code
        if code.co_name == "backward" and code.co_filename in _BACKWARD:
            return _user_site(frame), "backward"
        if code.co_filename == _HANDLERS:
            inside = ""  # nothing that the user has called, nor has what it calls
        elif not code.co_name.startswith("_"):
            inside = code.co_name
        frame = frame.f_back
    return _user_site(frame), inside


def _user_site(frame: FrameType | None) -> CallSite | None:
    frame = user_frame(frame)
    return None if frame is None else _site(frame.f_code, frame.f_lineno)


def _site(code: CodeType, line: int) -> CallSite:
    return CallSite(code.co_filename, line, code.co_qualname, code.co_firstlineno)


def uncaught() -> BaseException | None:
    """Return what ends this program, if it is an error that nobody has caught."""
    error: BaseException | None = vars(sys).get("last_value")  # set when the interpreter has printed it
    return error
