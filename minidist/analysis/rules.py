"""What one step of a schedule may be, whatever the other ranks do; and the words in which mistakes are said."""

from __future__ import annotations

from collections.abc import Sequence

from minidist.collective import Run
from minidist.errors import ScheduleError
from minidist.schedule import (
    Recv,
    Reduce,
    Schedule,
    Send,
    Step,
    Transfer,
    chunks_of,
    default_chunks,
    indices,
)


def counted_chunks(schedule: Schedule, run: Run) -> int:
    """Return into how many chunks the schedule cuts the memory of the collective.

    Raises:
        ScheduleError: the collective cannot be cut so.
    """
    promise = run.collective
    count = chunks_of(schedule, run.name, run.world_size)
    # More chunks than blocks would have no memory, but in a tensor that is cut anyhow, or in scratch.
    is_free = promise.is_cut or promise.has_scratch
    least = 1 if promise.is_cut else default_chunks(run.name, run.world_size)
    if count < least or (count > least and not is_free):
        bound = "at least " if is_free else ""
        raise ScheduleError(f"{run.name} on {run.world_size} ranks has {bound}{least} chunks, got num_chunks({count})")
    return count


class Rules:
    """The rules of one run.

    Args:
        run: what runs.
        num_chunks: into how many its memory is cut.
    """

    def __init__(self, run: Run, num_chunks: int) -> None:
        self._run = run
        self._num_chunks = num_chunks

    def ensure_possible(self, rank: int, where: str, step: Step) -> None:
        """Refuse a step that ``rank`` cannot take; ``where`` is how an error begins.

        Raises:
            ScheduleError: it is no step, or names ranks or chunks that are not there, or brings what is not settled.
        """
        if not isinstance(step, tuple) or not all(isinstance(move, Transfer) for move in step):
            raise ScheduleError(f"{where}: a step is a tuple of Send, Recv and Reduce, got {step!r}")
        for transfer in step:
            self._ensure_names(rank, where, transfer)
            self._ensure_memory(rank, where, transfer)
        _ensure_settled(where, [move for move in step if not isinstance(move, Send)])
        _ensure_apart(where, step)

    def _ensure_names(self, rank: int, where: str, transfer: Transfer) -> None:
        """Refuse ranks and chunks that there are not."""
        # Before it is compared, as a rank of 1.0 would lie in the range.
        if not isinstance(transfer.peer, int):
            raise ScheduleError(f"{where}: a rank is a whole number, got {transfer.peer!r}")
        if not 0 <= transfer.peer < self._run.world_size or transfer.peer == rank:
            others = f"the other ranks are those of 0 to {self._run.world_size - 1}"
            raise ScheduleError(f"{where}: {spell(transfer)}, but {others}")
        chunks = indices(transfer.chunk)
        if not chunks:
            raise ScheduleError(f"{where}: a transfer with rank {transfer.peer} names no chunk")
        if any(not isinstance(chunk, int) or not 0 <= chunk < self._num_chunks for chunk in chunks):
            raise ScheduleError(f"{where}: {spell(transfer)}, but the chunks are 0 to {self._num_chunks - 1}")
        if len(chunks) > 1 and len(set(chunks)) < len(chunks):
            raise ScheduleError(f"{where}: {spell(transfer)}, one of them twice")

    def _ensure_memory(self, rank: int, where: str, transfer: Transfer) -> None:
        """Refuse chunks that this rank has not, and to write into the caller's input."""
        promise = self._run.collective
        chunks = indices(transfer.chunk)
        if not all(promise.exists(self._run, rank, chunk) for chunk in chunks):
            what = f"of the chunks of a {self._run.name} it has only its own"
            raise ScheduleError(f"{where}: {spell(transfer)}, but {what}")
        # An input may be sent on as it is, which saves a copy; the caller would notice only what is written there.
        if not isinstance(transfer, Send) and any(promise.is_input(self._run, rank, chunk) for chunk in chunks):
            what = f"that is the input of the {self._run.name}, which stays as it is"
            raise ScheduleError(f"{where}: {spell(transfer)}, but {what}")


def _ensure_settled(where: str, arrivals: Sequence[Transfer]) -> None:
    """Refuse what one step brings into one chunk in an order that is not settled.

    Messages of one step come in any order. Reductions into a chunk are sorted by rank before they are added up, which
    the executor does message by message: so two of them have to name the same chunks.
    """
    written: dict[int, int] = {}  # by its place in the step: one transfer may stand in it twice
    for number, transfer in enumerate(arrivals):
        for chunk in indices(transfer.chunk):
            first = written.setdefault(chunk, number)
            if first == number:
                continue
            before = arrivals[first]
            both = f"{where}: {spell(transfer)} and {spell(before)} in one step"
            if isinstance(transfer, Recv) or isinstance(before, Recv):
                raise ScheduleError(f"{both}, in an order that nobody knows")
            if tuple(indices(transfer.chunk)) != tuple(indices(before.chunk)):
                raise ScheduleError(f"{both}; what is reduced together has to be the same chunks")


def _ensure_apart(where: str, step: Step) -> None:
    """Refuse to overwrite what is being sent: a transport may read it late. A reduction waits for its sends."""
    for receive in step:
        if isinstance(receive, Recv):
            for send in step:
                if isinstance(send, Send) and not set(indices(receive.chunk)).isdisjoint(indices(send.chunk)):
                    raise ScheduleError(f"{where}: {spell(send)} while {spell(receive)}")


def spell(transfer: Transfer) -> str:
    """Return what a transfer does, in words."""
    verb, way = {Send: ("sends", "to"), Recv: ("receives", "from"), Reduce: ("reduces", "from")}[type(transfer)]
    return f"it {verb} {spell_chunks(transfer)} {way} rank {transfer.peer}"


def spell_chunks(transfer: Transfer) -> str:
    """Return the chunks of a transfer, in words."""
    chunks = indices(transfer.chunk)
    if len(chunks) == 1:
        return f"chunk {chunks[0]}"
    if isinstance(chunks, range) and chunks.step == 1 and chunks:
        return f"chunks {chunks[0]} to {chunks[-1]}"
    return f"chunks {', '.join(map(str, chunks))}"
