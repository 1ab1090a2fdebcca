"""Ranks that compare what they mean to do before anything else moves.

Some transports take it badly when ranks disagree: Gloo ends the process at a message that is longer than its receive
expects. So every rank first gives all others a *row* of one size, with the signature of its call and, where the tensor
is small, with the tensor, which is then all that the collective needs.

Source of the exchange: Bruck et al., "Efficient algorithms for all-to-all communications in multiport message-passing
systems" (1997). In each step a rank has rows of itself and the ranks after it, and gets as many of the rank behind
them. Cost: log2(n) steps, n - 1 rows sent. On 3 ranks::

            rank 0    rank 1    rank 2
    start   0         1         2
    step 1  0 1       1 2       2 0         one row from the next rank
    step 2  0 1 2     1 2 0     2 0 1       one row from the rank after that
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from backends.deadline import Deadline
from backends.executor.reductions import combine
from backends.processes.offer import Offer, Read
from backends.processes.signature import difference
from minidist.communicator import Communicator
from minidist.contract.inner import Inner
from minidist.errors import MismatchError

SMALL_BYTES = 2**11
"""What fits into a row."""
DATA = 64
"""Where in a row the tensor begins: after the signature, aligned for any dtype."""


class Agreement:
    """How the ranks of ``comm`` compare; over its send and receive, which must be fine with messages of one size."""

    def __init__(self, comm: Communicator, tag: int) -> None:
        self._comm = comm
        self._transport = Inner(comm)
        self._tag = tag
        self._rows = torch.empty(comm.world_size, DATA + SMALL_BYTES, dtype=torch.uint8, device="cpu")
        self._words = self._rows.view(torch.int64)

    def settle(self, offer: Offer, reads: Iterable[Read], timeout_s: float) -> float | None:
        """Do the collective if it is small and return None, else the seconds that are left of ``timeout_s`` for it.

        Args:
            offer: what this rank brings.
            reads: what becomes of it, if it is small.
            timeout_s: for all of it.

        Raises:
            MismatchError: another rank means to do something else.
        """
        deadline = Deadline(timeout_s)
        source = offer.source
        is_small = offer.nbytes <= SMALL_BYTES
        if is_small and source is not None:
            self._rows[0, DATA : DATA + source.nbytes].view(source.dtype).copy_(source.view(-1))
        self.compare(offer.signature, deadline)
        if not is_small:
            return deadline.left_s
        for target, parts in reads:
            combine(offer.op, [self._piece(*part, target) for part in parts], target)
        self._comm.traffic.count(0 if source is None else source.nbytes)
        return None

    def compare(self, word: int, deadline: Deadline) -> None:
        """Tell all ranks what this one means to do, and raise MismatchError if another one's ``word`` differs."""
        comm = self._comm
        n = self._comm.world_size
        self._words[0, 0] = word
        have = 1  # rows, of this rank and the ones after it; each step doubles them
        while have < n:
            count = min(have, n - have)
            left = deadline.left_s
            receive = self._transport.irecv(self._rows[have : have + count], (comm.rank + have) % n, self._tag, left)
            send = self._transport.isend(self._rows[:count], (comm.rank - have) % n, self._tag, left)
            receive.wait()
            send.wait()
            have += count
        for ahead, theirs in enumerate(self._words[:, 0].tolist()):
            if theirs != word:
                raise MismatchError(difference(comm.rank, word, (comm.rank + ahead) % n, theirs))

    def _piece(self, rank: int, piece: int, like: Tensor) -> Tensor:
        """Return a piece of what ``rank`` brought."""
        start = DATA + piece * like.nbytes
        row = self._rows[(rank - self._comm.rank) % self._comm.world_size]
        return row[start : start + like.nbytes].view(like.dtype).view(like.shape)
