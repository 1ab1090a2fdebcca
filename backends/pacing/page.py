"""Memory that all ranks of a communicator on one host see, whether they are threads or processes."""

from __future__ import annotations

import mmap
import os
import tempfile
import weakref
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from minidist.communicator import Communicator

IN_MEMORY = Path("/dev/shm")
"""Where files are memory, if it is there; elsewhere what is written to them goes to a disk after a while."""


class Page:
    """So many words of 8 bytes, 0 at first. All ranks make it, and nothing of it is left when the last one is gone.

    Args:
        comm: of its ranks, which are on one host.
        num_words: how many.

    Attributes:
        words: as integers; another view of them is another type.
        file: this rank's own open file, whose lock keeps out all other ranks, threads too.
    """

    def __init__(self, comm: Communicator, num_words: int) -> None:
        if comm.rank == 0:
            self.file, name = tempfile.mkstemp(prefix="minidist-", dir=IN_MEMORY if IN_MEMORY.is_dir() else None)
            weakref.finalize(self, os.close, self.file)
            try:
                os.truncate(self.file, 8 * num_words)
                comm.broadcast_object(name, 0)
                comm.barrier()
            finally:
                os.unlink(name)  # all have it open, or nobody will
        else:
            self.file = os.open(comm.broadcast_object(None, 0), os.O_RDWR)
            weakref.finalize(self, os.close, self.file)
            comm.barrier()
        self.words: NDArray[np.int64] = np.frombuffer(mmap.mmap(self.file, 8 * num_words), np.int64)
