"""What a rank has called last, where, and how far that has come: always on, and cheap.

The last 256 operations are kept in a ring. To note one takes under 1 us (``python experiments/bench_recorder.py``), as
only what is at hand is noted, and put into words when somebody asks. Nothing of the user's is kept alive by it: no
tensor, and no frame, whose variables would live on.

Collectives are numbered in the order in which they run, which is the same on all ranks; that in which they are called
is not, where some are called by the thread that runs the others.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType

import torch
from torch import Tensor

from minidist.contract.call_site import Spot, doing, is_library, site_of, user_frame
from minidist.contract.forks import Living
from minidist.contract.rank import ANY_SOURCE
from minidist.contract.reduce_op import ReduceOp
from minidist.contract.standing import DONE, FAILED, QUEUED, WAITING, Call, Standing
from minidist.errors import CommError

NUM_ENTRIES = 256
NUM_TOLD = 8
"""How many of them a rank tells the others."""
BLOCK = {"all_gather": 1, "gather": 1}
"""Which tensor of a collective all ranks have in one size, where that is not the first."""
MESSAGES = ("isend", "irecv")
FUSED_STEP = "fused_step"
"""What is stepped is the user's, and so not kept."""
VARIABLE = "MINIDIST_RECORDS"
Ask = Callable[[int, float], Mapping[int, Standing]]


@dataclass(slots=True, eq=False)
class Entry:
    """An operation that was called; see `Call` for what becomes of it.

    Attributes:
        number, began, ended: set when a collective runs. A message begins when it is waited for.
    """

    operation: str
    args: tuple[object, ...]
    spot: Spot | None
    called: float
    numel: int = 0
    dtype: torch.dtype | None = None
    number: int | None = None
    began: float | None = None
    ended: float | None = None
    has_failed: bool = False

    @property
    def what(self) -> str:
        """It in words: first what has to be alike on all ranks, in the order of the public methods."""
        words = [self.operation]
        if self.dtype is not None:
            words.append(f"of {self.numel} {str(self.dtype).removeprefix('torch.')}")
        if self.operation in MESSAGES and self.args:  # none where it was refused before it was looked at
            peer, tag = self.args
            way = "to" if self.operation == "isend" else "from"
            return " ".join([*words, way, "any rank" if peer == ANY_SOURCE else f"rank {peer}", f"with tag {tag}"])
        for one in self.args:
            words.append(f"with op {one.name}" if isinstance(one, ReduceOp) else f"with root {one}")
        return " ".join(words)

    @property
    def where(self) -> str:
        """The line of the user's code; empty if there is none."""
        return "" if self.spot is None else str(site_of(self.spot))

    def __str__(self) -> str:
        return f"{self.what} at {self.where}" if self.spot else self.what


NO_ENTRY = Entry("", (), None, 0.0, ended=0.0)


