"""Memory that is kept between calls, because fresh pages cost more than the copy into them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor


class Scratch:
    """Named pieces of memory that grow as they are asked for.

    Args:
        empty: makes memory, as `Communicator.empty` does.
    """

    def __init__(self, empty: Callable[..., Tensor] = torch.empty) -> None:
        self._empty = empty
        self._memory: dict[str, Tensor] = {}
        self._taken: dict[str, Tensor] = {}  # what was taken last, as it is most often taken again

    def take(self, name: str, numel: int, dtype: torch.dtype, device: torch.device | str) -> Tensor:
        """Return ``numel`` elements; the next call with the same ``name`` returns the same memory."""
        last = self._taken.get(name)
        if last is not None and last.numel() == numel and last.dtype == dtype:
            return last
        nbytes = numel * dtype.itemsize
        if name not in self._memory or self._memory[name].numel() < nbytes:
            self._memory[name] = self._empty(nbytes, dtype=torch.uint8, device=device)
        self._taken[name] = taken = self._memory[name][:nbytes].view(dtype)
        return taken

    def copy_of(self, name: str, tensor: Tensor) -> Tensor:
        """Return a flat copy of ``tensor``."""
        return self.take(name, tensor.numel(), tensor.dtype, tensor.device).copy_(tensor.view(-1))

    def pieces(self, name: str, numels: Sequence[int], like: Tensor) -> Iterator[Tensor]:
        """Yield pieces of memory of so many elements each, of the dtype and device of ``like``."""
        if numels:
            memory = self.take(name, sum(numels), like.dtype, like.device)
            yield from (memory,) if len(numels) == 1 else memory.split_with_sizes(list(numels))
