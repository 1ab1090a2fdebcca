"""A communicator's Work as torch's: one that torch waits for, or asks for a Future."""

from __future__ import annotations

import threading
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from minidist.communicator import Work
from minidist.errors import CommTimeoutError

ZERO = timedelta(0)


class TorchWork(dist.Work):
    """Torch's view of ``work``.

    Args:
        work: the communicator's.
        result: what its Future holds in the end.
    """

    def __init__(self, work: Work, result: Any) -> None:
        super().__init__()
        self._work = work
        self._result = result
        self._future: Any = None

    def wait(self, timeout: timedelta = ZERO) -> bool:
        """Block until it is finished, and raise what it raised; or CommTimeoutError after ``timeout``, if it is set."""
        if timeout > ZERO and not self._work.is_done():
            done = threading.Event()
            self._work.on_done(done.set)
            if not done.wait(timeout.total_seconds()):
                raise CommTimeoutError(
                    f"wait: not finished within {timeout.total_seconds():g} s; the operation goes on"
                )
        self._work.wait()
        return True

    def get_future(self) -> Any:
        """Return torch's Future of it, whose callbacks run in the thread that finishes it."""
        if self._future is None:
            finished: Any = torch.futures.Future()
            # Not set_exception: that makes the error a value, which C++ takes for tensors.
            self._future = finished.then(self._outcome)
            self._work.on_done(lambda: finished.set_result(None))
        return self._future

    def result(self) -> Any:
        """Return the tensors that it has written."""
        return self._result

    def _outcome(self, finished: Any) -> Any:
        error = self._work.exception()
        if error is not None:
            raise error.with_traceback(None)  # torch makes a text of it, with all frames
        return self._result
