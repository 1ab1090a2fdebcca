"""What one rank does in a collective on tensors of one shape, worked out once: its messages, and where they lie."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from backends.executor.layout import Range, layout
from backends.executor.messages import messages
from backends.executor.plan import Plan, PlannedStep
from minidist.collective import Run
from minidist.communicator import ReduceOp
from minidist.schedule import Reduce, Transfer

Whole = Callable[[Sequence[Tensor], ReduceOp, float], None]
"""Runs a program on its regions of memory, as one operation of the transport."""


@dataclass(frozen=True, slots=True)
class Message:
    """One message.

    Attributes:
        peer: the rank at the other end.
        runs: the memory that it is of, or for: places in the ranges of its program.
        numels: the elements of each run.
        numel: those of all.
        reduces: whether it is combined with what is there.
    """

    peer: int
    runs: Sequence[int]
    numels: Sequence[int]
    numel: int
    reduces: bool

    @property
    def in_place(self) -> bool:
        """Whether it comes to where it belongs; else into scratch."""
        return not self.reduces and len(self.runs) == 1


@dataclass(frozen=True, slots=True)
class ProgramStep:
    """One step.

    Attributes:
        receives, sends: its messages.
        scratch: which of two pieces of scratch memory it receives into: what arrives early must not overwrite what is
            being reduced.
        staged: how many elements each message has that comes into scratch.
        sends_first: whether its sends have to leave before anything is stored.
        in_order: see `PlannedStep`.
        following: the next step, if its receives are posted once the sends of this one have left.
    """

    receives: Sequence[Message]
    sends: Sequence[Message]
    scratch: str
    staged: Sequence[int]
    sends_first: bool
    in_order: bool
    following: ProgramStep | None


@dataclass(frozen=True, slots=True)
class Program:
    """All steps.

    Attributes:
        run: the collective.
        numel: of its tensor, or of a block.
        ranges: all memory that a message is of or for.
        steps: what is done with it.
        whole: what does all of it at once, if the transport can.
        num_sent, numel_sent: how many messages this rank sends, of how many elements.
    """

    run: Run
    numel: int
    ranges: Sequence[Range]
    steps: Sequence[ProgramStep]
    whole: Whole | None
    num_sent: int
    numel_sent: int


def program(plan: Plan, rank: int, numel: int, segment: int, whole: Whole | None) -> Program:
    """Return what ``rank`` does on tensors, or blocks, of ``numel`` elements, in messages of at most ``segment``."""
    chunks = layout(plan.run, rank, plan.num_chunks, numel)
    places: dict[Range, int] = {}

    def described(move: Transfer, joins: bool = True) -> list[Message]:
        return [_message(move, runs, places) for runs in messages(chunks, move, segment, joins)]

    steps: list[ProgramStep] = []
    following: PlannedStep | None = None
    for number, step in reversed(list(enumerate(plan.steps))):
        # Those of one place are found by it, so that chunks stay apart that other messages do not join.
        receives = [each for move in step.arrivals for each in described(move, joins=not step.in_order)]
        sends = [each for move in step.sends for each in described(move)]
        if not receives and not sends:
            following = None
            continue
        # Not where a message travels in segments: to wait for the sends here would leave no transfer to hide the
        # reductions behind.
        is_early = following is not None and following.early and len(sends) <= len(step.sends)
        staged = [message.numel for message in receives if not message.in_place]
        next_one = steps[-1] if is_early else None
        first = is_early or step.sends_first
        steps.append(ProgramStep(receives, sends, f"arriving{number % 2}", staged, first, step.in_order, next_one))
        following = step
    sent = [message.numel for step in steps for message in step.sends]
    return Program(plan.run, numel, list(places), steps[::-1], whole, len(sent), sum(sent))


def _message(move: Transfer, runs: Sequence[Range], places: dict[Range, int]) -> Message:
    numels = [run.numel for run in runs]
    return Message(
        move.peer, [places.setdefault(run, len(places)) for run in runs], numels, sum(numels), isinstance(move, Reduce)
    )
