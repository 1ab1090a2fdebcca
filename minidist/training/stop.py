"""A request to stop: SIGTERM, which a scheduler sends some time before it kills."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Self

from minidist.contract.forks import only_here
from minidist.contract.records import write_soon


class StopSignal:
    """Notes SIGTERM, where it would otherwise end the process, for as long as it is entered.

    The first one is noted, and has what was recorded written (`minidist.contract.records`); a second one does what it
    did before. Python delivers signals to the main thread only; entered in another one, it notes nothing.

    Attributes:
        received: whether one came since it was entered.
    """

    def __init__(self) -> None:
        self.received = False
        self._previous = signal.getsignal(signal.SIGTERM)
        self._write_soon = only_here(write_soon)

    def __enter__(self) -> Self:
        self.received = False
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        self._restore()

    def _note(self, signum: int, frame: FrameType | None) -> None:
        # No more than that: a handler runs between any two lines, and communication there would not fit in.
        self.received = True
        self._restore()
        self._write_soon("SIGTERM")

    def _restore(self) -> None:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._previous)
