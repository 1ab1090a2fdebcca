"""Gradients of matrices as products of two thin ones: PowerSGD.

Vogels, Karimireddy and Jaggi, "PowerSGD: Practical Low-Rank Gradient Compression for Distributed Optimization" (2019),
algorithm 1. A gradient M of n rows and m columns travels as P and Q of r columns each, by two all-reduces::

    P = sum over ranks of M Q, made orthonormal       Q is that of the pass before, so that it follows the gradients
    Q = sum over ranks of M^T P
    M ~ P Q^T

which is one step of a power iteration on the mean gradient: products with it are linear, so they can be added up.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from minidist.communicator import Communicator, Work
from minidist.compression.compressor import Compressor, State, draws, kept_on
from minidist.gradients.buckets import Bucket


class PowerSGD(Compressor):
    """Sum gradients of matrices in low rank; what has one dimension, or would gain too little, travels as it is.

    Use it with `ErrorFeedback`. All ranks compute P, Q and their product alike.

    Args:
        rank: columns of P and Q, at least 1.
        min_compression_rate: a matrix is sent whole unless that is more than so many times the bytes of its P and Q; 0
            sends none whole.
        seed: of the first Q.
    """

    def __init__(self, rank: int = 2, min_compression_rate: float = 2.0, seed: int = 0) -> None:
        super().__init__()
        if not isinstance(rank, int) or rank < 1:
            raise ValueError(f"PowerSGD: rank must be a whole number of at least 1, got {rank}")
        if not min_compression_rate >= 0:
            raise ValueError(f"PowerSGD: min_compression_rate must be at least 0, got {min_compression_rate}")
        self.rank = rank
        self.min_compression_rate = min_compression_rate
        self.seed = seed

    def start(self, bucket: Bucket, values: Tensor, state: State, comm: Communicator) -> Work:
        dtype = values.dtype if values.dtype.itemsize >= 4 else torch.float32  # torch's QR knows no narrower one
        parts = self._split(bucket, values)
        matrices = [matrix.to(dtype) for matrix in parts.matrices]
        qs = map(_orthonormal, parts.thin(self._last_q(bucket, parts, state, dtype), 1))
        rest = _flat(parts.rest, values.to(dtype))
        self.lay_by(bucket, rest)
        first = _flat((*(matrix @ q for matrix, q in zip(matrices, qs, strict=True)), rest), rest)

        def go_on() -> None:
            ps = [_orthonormal(p) for p in parts.thin(first, 0)]
            state["q"] = second = _flat((m.T @ p for m, p in zip(matrices, ps, strict=True)), rest)
            if matrices:
                comm.all_reduce(second)
            for matrix, p, q in zip(parts.matrices, ps, parts.thin(second, 1), strict=True):
                matrix.copy_(p @ q.T)
            _fill(parts.rest, first[parts.thin_numel(0) :])
            for q in parts.thin(second, 1):
                self._revive(q, bucket)

        return comm.all_reduce(first, async_op=comm.overlaps).then(go_on)

    def sent(self, bucket: Bucket, values: Tensor, state: State, comm: Communicator) -> Tensor:
        """Return an equal part of the products, as nobody can tell whose they are, and this rank's own of the rest."""
        sent = values / comm.world_size
        _fill(self._split(bucket, sent).rest, self.laid_by(bucket))
        return sent

    def _split(self, bucket: Bucket, values: Tensor) -> _Parts:
        """Return what travels in low rank, and what does not, as views of ``values``."""
        matrices: list[Tensor] = []
        rest: list[Tensor] = []
        for place in _places(bucket, values):
            (matrices if place.dim() == 2 and self._gains(*place.shape) else rest).append(place)
        return _Parts(matrices, rest, [min(self.rank, *matrix.shape) for matrix in matrices])

    def _gains(self, rows: int, columns: int) -> bool:
        return (rows + columns) * min(self.rank, rows, columns) * self.min_compression_rate < rows * columns

    def _last_q(self, bucket: Bucket, parts: _Parts, state: State, dtype: torch.dtype) -> Tensor:
        """Return all Q of the pass before; in the first one random numbers, the same on all ranks."""
        device = bucket.flat.device
        last = kept_on(state, "q", device)
        if last is not None:
            return last
        return self._random(parts.thin_numel(1), bucket, dtype)

    def _random(self, numel: int, bucket: Bucket, dtype: torch.dtype) -> Tensor:
        device = bucket.flat.device
        return torch.randn(numel, dtype=dtype, device=device, generator=draws(device, self.seed, bucket.index))

    def _revive(self, q: Tensor, bucket: Bucket) -> None:
        """Draw columns anew that are 0, or not finite: a gradient that is 0 in one pass would stay so for good.

        All ranks do so alike, as they have the same sums.
        """
        dead = ~q.isfinite().all(0) | (q == 0).all(0)
        if dead.any():
            q[:, dead] = self._random(q.numel(), bucket, q.dtype).view_as(q)[:, dead]


class _Parts(NamedTuple):
    """The gradients of a bucket.

    Attributes:
        matrices: what travels in low rank.
        rest: what does not.
        ranks: the columns of the thin matrices of each.
    """

    matrices: list[Tensor]
    rest: list[Tensor]
    ranks: list[int]

    def thin(self, flat: Tensor, side: int) -> list[Tensor]:
        """Return the thin matrices that lie in ``flat`` one after the other: all P (side 0) or all Q (side 1)."""
        shapes = [(matrix.shape[side], rank) for matrix, rank in zip(self.matrices, self.ranks, strict=True)]
        pieces = torch.split(flat[: self.thin_numel(side)], [length * rank for length, rank in shapes])
        return [piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)]

    def thin_numel(self, side: int) -> int:
        """Return the numbers of all P (side 0) or all Q (side 1)."""
        return sum(matrix.shape[side] * rank for matrix, rank in zip(self.matrices, self.ranks, strict=True))


def _places(bucket: Bucket, values: Tensor) -> Iterator[Tensor]:
    """Yield each parameter's part of ``values``: a matrix with its outputs as rows, or what has one dimension."""
    numels = [parameter.numel() * (2 if parameter.is_complex() else 1) for parameter in bucket.parameters]
    for parameter, part in zip(bucket.parameters, torch.split(values[: sum(numels)], numels), strict=True):
        yield part.view(len(parameter), -1) if parameter.dim() > 1 and part.numel() > 0 else part


def _flat(tensors: Iterable[Tensor], like: Tensor) -> Tensor:
    """Return all the numbers one after the other, in memory of their own, in the dtype and on the device of another."""
    return torch.cat([like.new_empty(0), *(tensor.reshape(-1).to(like.dtype) for tensor in tensors)])


def _fill(places: Iterable[Tensor], numbers: Tensor) -> None:
    """Write numbers that lie one after the other into their places."""
    places = list(places)
    for place, part in zip(places, torch.split(numbers, [place.numel() for place in places]), strict=True):
        place.copy_(part.view_as(place))


def _orthonormal(matrix: Tensor) -> Tensor:
    """Return an orthonormal basis of the columns, in which numbers that are not finite count as 0."""
    basis: Tensor = torch.linalg.qr(matrix.nan_to_num(0.0, 0.0, 0.0))[0]
    return basis
