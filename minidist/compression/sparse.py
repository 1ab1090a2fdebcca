"""A few of the gradients: the largest ones, or random ones."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from minidist.communicator import Communicator, Work
from minidist.compression.compressor import Compressor, State, counted, draws
from minidist.gradients.buckets import Bucket


class _Sparse(Compressor):
    """Sends some numbers of a bucket, and lays by their places and what they were."""

    def __init__(self, fraction: float) -> None:
        super().__init__()
        if not 0 < fraction <= 1:
            raise ValueError(f"{type(self).__name__}: fraction must be above 0 and at most 1, got {fraction}")
        self.fraction = float(fraction)

    def sent(self, bucket: Bucket, values: Tensor, state: State, comm: Communicator) -> Tensor:
        places, numbers = self.laid_by(bucket)
        return torch.zeros_like(values).index_copy_(0, places, numbers)

    def _k(self, numel: int) -> int:
        """Return how many of so many numbers are sent, at least one if there is one."""
        return min(numel, max(1, math.floor(self.fraction * numel + 0.5)))


class TopK(_Sparse):
    """Each rank sends the largest of its gradients by their absolute value, with their places.

    Aji and Heafield, "Sparse Communication for Distributed Gradient Descent" (2017). All ranks gather what all have
    sent, 4 bytes for a place and those of a number, which at n ranks gains while fraction * n is small. Needs
    `ErrorFeedback`, or small gradients never count.

    Args:
        fraction: of each bucket, above 0 and at most 1.
    """

    def __init__(self, fraction: float = 0.01) -> None:
        super().__init__(fraction)

    def start(self, bucket: Bucket, values: Tensor, state: State, comm: Communicator) -> Work:
        k = self._k(len(values))
        places = values.abs().topk(k, sorted=False).indices
        numbers = values[places]
        self.lay_by(bucket, (places, numbers))
        packed = torch.cat([places.int().view(torch.uint8), numbers.view(torch.uint8)])
        everywhere = packed.new_empty(comm.world_size, len(packed))

        def add_up() -> None:
            values.zero_()
            for row in everywhere:  # one rank after the other, so that the bits are the same everywhere
                # Copies, as memory can be seen as another dtype only from a multiple of its size on.
                places = row[: 4 * k].clone().view(torch.int32)
                numbers = row[4 * k :].clone().view(values.dtype)
                values.index_add_(0, places, numbers)

        return comm.all_gather(everywhere, packed, async_op=comm.overlaps).then(add_up)


class RandomK(_Sparse):
    """All ranks send the same random places of their gradients, so that no place travels and numbers add up.

    Stich et al., "Sparsified SGD with Memory" (2018); Konečný et al., "Federated Learning: Strategies for Improving
    Communication Efficiency" (2016), random masks.

    Args:
        fraction: of each bucket, above 0 and at most 1.
        unbiased: whether to scale what is sent by 1 / fraction, so that the mean is right; not with `ErrorFeedback`.
        seed: of the places; the same on all ranks.
    """

    def __init__(self, fraction: float = 0.01, unbiased: bool = True, seed: int = 0) -> None:
        super().__init__(fraction)
        self.unbiased = unbiased
        self.seed = seed

    def start(self, bucket: Bucket, values: Tensor, state: State, comm: Communicator) -> Work:
        k = self._k(len(values))
        generator = draws(values.device, self.seed, bucket.index, counted(state))
        places = torch.randperm(len(values), generator=generator, device=values.device)[:k]
        numbers = values[places] + (values * 0).sum()  # an overflow is seen, wherever it is
        if self.unbiased:
            numbers *= len(values) / max(k, 1)
        self.lay_by(bucket, (places, numbers))
        total = numbers.clone()

        def put() -> None:
            values.zero_().index_copy_(0, places, total)

        return comm.all_reduce(total, async_op=comm.overlaps).then(put)
