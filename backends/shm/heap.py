"""Memory that all ranks of a host have mapped: one heap per rank.

A heap is a file in memory that has no name anywhere, so nothing is left behind however its ranks end, the
size of /dev/shm does not matter, and another user cannot open it. It is as long as the machine's memory, but
a page costs nothing until it is reserved, and goes back when the last tensor in it is gone.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import weakref
from collections import deque
from pathlib import Path

import torch
from torch import Tensor

from minidist.contract.forks import only_here
from minidist.errors import BackendUnavailableError, CommError

ALIGNMENT = mmap.PAGESIZE
PADDING = 37 * mmap.PAGESIZE
"""What keeps heaps that are mapped one after the other from lying a multiple of 2**28 apart: an EPYC's first cache then
takes the addresses of one for those of the other, and 1 MB took 86 us instead of 32."""


class Heap:
    """The heap of one rank, as this process has it mapped.

    Attributes:
        memory: all of it, as bytes.
        base: its address in this process.
    """

    def __init__(self, file: int, size: int) -> None:
        self._map = mmap.mmap(file, size)
        self.memory = torch.frombuffer(self._map, dtype=torch.uint8)
        self.base = self.memory.data_ptr()
        self.size = size

    def words(self, start: int, count: int) -> memoryview:
        """Return ``count`` integers of 8 bytes that begin at byte ``start``; each is read and written at once."""
        return memoryview(self._map)[start : start + 8 * count].cast("q")

    def offset_of(self, tensor: Tensor) -> int:
        """Return where the contiguous ``tensor`` begins in this heap; -1 if it is elsewhere."""
        offset = tensor.data_ptr() - self.base
        return offset if 0 <= offset < self.size else -1

    def tensor(self, offset: int, numel: int, dtype: torch.dtype) -> Tensor:
        """Return ``numel`` elements that begin at byte ``offset``; the caller knows that they are in use."""
        return self.memory[offset : offset + numel * dtype.itemsize].view(dtype)


class OwnHeap(Heap):
    """The heap of this rank, from which it takes memory.

    Attributes:
        address: what another process of this host needs to map it; see `attach`.
    """

    def __init__(self) -> None:
        self._file = os.memfd_create("minidist", os.MFD_CLOEXEC)
        self._closing = weakref.finalize(self, only_here(os.close), self._file)
        os.fchmod(self._file, 0o600)
        size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") + PADDING
        try:
            os.ftruncate(self._file, size)
            super().__init__(self._file, size)
        except OSError as error:
            raise BackendUnavailableError(
                f"shm cannot map {size} bytes, as much as this host has ({error}); raise the limits that ulimit -v and "
                "-f show, or use comm=gloo"
            ) from error
        self.address = f"/proc/{os.getpid()}/fd/{self._file}"
        self._free = [(0, size)]  # (start, length), by start, no two of them adjacent
        # Tensors die at any moment, also while `_free` is being changed; what they leave is collected here.
        self._returned: deque[tuple[int, int]] = deque()

    def allocate(self, numel: int, dtype: torch.dtype, purpose: str) -> Tensor:
        """Return a tensor of ``numel`` elements in memory of its own.

        Raises:
            CommError: there is not enough memory.
        """
        if numel == 0:
            return torch.empty(0, dtype=dtype, device="cpu")
        start, length = self.reserve(numel * dtype.itemsize, purpose)
        # The storage of the tensor holds the view, and so do all tensors that share it: the last of them lets it go.
        # The finalizer acts in this process only: a fork has the same file mapped, and a worker of a DataLoader that
        # dropped its copy of the tensor would empty it for the rank. At exit the pages go with the file.
        view = memoryview(self._map)[start : start + numel * dtype.itemsize]
        weakref.finalize(view, only_here(_give_back), self._map, start, length, self._returned).atexit = False
        return torch.frombuffer(view, dtype=dtype)

    def close(self) -> None:
        """Close the file; the mappings stay as long as tensors in them."""
        self._closing()

    def reserve(self, nbytes: int, purpose: str) -> tuple[int, int]:
        """Set ``nbytes`` and what fills the last page aside; return where they begin, and how many.

        Raises:
            CommError: there is not enough memory.
        """
        # In the thread that takes memory: a finalizer may run in any, and in the middle of what is done here.
        while self._returned:
            self._insert(*self._returned.popleft())
        length = -(-nbytes // ALIGNMENT) * ALIGNMENT
        there = available_bytes()
        index = next((i for i, (_, free) in enumerate(self._free) if free >= length), None)
        if index is None or there < length:
            raise CommError(f"{purpose} needs {length} bytes of shared memory, but {there} are available on this host")
        start, free = self._free[index]
        try:  # pages that are missing are an error now; later they would be a signal that kills the process
            os.posix_fallocate(self._file, start, length)
        except OSError as error:
            raise CommError(f"{purpose} cannot get {length} bytes of shared memory: {error}") from error
        self._free[index : index + 1] = [(start + length, free - length)] if free > length else []
        return start, length

    def _insert(self, start: int, length: int) -> None:
        merged: list[tuple[int, int]] = []
        for begin, size in sorted([*self._free, (start, length)]):
            if merged and sum(merged[-1]) == begin:
                merged[-1] = (merged[-1][0], merged[-1][1] + size)
            else:
                merged.append((begin, size))
        self._free = merged


def _give_back(memory: mmap.mmap, start: int, length: int, returned: deque[tuple[int, int]]) -> None:
    # In this order: once it is returned it may be taken again, and would lose what is written into it.
    memory.madvise(mmap.MADV_REMOVE, start, length)
    returned.append((start, length))


def attach(address: str) -> Heap:
    """Map the heap of another process.

    Raises:
        BackendUnavailableError: this process cannot reach it.
    """
    try:
        file = os.open(address, os.O_RDWR | os.O_CLOEXEC)
        try:
            return Heap(file, os.fstat(file).st_size)
        finally:
            os.close(file)
    except (OSError, ValueError) as error:
        raise unreachable(str(error)) from error


def unreachable(why: str) -> BackendUnavailableError:
    """Return the error for a heap that this process cannot map."""
    return BackendUnavailableError(
        f"shm cannot map the memory of another rank ({why}); its ranks have to be processes of one user that see "
        "each other, in one container; use comm=gloo"
    )


def available_bytes() -> int:
    """Return how much memory can still be taken on this host, or in the control group of this process."""
    fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    amounts = [int(fields["MemAvailable"].split()[0]) * 1024]
    group = Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError, ValueError):  # no group, or no limit ("max")
        limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        amounts.append(limit - used + int(stat["inactive_file"]))  # cached files make room
    return max(min(amounts), 0)
