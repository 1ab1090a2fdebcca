"""Operations that were started: the handle, and the thread that runs them in order."""

from __future__ import annotations

import atexit
import contextlib
import functools
import queue
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent import futures
from concurrent.futures import Future, InvalidStateError
from typing import final

from minidist.contract.forks import Maker, only_here
from minidist.contract.library_wait import waits_in_library
from minidist.contract.opaque import opaque_methods
from minidist.contract.traffic import Traffic

EXIT_S = 1.0
"""How long a process that ends waits for a job: one that is cut off inside of torch would crash it."""


class Work(ABC):
    """An operation that was started. It keeps its tensors alive until it is finished.

    Attributes:
        peer: the rank that a message goes to or comes from; where its receive left that open, None until ``wait()``
            has returned; None for all that is no message.
    """

    peer: int | None = None

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        opaque_methods(cls)

    @abstractmethod
    def wait(self) -> None:
        """Block until the operation is finished; raise what it raised. Can be called again."""

    @abstractmethod
    def is_done(self) -> bool:
        """Return whether ``wait()`` would return, or raise, at once."""

    @abstractmethod
    def exception(self) -> BaseException | None:
        """Return what the operation raised; None while it runs and when it went well."""

    @final
    def then(self, callback: Callable[[], None]) -> Work:
        """Return a Work that also calls ``callback`` once, in the thread that first waits."""
        return _Then(self, callback)

    def on_done(self, callback: Callable[[], None]) -> None:
        """Call ``callback`` once the operation is finished, well or not: at once, or in a thread of the library.

        A callback may start operations, which then run at once, and wait for others. It must not raise.
        """
        threading.Thread(target=self._wait_and_call, args=(callback,), daemon=True).start()

    def _wait_and_call(self, callback: Callable[[], None]) -> None:
        with contextlib.suppress(Exception):  # the callback asks for it
            self.wait()
        callback()


class Done(Work):
    """An operation that finished before it was asked for."""

    def wait(self) -> None:
        pass

    def is_done(self) -> bool:
        return True

    def exception(self) -> BaseException | None:
        return None

    def on_done(self, callback: Callable[[], None]) -> None:
        callback()


DONE = Done()


class _Then(Work):
    def __init__(self, work: Work, callback: Callable[[], None]) -> None:
        self._work = work
        self._callback = callback
        self.peer = work.peer
        self._called = False
        self._error: BaseException | None = None

    def wait(self) -> None:
        self._work.wait()
        self.peer = self._work.peer
        if self._error is not None:
            raise self._error
        if not self._called:
            self._called = True
            try:
                self._callback()
            except BaseException as error:  # whatever it is, a second wait raises it again
                self._error = error
                raise

    def is_done(self) -> bool:
        return self._work.is_done()

    def exception(self) -> BaseException | None:
        return self._error or self._work.exception()


class Pending(Work):
    """An operation in the hands of a `Progress` thread."""

    def __init__(self, progress: Progress, future: Future[None], traffic: Traffic, maker: Maker) -> None:
        self._progress = progress
        self._future = future
        self._traffic = traffic
        self._maker = maker

    def wait(self) -> None:
        if not self._maker.is_here and not self._future.done():
            self._maker.ensure_here("wait")  # its thread is not in a fork
        started = time.perf_counter()
        try:
            if self._progress.in_job:
                self._progress.serve_until(self._future)
            self._future.result()
        finally:
            self._traffic.blocked_seconds += time.perf_counter() - started

    def is_done(self) -> bool:
        return self._future.done() or not self._maker.is_here

    def exception(self) -> BaseException | None:
        return self._future.exception() if self._future.done() else None

    def on_done(self, callback: Callable[[], None]) -> None:
        self._future.add_done_callback(lambda future: callback())


