"""Ranks that compare what they call before anything moves, so that a mistake is named with both lines of code.

Before each collective, or each k-th (``every``), the ranks gather a *record* of four numbers from each: how many
collectives it has run, a hash of what it calls (collective, op, root, dtype, number of elements), and hashes of the
line and of the function that call it. Where the second numbers differ, and only there, the ranks gather the calls in
words, so that all of them raise the same MismatchError::

    rank 0   record, record   equal      the collective
    rank 1   record, record              the collective

    rank 0   record, record   differ     words, words     MismatchError
    rank 1   record, record              words, words     MismatchError

Cost: one all-gather of 32 bytes per rank and collective; with ``every=k`` one for k of them, whose hashes are rolled
into one, and one of k numbers more to find the call that differs.

That ranks call from different lines is no mistake: ``if rank == 0: comm.barrier() else: comm.barrier()`` is right. Two
calls that are alike in all else are *swapped* where one rank runs a function and then another, and a second rank those
two the other way round. Of that only the second call can tell, when the first has moved its data already. Objects are
two collectives each, and barriers move nothing: their swaps are not looked for.
"""

from __future__ import annotations

import functools
import hashlib
import threading
from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from backends.deadline import Deadline
from backends.wrapper import Wrapper
from minidist.communicator import Communicator, ReduceOp, Work
from minidist.contract.call_site import CallSite, call_site
from minidist.contract.checks import spell
from minidist.contract.recorder import BLOCK
from minidist.errors import CommError, MismatchError

WORDS_BYTES = 512
ROLL = 0x9E3779B97F4A7C15
"""Odd, so that no call is lost from a rolled hash."""
Row = list[int]


class Call(NamedTuple):
    """What a rank calls; ``shape``, ``site`` and ``purpose`` are told, but may differ."""

    kind: str
    numel: int
    dtype: torch.dtype | None
    op: ReduceOp | None
    root: int | None
    shape: tuple[int, ...]
    site: CallSite | None
    purpose: str = ""

    @property
    def word(self) -> int:
        """What has to be the same on all ranks, in one number."""
        return _hash(self[:5])

    @property
    def what(self) -> str:
        words = [self.kind]
        if self.dtype is not None:
            words.append(f"of {spell(self.dtype)} {list(self.shape)}")
        if self.op is not None:
            words.append(f"with op {self.op.name}")
        if self.root is not None:
            words.append(f"with root {self.root}")
        return " ".join(words)

    @property
    def where(self) -> str:
        purpose = f"for {self.purpose} " if self.purpose else ""
        return f"{purpose}at {self.site or 'a place in no code of the user'}"


