"""Where in memory the chunks of a schedule lie, in numbers; what they name stands in `minidist.schedule`."""

from __future__ import annotations

from typing import NamedTuple

from minidist.collective import Run


class Range(NamedTuple):
    """Elements that lie side by side in one of the regions of memory that a collective works on."""

    region: int
    start: int
    numel: int

    @property
    def end(self) -> int:
        """Where it ends."""
        return self.start + self.numel


def layout(run: Run, rank: int, num_chunks: int, numel: int) -> list[Range]:
    """Return the chunks of ``rank``; ``numel`` is that of the tensor where a schedule may cut it, else of a block.

    The regions are the tensor, or the larger one of two; in an all_to_all the input, the output and scratch.
    """
    n = run.world_size
    if run.collective.is_cut:
        return _parts(numel, num_chunks)
    if run.name == "all_to_all":
        places = [divmod(chunk, n) if chunk < 2 * n else (2, chunk - 2 * n) for chunk in range(num_chunks)]
        return [Range(region, block * numel, numel) for region, block in places]
    if run.name in ("gather", "scatter") and rank != run.root:
        return [Range(0, 0, numel)] * num_chunks  # only the own one is there, and a right schedule names no other
    return [Range(0, chunk * numel, numel) for chunk in range(num_chunks)]


def _parts(numel: int, num_chunks: int) -> list[Range]:
    """Cut a tensor into equal parts, the first ones larger by one element where it does not divide."""
    size, rest = divmod(numel, num_chunks)
    return [Range(0, k * size + min(k, rest), size + (k < rest)) for k in range(num_chunks)]
