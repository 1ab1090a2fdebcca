"""The double binary tree, pipelined: two trees, each for half of the tensor, so that no rank idles as a leaf of both.

Source: Sanders, Speck and Traeff, "Two-tree algorithms for full bandwidth broadcast, reduction and scan" (2009).

Nomenclature: the first tree is a binary tree in order of the ranks, so that odd ranks (counted from 1) are its
leaves; the second is its mirror image for an even number of ranks and the same shifted by one for an odd number, so
that a rank is an inner node of at most one of them. The tensor is cut into 2 K chunks; the even ones take the first
tree, the odd ones the second. *Up* they are reduced to the root, *down* they are broadcast from it. A chunk goes up
one level per step, the next one right behind it.

Cost for M bytes: 2 (K + depth) steps, depth about log2 n, each of up to M/K bytes through a rank in each direction: 2
M (1 + depth/K) in all, close to twice M for many chunks; 2 M is what a ring takes on many ranks, which needs 2 n
steps.

The two trees on 6 ranks::

            3                     2
        1       5             0       4
      0   2   4                 1   3   5
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

from backends.schedules.doubling import power_of_two
from minidist.schedule import Recv, Reduce, Send, Step, Transfer, num_chunks

CHUNKS_PER_TREE = 8


@num_chunks(2 * CHUNKS_PER_TREE)
def double_tree_all_reduce(rank: int, world_size: int) -> Iterator[Step]:
    """Reduce all chunks up both trees, then send them down; a chunk crosses an edge at the same time on both ends."""
    edges = [edge for edge in _both_trees(world_size) if rank in (edge.child, edge.parent)]
    height = max((edge.depth for edge in _both_trees(world_size)), default=0)

    def moves(up: bool, time: int) -> Iterator[Transfer]:
        for tree, child, parent, depth in edges:
            number = time - (height - depth if up else depth - 1)
            if 0 <= number < CHUNKS_PER_TREE:
                chunk = 2 * number + tree
                if up:
                    yield Send(parent, chunk) if rank == child else Reduce(child, chunk)
                else:
                    yield Recv(parent, chunk) if rank == child else Send(child, chunk)

    for up in (True, False):
        for time in range(height + CHUNKS_PER_TREE - 1):
            yield tuple(moves(up, time))


class _Edge(NamedTuple):
    tree: int
    child: int
    parent: int
    depth: int  # of the child; the root has depth 0


@lru_cache(maxsize=8)
def _both_trees(world_size: int) -> tuple[_Edge, ...]:
    first = range(world_size)
    second = first[::-1] if world_size % 2 == 0 else [*first[1:], 0]
    return (*_edges(0, first, 1), *_edges(1, second, 1))


def _edges(tree: int, ranks: Sequence[int], depth: int) -> Iterator[_Edge]:
    """Yield the edges of the tree over ``ranks`` in their order; its root stands at a power of two."""
    middle = power_of_two(len(ranks)) - 1 if ranks else 0
    for side in (ranks[:middle], ranks[middle + 1 :]):
        if side:
            yield _Edge(tree, side[power_of_two(len(side)) - 1], ranks[middle], depth)
            yield from _edges(tree, side, depth + 1)
