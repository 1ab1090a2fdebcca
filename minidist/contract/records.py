"""What ranks have recorded as files, one of each rank, which ``python -m minidist.doctor`` reads.

They are written where the environment variable MINIDIST_RECORDS says, or `Recorder.folder`: at a CommError, and at the
signals that `RecordsOnSignal` waits for. What the other ranks have said when they were asked is in them, too, so that
one file tells the most of it where the other ranks could not write any.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import signal
import socket
import sys
import threading
import time
import warnings
from collections.abc import Iterable
from pathlib import Path
from types import FrameType
from typing import Any, Self

from minidist.contract.diagnosis import diagnose, differences
from minidist.contract.forks import only_here
from minidist.contract.recorder import NUM_ENTRIES, Entry, Recorder, recorders
from minidist.errors import CommError, MismatchError

FORMAT = "minidist records 1"
ANSWER_S = 2.0
"""How long the other ranks have to answer, all together."""
LONG_S = 1.0
SIGNALS = (signal.SIGUSR1, signal.SIGTERM)


def write(why: str, world_ranks: Iterable[int] | None = None) -> list[Path]:
    """Write what the ranks of this process have recorded, as far as they are told where; return the files.

    Args:
        why: what happened.
        world_ranks: of which ranks, where they are threads; None for all.
    """
    by_rank: dict[int, list[Recorder]] = {}
    for recorder in _in_use():
        by_rank.setdefault(recorder.world_rank, []).append(recorder)
    wanted = by_rank.keys() if world_ranks is None else by_rank.keys() & set(world_ranks)
    return [path for rank in sorted(wanted) if (path := _write(rank, by_rank[rank], why)) is not None]


def _in_use() -> list[Recorder]:
    """Return the recorders of communicators that are not closed, the first one made first."""
    return sorted((one for one in recorders.all() if not one.is_closed), key=lambda one: one.made_at)


def _write(rank: int, of_rank: list[Recorder], why: str) -> Path | None:
    folder = next((recorder.folder for recorder in reversed(of_rank) if recorder.folder), "")
    if not folder:
        return None
    path = Path(folder, f"records-rank{rank}.json")
    # Two threads may write at once, as one that fails while a signal comes.
    partial = path.with_suffix(f".{os.getpid()}.{threading.get_ident()}.part")
    try:
        whole = {
            "format": FORMAT,
            "rank": rank,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "time": time.time(),
            "why": why,
            "communicators": [_as_json(recorder) for recorder in of_rank if recorder.folder == folder],
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(whole, indent=1) + "\n")
        partial.replace(path)
    except (OSError, ValueError, TypeError) as error:
        # What happened is the news, and not that it cannot be written down: not even where warnings are errors.
        with contextlib.suppress(OSError, ValueError):
            partial.unlink(missing_ok=True)
        with contextlib.suppress(UserWarning):
            warnings.warn(f"[rank {rank}] cannot write {path}: {error}", stacklevel=2)
        return None
    return path


def _as_json(recorder: Recorder) -> dict[str, Any]:
    return {
        "name": recorder.name,
        "ranks": list(recorder.ranks),
        "standing": recorder.standing(NUM_ENTRIES).as_json(),
        "heard": [standing.as_json() for rank, standing in recorder.heard.items() if rank != recorder.rank],
    }


def explained(failure: CommError, entry: Entry | None, recorder: Recorder, gone: Iterable[int]) -> str:
    """Ask the other ranks how far they have come, which may take ANSWER_S, and return what the failure comes to.

    Args:
        failure: a MismatchError is only about what ranks call that do not call the same.
        entry: what failed, if that is known.
        recorder: of the rank that asks.
        gone: the ranks that are not expected to answer.
    """
    recorder.heard = standings = recorder.ask(ANSWER_S)
    if not isinstance(failure, MismatchError):
        return "; ".join([str(failure), *diagnose(standings, range(recorder.world_size), gone)])
    found = differences(standings)
    # Of collectives that differ a transport has seen some message, or the same calls without their lines.
    is_seen = found and entry is not None and entry.number is not None
    return "; ".join(found if is_seen else [str(failure), *found])


def ask_and_write(why: str) -> None:
    """Write, ask the other ranks how far they have come, write that too, and say on stderr who waits for whom."""
    write(why)  # first: who sends the signal may not wait for the answers
    until = time.monotonic() + ANSWER_S
    asked = [recorder for recorder in _in_use() if recorder.explains and recorder.can_ask and recorder.world_size > 1]
    for done, recorder in enumerate(asked):
        recorder.heard = recorder.ask(max(until - time.monotonic(), 0.0) / (len(asked) - done))
    write(why)
    for recorder in asked:
        for sentence in diagnose(recorder.heard, range(recorder.world_size)) if _is_long(recorder) else []:
            print(f"[rank {recorder.rank}/{recorder.world_size}] {why}: {sentence}", file=sys.stderr, flush=True)


def write_soon(why: str, wait_s: float = 0.0) -> None:
    """Do `ask_and_write` in another thread, as a handler of a signal has to: its own may hold what that needs.

    Args:
        why: what happened.
        wait_s: how long to wait for it.
    """
    # A daemon: to start another thread while the interpreter waits for the last ones can hang. But it is waited for.
    thread = threading.Thread(target=ask_and_write, args=(why,), daemon=True)
    with contextlib.suppress(RuntimeError):  # no thread more can be had
        thread.start()
        atexit.register(thread.join, 2 * ANSWER_S)
        thread.join(wait_s)


def _is_long(recorder: Recorder) -> bool:
    """Whether a rank has waited for longer than it does while all goes well."""
    waits = (standing.waits_in for standing in recorder.heard.values())
    return any(call is not None and call.seconds > LONG_S for call in waits)


class RecordsOnSignal:
    """Writes records at SIGUSR1 and SIGTERM for as long as it is entered, which has to be in the main thread.

    Then it does what the signal did before; SIGUSR1, which would have ended the process, nothing more. A fork leaves
    records alone. Python runs handlers between two of its instructions: while a rank is inside of a library that does
    not return, nothing is written, but the other ranks can ask it.
    """

    def __init__(self) -> None:
        self._before: dict[int, Any] = {}
        self._write_soon = only_here(write_soon)

    def __enter__(self) -> Self:
        self.start()
        return self

    def start(self) -> None:
        """Enter it until the process ends."""
        if threading.current_thread() is threading.main_thread():
            for one in SIGNALS:
                self._before[one] = signal.getsignal(one)  # first, as it may come at once
                signal.signal(one, self._handle)

    def __exit__(self, *error: object) -> None:
        for one, before in self._before.items():
            signal.signal(one, before)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        before = self._before[signum]
        ends = signum == signal.SIGTERM and before is signal.SIG_DFL
        if ends:
            signal.signal(signum, before)  # a second one does not wait
        self._write_soon(signal.Signals(signum).name, 2 * ANSWER_S if ends else 0.0)
        if ends:
            os.kill(os.getpid(), signum)
        elif callable(before):
            before(signum, frame)