class CheckedCommunicator(Wrapper):
    """Another communicator, on which ranks that call different collectives are told so; see `Wrapper`.

    Messages are left to `minidist.contract.envelope`, which names a wrong dtype or size on any transport; so are
    all-to-alls of uneven blocks, which are messages. Collectives of no elements do nothing, and are not compared. A
    split is checked too.

    Args:
        transport: the communicator that moves the bytes.
        every: 1 compares each collective; k compares k at once, before the last of them, for less. What was called
            after the last comparison is then never compared, and a wrong result may be seen before its cause.
        swaps: whether swapped calls are an error. Not for ranks that take turns in two functions that call the same.
        timeout_s: None for the transport's.

    Raises (every collective):
        MismatchError: the ranks call different ones; it names both calls, their lines, and the ranks in the minority.
    """

    def __init__(
        self, transport: Communicator, every: int = 1, swaps: bool = True, timeout_s: float | None = None
    ) -> None:
        if every < 1:
            raise ValueError(f"every must be at least 1 collective, got {every}")
        super().__init__(transport, timeout_s)
        self.every = every
        self.swaps = swaps
        self._gather = self._inner.collective("all_gather")
        self._asked = _Asked()
        self._job_site: CallSite | None = None
        self._num_calls = self._rolled = 0
        self._recent = deque[Call](maxlen=max(every, 2))
        self._before: list[Row] = []
        self._has_refused = False
        self._targets: dict[int, Tensor] = {}  # by the length of a row

    def fuses_steps(self, dtype: torch.dtype) -> bool:
        return self._inner.comm.fuses_steps(dtype)

    # What is called, and where -----------------------------------------------------------------

    def _run(
        self,
        operation: str,
        tensors: Sequence[Tensor | None],
        args: tuple[Any, ...],
        async_op: bool,
        timeout_s: float | None,
        keep: bool = False,
    ) -> Work:
        """Note what the user gave: hooks get another op for AVG, and other tensors for some."""
        call = described(operation, (*tensors, *args), self._site())
        self._asked.call = call._replace(purpose=self.purpose) if self.purpose else call
        try:
            return super()._run(operation, tensors, args, async_op, timeout_s, keep)
        finally:
            self._asked.call = None

    def _dispatch(self, run: Callable[[], None], async_op: bool) -> Work:
        """Let what a job calls in another thread be called where the job was."""
        if self._progress.in_job:
            return super()._dispatch(run, async_op)
        call = self._asked.call
        site = call_site() if call is None else call.site

        def placed() -> None:
            self._job_site = site
            run()

        return super()._dispatch(placed, async_op)

    def _site(self) -> CallSite | None:
        return self._job_site if self._progress.in_job else call_site()

    def _collective(self, name: str) -> Callable[..., None]:
        run = super()._collective(name)
        if self.world_size == 1:
            return run
        asked = self._asked.call
        site = self._site() if asked is None else None

        def checked(*args: Any) -> None:
            *given, timeout_s = args
            deadline = Deadline(timeout_s)
            call = described(name, given, site) if asked is None else asked
            self._compare(call, deadline)
            run(*given, deadline.left_s)

        return checked

    def _is_explained(self, failure: CommError) -> bool:
        """A comparison names all calls itself."""
        return super()._is_explained(failure) and not self._has_refused

    def _split(self, groups: list[list[int]]) -> Communicator | None:
        child = super()._split(groups)
        return None if child is None else CheckedCommunicator(child, self.every, self.swaps, self.timeout_s)

    # The comparison ----------------------------------------------------------------------------

    def _compare(self, call: Call, deadline: Deadline) -> None:
        self._num_calls += 1
        self._recent.append(call)
        word = call.word
        if self.every > 1:
            word = self._rolled = (self._rolled * ROLL + word) % 2**63
            if self._num_calls % self.every:
                return
        site = (0, 0) if call.site is None else (_hash(call.site[:2]), _hash((call.site.file, *call.site[2:])))
        rows = self._gathered([self._num_calls, word, *site], deadline)
        if any(row[:2] != rows[0][:2] for row in rows):
            self._refuse_call(deadline)
        # Not for k at once: between two comparisons lines may be taken in any order.
        if self.every == 1 and self.swaps:
            # Barriers mix no data: ranks may well take turns in two functions that have one.
            if self._before and call.dtype is not None and swapped(self._before, rows):
                self._refuse_swap(deadline)
            self._before = rows

    def _refuse_call(self, deadline: Deadline) -> None:
        """Raise what is wrong with the first of the recent calls that differs."""
        back = 1
        self._has_refused = True
        if self.every > 1:
            histories = self._gathered([call.word for call in list(self._recent)[-self.every :]], deadline)
            different = [len(set(words)) > 1 for words in zip(*histories, strict=True)]
            back = len(different) - different.index(True) if True in different else 1
        call = self._recent[-back]
        raise MismatchError(
            difference(self._words(call.what, deadline), self._words(call.where, deadline), self._num_calls - back + 1)
        )

    def _refuse_swap(self, deadline: Deadline) -> None:
        self._has_refused = True
        first, second = list(self._recent)[-2:]
        words = self._words(f"{first.what} {first.where} and then {second.where}", deadline)
        said = difference(words, [""] * self.world_size, self._num_calls - 1)
        raise MismatchError(
            f"{said}; these are swapped, so the first has mixed their data already; "
            "where ranks take turns like that and mean it, set swaps=False, or compare two calls at once "
            "(comm.checked=2)"
        )

    def _gathered(self, mine: Sequence[int], deadline: Deadline) -> list[Row]:
        """Return every rank's numbers, by rank."""
        source = torch.from_numpy(np.array(mine, np.int64)).to(self.device_type)  # torch.tensor takes ten times as long
        target = self._targets.get(len(mine))
        if target is None:
            target = self._targets[len(mine)] = source.new_empty((self.world_size, len(mine)))
        self._gather(target, source, deadline.left_s)
        rows: list[Row] = target.tolist()
        return rows

    def _words(self, mine: str, deadline: Deadline) -> list[str]:
        """Return every rank's words, by rank; the end of them, if they are long."""
        data = mine.encode(errors="backslashreplace")[-WORDS_BYTES:].ljust(WORDS_BYTES, b"\0")
        rows = self._gathered(torch.frombuffer(bytearray(data), dtype=torch.int64).tolist(), deadline)
        texts = (torch.tensor(row, dtype=torch.int64).numpy().tobytes() for row in rows)
        return [text.rstrip(b"\0").decode(errors="replace") for text in texts]


