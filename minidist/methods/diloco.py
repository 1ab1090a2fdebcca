"""DiLoCo: hundreds of inner steps, then one outer step of all workers together; and with sparse pseudo-gradients."""

from __future__ import annotations

from minidist.compression import ErrorFeedback, TopK
from minidist.gradients.hooks import AllReduce, Hook
from minidist.methods.outer import OuterMethod


class _Rounds(OuterMethod):
    """All of the model at once, while training waits."""

    def _exchange(self, step: int) -> None:
        if step % self.period:
            return
        for outer in self.outers:
            outer.start()
        for outer in self.outers:
            outer.piece.write(outer.finish())


class DiLoCo(_Rounds):
    """Outer Nesterov steps on the mean of what ``period`` inner steps came to; M / period bytes per step.

    Douillard et al., "DiLoCo: Distributed Low-Communication Training of Language Models" (2023): the inner optimizer is
    AdamW, whose state stays with its worker. After an outer step the replicas are bit-identical. With ``outer_lr`` 1
    and no momentum it is `LocalSGD`, to rounding.

    Args:
        period: inner steps between two outer ones (H).
        outer_lr, outer_momentum: of the outer SGD.
        hook: how pseudo-gradients travel.
        ranks_per_worker: ranks that average their gradients in every step.
    """

    def __init__(
        self,
        period: int = 16,
        outer_lr: float = 0.7,
        outer_momentum: float = 0.9,
        hook: Hook = AllReduce(),  # noqa: B008  (an AllReduce has no state)
        ranks_per_worker: int = 1,
    ) -> None:
        super().__init__(period, outer_lr, outer_momentum, hook, ranks_per_worker=ranks_per_worker)


class SparseLoCo(_Rounds):
    """DiLoCo with the largest of the pseudo-gradients alone, and what was left out fed back.

    Sarfi et al., "Communication Efficient LLM Pre-training with SparseLoCo" (2025): what was left out, decayed in each
    round, takes the place of the outer momentum. Theirs are the largest of each chunk of 4096, in 2 bits; here they are
    those of the whole, in full. A rank sends k numbers and their places, in float32 8 bytes each, to all other workers.

    Args:
        period: inner steps between two outer ones (H).
        fraction: of the pseudo-gradients, above 0 and at most 1.
        decay: what becomes of a unit of the left-out in a round, 0 to 1.
        outer_lr: of the outer SGD.
        ranks_per_worker: ranks that average their gradients in every step.
    """

    def __init__(
        self,
        period: int = 16,
        fraction: float = 0.03,
        decay: float = 0.95,
        outer_lr: float = 1.0,
        ranks_per_worker: int = 1,
    ) -> None:
        hook = ErrorFeedback(TopK(fraction), decay)
        super().__init__(period, outer_lr, 0.0, hook, ranks_per_worker=ranks_per_worker)
        self.fraction = fraction
        self.decay = decay
