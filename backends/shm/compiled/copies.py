"""Copies between ranks, which cost what the caches of two cores make of them.

To write into a line that is in another core's cache is slow: on an EPYC whose two cores share no cache it went at
2.3 GB/s, however it was prefetched. Two ways are fast. To *stream* the line, past the caches, went at 27, and the other
core then read it as fast as before: so ranks write into the stage. And a line that this core has just read it may write
at once: so an all-reduce in place writes into the memory of the others.
"""

from __future__ import annotations

from backends.shm.compiled.machine import LINE_BYTES, copy_bytes, copy_line, end_streams, inner, stream_line


@inner
def copy(target: int, source: int, nbytes: int) -> None:
    """Copy bytes for this rank; the places do not overlap."""
    whole = nbytes // LINE_BYTES * LINE_BYTES
    for start in range(0, whole, LINE_BYTES):
        copy_line(target + start, source + start)
    copy_bytes(target + whole, source + whole, nbytes - whole)


@inner
def stream(target: int, source: int, nbytes: int) -> None:
    """Copy bytes for another rank."""
    if target % LINE_BYTES != 0:
        copy_bytes(target, source, nbytes)
        return
    whole = nbytes // LINE_BYTES * LINE_BYTES
    for start in range(0, whole, LINE_BYTES):
        stream_line(target + start, source + start)
    copy_bytes(target + whole, source + whole, nbytes - whole)
    end_streams()
