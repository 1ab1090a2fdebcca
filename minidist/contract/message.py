"""A message on its way, between the public side of a communicator and the hook that moves it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import NoReturn, Protocol

from minidist.contract import checks
from minidist.contract.clock import Clock
from minidist.contract.forks import Maker
from minidist.contract.open_sends import OpenSends
from minidist.contract.rank import ANY_SOURCE, Rank
from minidist.contract.recorder import Entry
from minidist.contract.staging import Staged
from minidist.contract.traffic import Traffic
from minidist.contract.work import Work
from minidist.errors import CommError


class Owner(Rank, Protocol):
    """The communicator of a message."""

    clock: Clock
    traffic: Traffic
    _maker: Maker
    _sends: OpenSends

    def _gone(self) -> Mapping[int, str]: ...

    def _fail(self, operation: str, error: Exception, entry: Entry | None = None) -> NoReturn: ...


class Message(Work):
    """A send or receive on its way, with what its caller still expects of it."""

    def __init__(
        self, comm: Owner, operation: str, work: Work, staged_tensor: Staged, peer: int, tag: int, entry: Entry
    ) -> None:
        self._comm = comm
        self.peer = None if peer == ANY_SOURCE else peer
        self._tag = tag
        self._operation = operation
        self._work = work
        self._staged: Staged | None = staged_tensor
        self._error: CommError | None = None
        self._entry = entry

    def wait(self) -> None:
        if self._error is not None:
            raise self._error
        if self._staged is None:
            return
        self._comm._maker.ensure_here(self._operation)
        self._entry.began, started = time.perf_counter(), self._comm.clock.now_s()
        try:
            self._work.wait()
        except Exception as error:
            try:
                self._comm._fail(self._operation, error, self._entry)
            except CommError as failure:
                self._error = failure
                raise
        finally:
            self._entry.ended = time.perf_counter()
            self._comm.traffic.add_blocked(self._comm.clock.now_s() - started)
            self._comm._sends.remove(self)
        if self.peer is None:
            self.peer = self._work.peer
        if self._operation == "irecv":
            self._staged.store()
        self._staged = None

    def __str__(self) -> str:
        assert self._staged is not None  # asked of what was not received
        tensor = self._staged.tensor
        return f"{tensor.numel()} {checks.spell(tensor.dtype)} to rank {self.peer} with tag {self._tag}"

    def failure(self) -> Exception | None:
        """Return why a message that has ended failed; unlike `exception`, that leaves the communicator as it is."""
        error = self._work.exception()
        if isinstance(error, Exception):
            return error
        try:
            self._work.wait()
        except Exception as error:
            return error
        return None

    def is_done(self) -> bool:
        would_raise = not self._comm._maker.is_here or bool(self._comm._gone())
        return self._staged is None or would_raise or self._work.is_done()

    def exception(self) -> BaseException | None:
        if self._error is None and self._staged is not None and self.is_done():
            try:
                self.wait()
            except CommError as error:
                return error
        return self._error
