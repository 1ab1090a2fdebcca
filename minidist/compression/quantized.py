"""Dense gradients in few bits, by a reduction in two halves.

Numbers in few bits cannot be added up on their way as an all-reduce does, and to gather those of all ranks would cost
each rank n - 1 times their size. So every rank gets one share of all of them, adds it up in float32, and sends the sum
in few bits again, as in Tang et al., "1-bit Adam" (2021)::

    all-to-all    my share, of all ranks, in few bits    (n - 1) / n of the size
    add           in float32
    all-gather    the sum of each share, in few bits     (n - 1) / n of the size

which is what an all-reduce moves, with each number in fewer bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from minidist.communicator import Communicator, Work
from minidist.compression.compressor import Compressor, State, counted, draws
from minidist.compression.formats import Format
from minidist.gradients.buckets import Bucket


class Quantized(Compressor):
    """Sum the gradients in a `Format`.

    Args:
        format: how numbers travel.
        seed: of the random numbers, where the format rounds by chance; each rank draws others.
    """

    def __init__(self, format: Format, seed: int = 0) -> None:
        super().__init__()
        if not isinstance(format, Format):
            raise TypeError(f"Quantized: format must be a Format, got {type(format).__name__}; use Int8(), say")
        self.format = format
        self.seed = seed

    def start(self, bucket: Bucket, values: Tensor, state: State, comm: Communicator) -> Work:
        n = comm.world_size
        share = self.share(len(values), n)
        generator = draws(values.device, self.seed, comm.rank, bucket.index, counted(state))
        rows = values.new_zeros(n * share, dtype=torch.float32)
        rows[: len(values)] = values
        lengths = (len(values) - torch.arange(n, device=values.device) * share).clamp(0, share)
        codes = self.format.encode(rows.view(n, share), generator, lengths)
        mine = self.format.decode(codes, share)  # what the others will take for mine
        received = torch.empty_like(codes)

        def add_up() -> None:
            total = _sum_in_order(self.format.decode(received, share))
            total[int(lengths[comm.rank]) :] = 0  # what only fills up the share
            sums = self.format.encode(total.view(1, share), generator, lengths[comm.rank : comm.rank + 1])
            everywhere = torch.empty_like(codes)
            comm.all_gather(everywhere, sums)
            result = self.format.decode(everywhere, share)
            # What the second rounding left out of this rank's share nobody else knows: so it counts as not sent by it.
            mine[comm.rank] += result[comm.rank] - total
            values.copy_(result.view(-1)[: len(values)])
            self.lay_by(bucket, mine)

        return comm.all_to_all(received, codes, async_op=comm.overlaps).then(add_up)

    def sent(self, bucket: Bucket, values: Tensor, state: State, comm: Communicator) -> Tensor:
        mine: Tensor = self.laid_by(bucket)
        return mine.view(-1)[: len(values)].to(values.dtype)

    def share(self, numel: int, world_size: int) -> int:
        """Return the numbers of a rank's share: whole blocks."""
        return -(-numel // (world_size * self.format.block)) * self.format.block


def _sum_in_order(rows: Tensor) -> Tensor:
    """Return the sum of the rows, first to last, so that it does not depend on how torch splits the work."""
    total = rows[0].clone()
    for row in rows[1:]:
        total += row
    return total