class Progress:
    """Runs jobs one after the other in a thread of its own, started by the first job.

    A daemon thread, unlike an executor's: a process whose last collective hangs can still end.

    Attributes:
        is_left_behind: whether a job was given up that goes on in the thread, as nothing can interrupt it.
    """

    def __init__(self, name: str, traffic: Traffic, maker: Maker) -> None:
        self._name = name
        self._traffic = traffic
        self._maker = maker
        self._at_exit = only_here(self.finish)
        self._jobs: queue.SimpleQueue[tuple[Callable[[], None], Future[None]] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        # Entered and left by one thread each, and each at once, so that no lock is needed.
        self._open = dict[Future[None], None]()
        self._in_job = False
        self.is_left_behind = False

    @property
    def idle(self) -> bool:
        """Whether everything that was submitted has finished, with all that was to be called then."""
        return not self._open

    @property
    def serving(self) -> bool:
        """Whether this is its thread: the operation that asks runs beside other work of its rank."""
        return self._thread is not None and threading.current_thread() is self._thread

    @property
    def in_job(self) -> bool:
        """Whether a job of it asks, or what is called at its end, so that what it starts is a part of the job.

        It then runs at once, before the jobs behind, of which another rank may have fewer by now.
        """
        return self.serving and self._in_job

    def submit(self, job: Callable[[], None]) -> Pending:
        """Run ``job`` after all that was submitted before it."""
        future: Future[None] = Future()
        if self._thread is None:
            self._thread = threading.Thread(target=self._serve, name=self._name, daemon=True)
            self._thread.start()
            atexit.register(self._at_exit, EXIT_S)
        self._open[future] = None
        self._jobs.put((job, future))
        return Pending(self, future, self._traffic, self._maker)

    def serve_until(self, future: Future[None]) -> None:
        """In the thread itself, whose callback waits for a later job: run the jobs up to that one first."""
        while not future.done():
            if not self._serve_one():
                self._jobs.put(None)  # the end comes after what callbacks still wait for

    def finish(self, timeout_s: float | None = None) -> None:
        """Let the jobs finish, well or not, and end the thread; wait for that no longer than ``timeout_s``.

        A job may hang, and be given up only meanwhile: so it is waited for, and not the thread that it may hold.
        """
        if self._thread is not None:
            self.stop()
            if not self.serving and not self.is_left_behind:
                unfinished = futures.wait(list(self._open), timeout_s).not_done
                if not unfinished and not self.is_left_behind:
                    self._thread.join(timeout_s)
            atexit.unregister(self._at_exit)
            self._thread = None

    def stop(self) -> None:
        """End the thread after what was submitted, without waiting for it."""
        if self._thread is not None:
            self._jobs.put(None)

    def give_up(self, error: Callable[[], Exception]) -> None:
        """Let whoever waits for a job have ``error`` now; the job that runs is left behind, the others never run.

        For what hangs inside of a library, once that is hopeless; nothing may be submitted any more.
        """
        left = list(self._open)
        self.is_left_behind = self.is_left_behind or bool(left)
        if left and self._thread is not None:
            waits_in_library(self._thread)
        for future in left:
            with contextlib.suppress(InvalidStateError):  # it has ended by itself
                future.set_exception(error())

    def _serve(self) -> None:
        while self._serve_one():
            pass

    def _serve_one(self) -> bool:
        """Run the next job, and what is to be called after it; return whether there was one."""
        item = self._jobs.get()
        if item is None:
            return False
        job, future = item
        outer = self._in_job  # a callback that waits serves the jobs behind its own
        self._in_job = True
        try:
            end = functools.partial(future.set_result, None if future.done() else job())  # done: it was given up
        except BaseException as error:  # whatever it is belongs to the one who waits
            end = functools.partial(future.set_exception, error)
        del item, job  # a served job must not keep its tensors alive
        with contextlib.suppress(InvalidStateError):  # it was given up
            end()  # and call what waits for it
        self._in_job = outer
        del self._open[future]
        return True
