"""One rank's place in a group: who it is, whether the group is whole, and how an operation runs and fails."""

from __future__ import annotations

import copy
import time
import warnings
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, ClassVar, NoReturn, Self, final

import torch
from torch import Tensor

from minidist.collective import Run
from minidist.contract import checks, envelope, records
from minidist.contract.carriers import as_carried
from minidist.contract.clock import Clock
from minidist.contract.enveloped import Late
from minidist.contract.forks import Maker
from minidist.contract.fused_step import FusedStep
from minidist.contract.message import Message
from minidist.contract.opaque import opaque_methods
from minidist.contract.open_sends import OpenSends
from minidist.contract.recorder import NO_ENTRY, Entry, Recorder, two_threads
from minidist.contract.reduce_op import ReduceOp
from minidist.contract.staging import Staged, staged
from minidist.contract.standing import Standing
from minidist.contract.traffic import Traffic
from minidist.contract.work import DONE, Progress, Work
from minidist.errors import CommClosedError, CommError, CommTimeoutError, MismatchError, PeerLostError
from minidist.schedule import Schedule


class Membership(ABC):
    """What every communicator shares beneath its operations; see `minidist.communicator.Communicator`."""

    device_type: ClassVar[str] = "cpu"
    """The kind of device whose tensors the hooks take."""
    launcher: ClassVar[str] = "torchrun"
    """What starts several ranks of it: torchrun, mpirun, thread, or none."""
    overlaps: bool = True
    """Whether an operation that runs beside computation gains time; not where both would need the same core."""
    checks_sizes: bool = False
    """Whether a message of another size than its receive expects makes the receive raise MismatchError."""
    checks_dtypes: bool = False
    """Whether that holds for a message of another dtype too. Where not, `minidist.contract.envelope` sees to both."""
    receives_from_any: bool = False
    """Whether a receive may leave open whom it comes from. Messages of a tag then have to go to their receives in the
    order in which these were posted, whether they name a source or not, unless ``checks_dtypes``."""
    clock: Clock = Clock()
    """What its operations, and training over it, are measured with."""
    tag_bits: int = 15
    """How much of a transport's tag is the user's; a channel takes the bits above. The two largest are for collectives:
    one for the messages of schedules, one for collectives that are made of several others."""

    def __init__(self, rank: int, world_size: int, timeout_s: float = 300.0) -> None:
        checks.group(rank, world_size, timeout_s)
        self.rank = rank
        self.world_size = world_size
        self.timeout_s = timeout_s
        self.traffic = Traffic()
        self.recorder = Recorder(rank, world_size, type(self).__name__)
        self.recorder.asks(self._standings)
        self._maker = Maker(f"[rank {rank}/{world_size}] ")
        self._progress = Progress(f"minidist-rank{rank}", self.traffic, self._maker)
        self._closed = ""
        self._failure: CommError | None = None
        self._last_run = NO_ENTRY  # the collective that runs now, in whatever thread, or ran last
        self._channel = self._num_channels = 0
        self._runs_apart = False  # operations always run in the other thread, which can be left behind
        self._sends = OpenSends()
        self._late_receives: dict[int, Late] = {}  # by tag
        self._root: Membership = self
        self._recorders = weakref.WeakValueDictionary({0: self.recorder})  # by channel, where this is the root

    @classmethod
    def check_available(cls) -> None:
        """Raise BackendUnavailableError if this machine or this launcher lacks what the backend needs for all ranks.

        It starts nothing, so that a job can be refused before any rank runs.
        """
        cls.check_machine()

    @classmethod
    def check_machine(cls) -> None:
        """Raise BackendUnavailableError if this machine lacks what the backend needs, be it for its own ranks alone."""
        return

    @final
    def close(self) -> None:
        """Wait for what was started, then leave the group. A second close does nothing, nor one in a fork.

        For messages that nobody receives it waits 30 s, or ``timeout_s`` if that is less, and warns of them.
        """
        if not self._closed and self._maker.is_here:
            self._progress.finish()
            if self._failure is None and (lost := self._sends.finish(self.timeout_s)):
                warnings.warn(f"{self.who('close')}: {lost}", stacklevel=2)
            self._closed = "it is closed"
            self.recorder.is_closed = True
            self._close()

    @final
    def abort(self, reason: str) -> None:
        """Leave at once and make the other ranks raise PeerLostError with ``reason``; in a fork, do nothing."""
        if not self._closed and self._maker.is_here:
            self._closed = f"it was aborted: {reason}"
            self.recorder.can_ask = False
            self._progress.stop()
            self._abort(reason)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is None:
            return self.close()
        # A CommError says only that another rank has gone, or has not come.
        where = ""
        if not isinstance(error, CommError):
            where = self.recorder.raised(error, traceback)
            records.write(f"{type(error).__name__}: {error}", [self.recorder.world_rank])
        self.abort(f"{type(error).__name__}: {error}{where}")

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        opaque_methods(cls)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Return this communicator: a copy of what uses it talks over the same one."""
        return self

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError(f"{self.who('pickle')}: a communicator belongs to its process; make one in the other process")

    def __repr__(self) -> str:
        return f"{type(self).__name__}(rank={self.rank}, world_size={self.world_size})"

    # How operations run -----------------------------------------------------------------------

    @final
    def who(self, operation: str) -> str:
        """Return the beginning of every message: this rank and the operation."""
        return f"[rank {self.rank}/{self.world_size}] {operation}"

    @property
    def max_tag(self) -> int:
        """The largest tag of a message: 32765, and 2**31 - 3 on transports of one machine, which have longer ones."""
        return (1 << self.tag_bits) - 3

    @final
    def ensure_usable(self, operation: str) -> None:
        """Raise if no operation can be started any more."""
        if self._closed or self._failure is not None or not self._maker.is_here or self._gone():
            self._refuse(operation)

    @final
    def in_order(self, job: Callable[[], None], async_op: bool = False) -> Work:
        """Run ``job``, which may call this communicator's operations, as one operation in the order of the others.

        Every rank calls it with a job that starts the same operations; what it raises is raised by the Work.
        """
        self.ensure_usable("in_order")
        if not async_op and self._progress.idle:
            job()
            return DONE
        return self._dispatch(self.recorder.placed(job), async_op)

    def _refuse(self, operation: str) -> NoReturn:
        """Say why this communicator cannot be used."""
        self._maker.ensure_here(operation)
        if self._closed:
            raise CommClosedError(f"{self.who(operation)}: the communicator cannot be used, {self._closed}")
        if self._failure is None:
            why = self._lost() if self._gone() else two_threads(self.rank, self._last_run)
            self._fail(operation, why, self.recorder.note(operation, (), ()))
        failure = copy.copy(self._failure)
        failure.args = (f"{self.who(operation)}: unusable since {self._failure}",)
        raise failure

    def _tag(self, tag: int) -> int:
        """Return the tag that keeps this communicator's messages apart from others on one transport."""
        return tag + (self._channel << self.tag_bits)

    @property
    def _schedule_tag(self) -> int:
        """The tag of all messages of schedules."""
        return self._tag(self.max_tag + 2)

    def _run(
        self,
        operation: str,
        tensors: Sequence[Tensor | None],
        args: tuple[int | ReduceOp | FusedStep, ...],
        async_op: bool,
        timeout_s: float | None,
        keep: bool = False,
    ) -> Work:
        """Run a collective on ``tensors``, of which it only reads the first with ``keep``.

        ``args`` is what its hook takes besides: a root, an op, or the one and then the other; or a whole step.
        """
        self.ensure_usable(operation)
        seconds = self.timeout_s if timeout_s is None else checks.timeout(self, operation, timeout_s)
        entry = self.recorder.note(operation, tensors, args)
        divisor = 1 if args and isinstance(args[-1], ReduceOp) else 0
        if ReduceOp.AVG in args:
            divisor = self.world_size  # before the sum, which could overflow float16
            args = (*args[:-1], ReduceOp.SUM)
        own_block = self.rank if operation == "all_gather" else None
        job = staged(self._collective(operation), tensors, self.device_type, divisor, keep, own_block)
        if job is None:
            return DONE

        def run() -> None:
            # By one that ran before this one, and met nobody; or by one that runs yet.
            if self._closed or self._failure is not None or self._last_run.ended is None:
                self._refuse(operation)
            self.recorder.num_started = entry.number = self.recorder.num_started + 1
            self._last_run, entry.began, started = entry, time.perf_counter(), self.clock.now_s()
            try:
                job(*args, seconds)
            except Exception as error:
                self._fail(operation, error, entry)
            except BaseException as error:  # this rank did a part of it, so it is out of step with the others
                self._failure = CommError(f"{self.who(operation)}: interrupted by {type(error).__name__}")
                raise
            finally:
                entry.ended = time.perf_counter()
                self.traffic.seconds += self.clock.now_s() - started

        return self._dispatch(run, async_op)

    def _dispatch(self, run: Callable[[], None], async_op: bool) -> Work:
        """Run an operation after those that were started before it: here, or in the thread that runs those."""
        if (async_op or self._runs_apart or not self._progress.idle) and not self._progress.in_job:
            work = self._progress.submit(run)
            if not async_op:
                work.wait()
            return work
        before = self.traffic.seconds
        run()
        self.traffic.blocked_seconds += self.traffic.seconds - before
        return DONE

    def _transfer(
        self,
        operation: str,
        hook: Callable[[Tensor, int, int, float], Work],
        tensor: Tensor,
        peer: int,
        tag: int,
        timeout_s: float | None,
    ) -> Work:
        self.ensure_usable(operation)
        seconds = self.timeout_s if timeout_s is None else checks.timeout(self, operation, timeout_s)
        entry = self.recorder.note(operation, (tensor,), (peer, tag))
        staged_tensor = Staged(tensor.detach(), self.device_type)
        if operation == "isend":
            staged_tensor.load()
            if tensor.numel():
                self.traffic.count(tensor.nbytes)
        memory = as_carried(staged_tensor.memory)
        post = envelope.send if operation == "isend" else envelope.receive
        try:
            if self.checks_dtypes:
                work = hook(memory, peer, self._tag(tag), seconds)
            else:
                work = post(self, hook, memory, peer, tag, seconds)
        except Exception as error:
            self._fail(operation, error, entry)
        message = Message(self, operation, work, staged_tensor, peer, tag, entry)
        if operation == "isend":
            self._sends.add(message)
        return message

    def _fail(self, operation: str, error: Exception, entry: Entry | None = None) -> NoReturn:
        """Raise what ``error`` means to the caller; nothing works on this communicator after it.

        Args:
            operation: what the caller has called.
            error: what became of it.
            entry: its record, if it has one.
        """
        failure = self._failed(operation, error, entry)
        if failure is error:
            raise failure
        raise failure from error

    def _failed(self, operation: str, error: Exception, entry: Entry | None) -> CommError:
        """Return what `_fail` raises."""
        if self._closed:
            failure: CommError = CommClosedError(self._closed)
        elif isinstance(error, PeerLostError) and self._gone():
            failure = self._lost()  # in this group's numbering: the error may come from a communicator beneath
        else:
            failure = error if isinstance(error, CommError) else self._translate(error)
        is_first = self._failure is None
        failure.args = (f"{self.who(operation)}: {self._explained(failure, entry) if is_first else failure}",)
        self.recorder.fail(entry)
        if is_first:
            records.write(str(failure), [self.recorder.world_rank])
            self._failure = failure
        return failure

    def _explained(self, failure: CommError, entry: Entry | None) -> str:
        """Return what it says, with who waits where for whom, or what differs, and what this rank has called."""
        said = str(failure)
        if self.world_size == 1 or not self.recorder.explains or self._closed:
            return said
        if self._is_explained(failure):
            said = records.explained(failure, entry, self.recorder, self._gone())
        # Not twice: most often what the ranks say when they are asked tells it, too.
        return said if entry is None or entry.where in said else f"{said}; rank {self.rank} calls {entry}"

    def _is_explained(self, failure: CommError) -> bool:
        """Whether the ranks ask each other where they are because of a failure; not for what says that itself."""
        return isinstance(failure, CommTimeoutError | MismatchError)

    @property
    def _channels(self) -> list[int]:
        """Those that it knows of its transport, which this is."""
        return list(self._recorders)

    @final
    def _standing(self, channel: int) -> Standing | None:
        """Return how far this rank has come on a channel of its transport, which this is; None if it has none."""
        recorder = self._recorders.get(channel)
        return None if recorder is None else recorder.standing()

    def _lost(self) -> PeerLostError:
        """Name the rank that left first: the others most often left because of it."""
        rank, why = next(iter(self._gone().items()))
        return PeerLostError(f"rank {rank} is gone: {why}", (rank,))

    # Hooks: what a backend may add ------------------------------------------------------------

    @abstractmethod
    def _collective(self, name: str) -> Callable[..., None]:
        """Return what runs a collective; see `minidist.communicator.Communicator`."""

    def _close(self) -> None:
        """Release what the backend holds; called once."""
        return

    def _abort(self, reason: str) -> None:
        """Tell the other ranks why this one leaves and unblock what is running; never wait."""
        self._close()

    def _gone(self) -> Mapping[int, str]:
        """Return the ranks that are known to be gone and why, the first to go first."""
        return {}

    def _standings(self, channel: int, timeout_s: float) -> Mapping[int, Standing]:
        """Return how far each rank has come on a channel, as far as they answer within ``timeout_s``.

        Ranks answer that hang, too: another thread than their own, and on another way than data takes. Here nothing is
        known; what ranks write down is then all that there is, see `minidist.contract.records`.
        """
        return {}

    def _agree(
        self, collective: str, numel: int, dtype: torch.dtype, op: ReduceOp, root: int, timeout_s: float
    ) -> float:
        """Compare what all ranks are about to run as a schedule over this transport; return the seconds left for it.

        For a transport that takes messages of other sizes than it expects badly; it raises MismatchError. ``numel`` is
        that of the tensor where a schedule may cut it, else of a block.
        """
        return timeout_s

    def _whole(
        self, schedule: Schedule, run: Run, numel: int, dtype: torch.dtype, tag: int
    ) -> Callable[[Sequence[Tensor], ReduceOp, float], None] | None:
        """Return what runs a schedule on tensors of a shape as one operation; None if message by message is best.

        Every rank answers alike. It is called with contiguous memory, see `backends.executor.layout`, the op and the
        seconds that it may take.

        Args:
            schedule: what it does.
            run: what collective that is.
            numel: see `_agree`.
            dtype: of the tensors.
            tag: what the messages of this schedule have, and those of no other communicator on this transport.
        """
        return None

    def _translate(self, error: Exception) -> CommError:
        """Return what an error of the backend's library means; the one place where they are mapped."""
        return CommError(f"{type(error).__name__}: {error}")
