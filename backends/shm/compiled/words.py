"""Memory that Python and a kernel share."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence


class Words:
    """Words that a kernel knows by their address; they have to live as long as it runs."""

    def __init__(self, words: Sequence[int]) -> None:
        self._memory = (ctypes.c_int64 * len(words))(*words)
        self.view = memoryview(self._memory).cast("B").cast("q")
        self.address = ctypes.addressof(self._memory)
