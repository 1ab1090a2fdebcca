"""Parameters as vectors: what a method reads, exchanges and writes back.

A fragment is some neighbouring parameters, a piece those of a fragment that have one dtype and device. Where a worker
has several ranks, each of them exchanges a share of every piece with its like in the other workers, and gives the
result to its own: no value crosses between two workers twice ::

    worker 0    rank 0 [ share 0 ]   rank 1 [ share 1 ]
                          |                     |
    worker 1    rank 2 [ share 0 ]   rank 3 [ share 1 ]
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from minidist.communicator import Communicator
from minidist.gradients.buckets import Bucket


class Piece:
    """Some parameters of one dtype and device, one after the other.

    Args:
        index: its place among the pieces.
        fragment: that of its fragment among the fragments.
        named: the parameters.
        worker: the ranks that have them between them; None for this one alone.
    """

    def __init__(
        self, index: int, fragment: int, named: dict[str, nn.Parameter], worker: Communicator | None = None
    ) -> None:
        self.index = index
        self.fragment = fragment
        self.named = named
        self._worker = worker
        rank, num_shares = (0, 1) if worker is None else (worker.rank, worker.world_size)
        numel = -(-sum(parameter.numel() for parameter in named.values()) // num_shares)
        flat = next(iter(named.values())).detach().new_zeros(numel * num_shares)
        self._whole = Bucket(index, flat, named)
        self._share = flat[rank * numel : (rank + 1) * numel]

    @torch.no_grad()
    def read(self) -> Tensor:
        """Return this rank's share of the parameters as they are, 1-d, in memory that the next call overwrites."""
        torch._foreach_copy_(self._whole.views, list[Tensor](self._whole.parameters))
        return self._share

    @torch.no_grad()
    def write(self, share: Tensor) -> None:
        """Give the parameters the values of which every rank of the worker gives its share."""
        self._share.copy_(share)
        if self._worker is not None:
            self._worker.all_gather(self._whole.flat, self._share)
        torch._foreach_copy_(list[Tensor](self._whole.parameters), self._whole.views)

    def bucket(self, comm: Communicator) -> Bucket:
        """Return memory for one share, as a hook takes it; with the parameters in it where that is all of them."""
        memory = comm.empty(self._share.shape, self._share.dtype, self._share.device)
        named = self.named if self._worker is None else {"share": nn.Parameter(memory, requires_grad=False)}
        return Bucket(self.index, memory, named)


def trained(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that are exchanged."""
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def make_pieces(named: dict[str, nn.Parameter], num_fragments: int, worker: Communicator | None = None) -> list[Piece]:
    """Return the pieces of so many fragments, which are about equally large; see `Piece`."""
    fragments = assign_fragments([parameter.numel() for parameter in named.values()], num_fragments)
    groups: dict[tuple[int, torch.dtype, torch.device], dict[str, nn.Parameter]] = defaultdict(dict)
    for (name, parameter), fragment in zip(named.items(), fragments, strict=True):
        groups[fragment, parameter.dtype, parameter.device][name] = parameter
    return [Piece(index, key[0], groups[key], worker) for index, key in enumerate(groups)]


def assign_fragments(sizes: Sequence[int], num_fragments: int) -> list[int]:
    """Return the fragment of each item: in order, none empty, closed once they hold their part of the whole."""
    fragments = []
    fragment = filled = 0
    for index, size in enumerate(sizes):
        fragments.append(fragment)
        filled += size
        others = num_fragments - 1 - fragment
        is_full = filled * num_fragments >= (fragment + 1) * sum(sizes)
        # Each of the other fragments needs at least one of the items that are left.
        if others and (is_full or len(sizes) - index - 1 == others):
            fragment += 1
    return fragments