class Recorder:
    """The last operations of a rank on one communicator, and on those that share its order.

    Attributes:
        rank, world_size: the rank.
        name: the communicator's kind.
        ranks: what its ranks are called in the world.
        folder: where records are written, see `minidist.contract.records`; empty for nowhere. What is split off later
            writes there too.
        heard: what the ranks have answered when they were asked last.
        is_closed: whether its communicator is, so that nothing of it is written any more.
        made_at: when, to tell it from others.
        channel: what tells it from others on the same transport; the same on all ranks.
        explains: whether errors say who waits for whom. Not those of a communicator inside of another one, that does.
        num_started: how many collectives have begun.
        can_ask: whether the other ranks may still answer; not those of a communicator that this rank has aborted.
        has_failed: whether an operation has failed, after which the communicator is of no use.
        step: the training's, for whoever reads what was recorded: set by `minidist.engine.Engine`, or by you.
    """

    def __init__(self, rank: int, world_size: int, name: str = "") -> None:
        self.rank = rank
        self.world_size = world_size
        self.name = name
        self.ranks = tuple(range(world_size))
        self.folder = os.environ.get(VARIABLE, "")
        self.heard: Mapping[int, Standing] = {}
        self.is_closed = False
        self.made_at = time.perf_counter()
        self.channel = 0
        self.explains = True
        self.num_started = 0
        self.step: int | None = None
        self.can_ask = True
        self.has_failed = False
        self._job_spot: Spot | None = None  # of a job that runs in another thread
        self._thread = threading.get_ident()
        self._ring = deque[Entry](maxlen=NUM_ENTRIES)  # one thread may call while another runs what was called before
        self._raised = ""
        self._ask: weakref.WeakMethod[Ask] | None = None
        recorders.add(self)

    @property
    def world_rank(self) -> int:
        """What this rank is called in the world."""
        return self.ranks[self.rank]

    def among(self, ranks: Sequence[int], parent: Recorder) -> None:
        """Note that its ranks are these of ``parent``."""
        self.ranks = tuple(parent.ranks[rank] for rank in ranks)
        self.folder = parent.folder

    def asks(self, standings: Ask) -> None:
        """Let `ask` be done by this method."""
        self._ask = weakref.WeakMethod(standings)

    def ask(self, timeout_s: float) -> Mapping[int, Standing]:
        """Return how far each rank has come, as far as they answer in time."""
        asked = None if self._ask is None else self._ask()
        return {} if asked is None else asked(self.channel, timeout_s)

    def note(self, operation: str, tensors: Sequence[Tensor | None], args: tuple[object, ...]) -> Entry:
        """Take down what a public method was called for, which has called what calls this."""
        frame = sys._getframe(3)  # beyond that method, as all are wrapped once
        while frame is not None and is_library[frame.f_code.co_filename]:
            frame = frame.f_back  # type: ignore[assignment]  # None at the end
        spot = self._job_spot if frame is None else (frame.f_code, frame.f_lasti)
        entry = Entry(operation, () if operation == FUSED_STEP else args, spot, time.perf_counter())
        if tensors and (tensor := tensors[BLOCK.get(operation, 0)]) is not None:
            entry.numel, entry.dtype = tensor.numel(), tensor.dtype
        self._ring.append(entry)
        return entry

    def placed(self, job: Callable[[], None]) -> Callable[[], None]:
        """Return ``job``, whose operations are called where it is now, if in no code of the user that runs it."""
        frame = user_frame(sys._getframe(2))
        spot = self._job_spot if frame is None else (frame.f_code, frame.f_lasti)

        def run() -> None:
            before, self._job_spot = self._job_spot, spot
            try:
                job()
            finally:
                self._job_spot = before

        return run

    def fail(self, failed: Entry | None = None) -> None:
        """Note that what is waited for is waited for in vain, and what has failed before it came to that."""
        self.has_failed = True
        for entry in self.entries():
            entry.has_failed = entry.has_failed or entry is failed or _state(entry) == WAITING

    def raised(self, error: BaseException, traceback: TracebackType | None) -> str:
        """Note what ended this rank; return where that was, as far as it is known, to follow the error's own words."""
        spots = []
        while traceback is not None:
            code = traceback.tb_frame.f_code
            if not is_library[code.co_filename]:
                spots.append((code, traceback.tb_lasti))
            traceback = traceback.tb_next
        where = f" at {site_of(spots[-1])}" if spots else ""
        of_step = "" if self.step is None else f" in step {self.step}"
        last = next((entry for entry in reversed(self.entries()) if entry.number == self.num_started), None)
        after = "" if last is None else f", after {last.operation} #{last.number}"
        self._raised = f"{type(error).__name__}: {error}{where}{of_step}{after}"
        return f"{where}{of_step}{after}"

    def entries(self) -> list[Entry]:
        """Return what was called last, the oldest first."""
        while True:
            with contextlib.suppress(RuntimeError):  # one was noted meanwhile
                return list(self._ring)

    @property
    def waits_in(self) -> Entry | None:
        """What this rank waits in, or waited in vain: a collective, or else a message."""
        waiting = [entry for entry in self.entries() if _state(entry) in (WAITING, FAILED)]
        return min(waiting, key=lambda entry: entry.number is None, default=None)

    def standing(self, num_calls: int = NUM_TOLD) -> Standing:
        """Return how far this rank has come, with what it waits in and its last calls; from any thread."""
        now = time.perf_counter()
        entries = self.entries()
        waits_in = [entry for entry in entries[:-num_calls] if _state(entry) == WAITING]
        calls = tuple(self._call(entry, now) for entry in waits_in + entries[-num_calls:])
        # Of the thread that made the communicator: in a program of processes that is the main one.
        site, inside = doing(sys._current_frames().get(self._thread))
        where = "" if site is None else str(site)
        step = None if self.step is None else int(self.step)  # of numpy, say, which no file and no message takes
        return Standing(self.rank, self.num_started, calls, inside, where, step, self._raised)

    def _call(self, entry: Entry, now: float) -> Call:
        began = entry.called if entry.began is None else entry.began
        end = entry.ended
        return Call(
            entry.number,
            entry.what,
            entry.where,
            _state(entry),
            round(now - began, 6),
            None if end is None or entry.began is None else round(end - began, 6),
            int(str(entry.args[0])) if entry.operation in MESSAGES and entry.args else None,
        )


def two_threads(rank: int, other: Entry) -> CommError:
    """Return what a thread is told that calls a collective while another one of its rank is in ``other``."""
    return CommError(
        f"rank {rank} is in {other} in another thread; one thread at a time may use a communicator: give each a split "
        "of its own"
    )


def _state(entry: Entry) -> str:
    if entry.has_failed:
        return FAILED
    is_empty = entry.dtype is not None and entry.numel == 0 and entry.operation not in MESSAGES  # and never runs
    if entry.ended is not None or is_empty:
        return DONE
    return QUEUED if entry.began is None else WAITING


# Per process, as a signal is, which knows of no communicator.
recorders: Living[Recorder] = Living()