class _Asked(threading.local):
    """What a thread has been asked for, on its way from the public method to the hook."""

    call: Call | None = None


def described(kind: str, given: Sequence[Any], site: CallSite | None) -> Call:
    """Return the call of a collective with these tensors, root and op, as far as it has them."""
    op = root = None
    for one in given:
        if isinstance(one, ReduceOp):
            op = one
        elif isinstance(one, int):
            root = one
    like = given[BLOCK.get(kind, 0)] if given else None
    if like is None:
        return Call(kind, 0, None, op, root, (), site)
    return Call(kind, like.numel(), like.dtype, op, root, tuple(like.shape), site)


def swapped(before: Sequence[Row], now: Sequence[Row]) -> bool:
    """Return whether two ranks have run two functions, that call the same, one in the other's order."""
    if before[0][1] != now[0][1]:
        return False
    turns = {(tuple(first[2:]), tuple(second[2:])) for first, second in zip(before, now, strict=True)}
    return len(turns) > 1 and any(
        (second, first) in turns for first, second in turns if first[1] != second[1] and first[0] and second[0]
    )


def difference(whats: Sequence[str], wheres: Sequence[str], number: int) -> str:
    """Say what ranks call, and where, that do not call the same: first those in the minority.

    Of as many ranks as others those without the lowest one come first.
    """
    counts = Counter(whats)
    groups = sorted(counts, key=lambda what: (counts[what], -whats.index(what)))
    said = [
        _said(what, [where if what == one else None for one, where in zip(whats, wheres, strict=True)])
        for what in groups
    ]
    return f"{'; '.join(said)}; every rank has to call the same (collective {number} of this communicator)"


def _said(what: str, wheres: Sequence[str | None]) -> str:
    """Say who calls ``what``, where; None for the ranks that call something else."""
    places = [where for where in dict.fromkeys(wheres) if where is not None]
    return ", ".join(
        f"{_ranks([rank for rank, one in enumerate(wheres) if one == where])} {what} {where}".rstrip()
        for where in places
    )


def _ranks(ranks: Sequence[int]) -> str:
    *most, last = map(str, ranks)
    return f"ranks {', '.join(most)} and {last} call" if most else f"rank {last} calls"


@functools.lru_cache(maxsize=4096)
def _hash(values: tuple[Any, ...]) -> int:
    """Return a number that is the same in all processes, unlike that of `hash`."""
    return int.from_bytes(hashlib.blake2b(repr(values).encode(), digest_size=8).digest(), "little", signed=True)
