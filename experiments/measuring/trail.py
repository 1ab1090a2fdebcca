"""Which functions a program goes through: recorded while it runs, in all threads of one rank.

Python tells a profiler of every call. Here it is one that keeps, for calls of the functions of some packages, the
functions of these packages that are on the stack: the *way* to the call. The functions on these ways are the trail::

    with trail.installed():              # before the threads are started that it is to see
        ...
        with trail.recording():
            loss.backward()
    for stop in trail.stops(): ...
"""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

from experiments.measuring.sources import Called, Function, function_of

TRANSFERS = ("._isend", "._irecv")
"""Where a transport begins, which is where the trail ends."""
Way = tuple[Called, ...]


@dataclass(frozen=True)
class Stop:
    """A function that was entered.

    Attributes:
        function: which.
        depth: how many functions of the trail it was called through.
    """

    function: Function
    depth: int


class Trail:
    """The functions of ``packages`` that one rank enters while it is recorded.

    Ranks that are threads of one process are told apart by the names of their threads, which end with ``rank<rank>``.
    """

    def __init__(self, *packages: ModuleType) -> None:
        self._roots = tuple(f"{Path(str(package.__file__)).parent}/" for package in packages)
        self._base: FrameType | None = None  # the one that records; None while nothing does
        self._rank = 0
        self._threads: set[int] = set()
        # Without values: a dict, unlike a set, keeps the order. The ways of the thread that records, then the others'.
        self._ways: tuple[dict[Way, None], dict[Way, None]] = {}, {}

    @contextmanager
    def installed(self) -> Iterator[None]:
        """See this thread, and the threads that are started inside."""
        threading.setprofile(self._event)
        sys.setprofile(self._event)
        try:
            yield
        finally:
            sys.setprofile(None)
            threading.setprofile(None)

    @contextmanager
    def recording(self, rank: int = 0) -> Iterator[None]:
        """Record what this thread calls inside, and what the others of ``rank`` do at the same time."""
        self._threads = {threading.get_ident()}
        self._rank = rank
        self._base = sys._getframe(2)  # of whom entered this
        try:
            yield
        finally:
            self._base = None

    def join(self) -> None:
        """See the thread that calls this as well: one of autograd's, as it has for GPUs, is not started by Python."""
        self._threads.add(threading.get_ident())
        sys.setprofile(self._event)

    def stops(self) -> list[Stop]:
        """Return every function once, in the order in which they were first entered.

        What another thread does follows on the function in which it was handed over: the one that the first closure
        among it is written in.
        """
        recorder, others = ([tuple(_functions(way)) for way in _ended(ways)] for ways in self._ways)
        stops = list(_stops(recorder))
        seen = {stop.function for stop in stops}
        beside = [stop for stop in _stops(others) if stop.function not in seen]
        place, depth = _handed_over(stops, beside)
        return [*stops[:place], *(Stop(stop.function, stop.depth + depth) for stop in beside), *stops[place:]]

    def _event(self, frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and self._base is not None and frame.f_code.co_filename.startswith(self._roots):
            by_recorder = threading.get_ident() in self._threads
            # A thread without a rank in its name, as one of a pool, may be this rank's: better one stop too many.
            if by_recorder or not self._is_of_other_rank():
                self._ways[0 if by_recorder else 1].setdefault(self._way(frame))

    def _is_of_other_rank(self) -> bool:
        named = re.search(r"rank(\d+)$", threading.current_thread().name)
        return named is not None and int(named[1]) != self._rank

    def _way(self, frame: FrameType | None) -> Way:
        way = list[Called]()
        while frame is not None and frame is not self._base:
            code = frame.f_code
            frame = frame.f_back
            if code.co_filename.startswith(self._roots):
                way.append(Called(code.co_filename, code.co_firstlineno, code.co_qualname))
        return tuple(reversed(way))


def _ended(ways: dict[Way, None]) -> list[Way]:
    """Return the ways that do not go on inside of a transport: inside of a transfer that hands on to no other one."""
    handing_on = {call for way in ways for call, _ in pairwise(filter(_is_transfer, way))}
    return [way for way in ways if all(call in handing_on for call in way[:-1] if _is_transfer(call))]


def _is_transfer(call: Called) -> bool:
    return call.name.endswith(TRANSFERS)


def _functions(way: Way) -> Iterator[Function]:
    last = None
    for call in way:
        function = function_of(call)
        if function != last:  # a comprehension is a part of its function
            yield function
        last = function


def _stops(ways: Sequence[tuple[Function, ...]]) -> Iterator[Stop]:
    seen = set[Function]()
    for way in ways:
        for depth, function in enumerate(way):  # a caller that was there before the recording comes here first
            if function not in seen:
                seen.add(function)
                yield Stop(function, depth)


def _handed_over(stops: Sequence[Stop], beside: Sequence[Stop]) -> tuple[int, int]:
    """Return at which place among ``stops``, and how deep, those of other threads belong."""
    makers = {stop.function.around for stop in beside}
    for index, maker in enumerate(stops):
        if maker.function in makers:
            later = range(index + 1, len(stops))
            return next((i for i in later if stops[i].depth <= maker.depth), len(stops)), maker.depth + 1
    return len(stops), 0
