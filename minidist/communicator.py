"""The contract between training code and whatever moves bytes between ranks.

`Communicator` is what users call and what backends implement. The public methods are final: they
check their arguments once, on the rank that made the mistake and before a byte moves, and then
call a hook beneath (`_all_reduce` for `all_reduce`). A hook may rely on what was checked: tensors
are dense, contiguous, on the backend's own kind of device, not empty, and fit together.

To write a backend, derive from `backends.scheduled.ScheduledCommunicator` and implement `_isend`
and `_irecv`; every collective then runs as a schedule over them. Override the hooks that your
transport does better. Every hook gets ``timeout_s`` and must end, one way or another, about then.
"""

from __future__ import annotations

import pickle
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from types import TracebackType
from typing import Any, ClassVar, NoReturn, Self, final

import torch
from torch import Tensor

from minidist import checks
from minidist.errors import CommClosedError, CommError, PeerLostError
from minidist.staging import Staged, staged
from minidist.traffic import Traffic
from minidist.work import DONE, Progress, Work

__all__ = ["Communicator", "ReduceOp", "Traffic", "Work"]


class ReduceOp(Enum):
    """How the values of the ranks are combined. AVG needs floating point; bool only MIN and MAX."""

    SUM = "sum"
    AVG = "avg"
    MIN = "min"
    MAX = "max"
    PRODUCT = "product"


class Communicator(ABC):
    """A fixed group of ranks that exchange tensors.

    Every rank of the group calls the same collectives in the same order with tensors of the same
    size and dtype. One thread at a time uses a communicator.

    All collectives take ``async_op`` and ``timeout_s`` and return a `Work`. With ``async_op=False``
    it is finished on return; with ``async_op=True`` the operation goes on in the background, its
    tensors must be left alone until ``wait()``, and operations of one communicator run and finish
    in the order in which they were started. ``timeout_s`` (seconds, None for the communicator's
    own) bounds the operation from the moment it runs.

    dtypes: float64, float32, float16, bfloat16, int64, int32, uint8, and bool with MIN and MAX.
    Any shape works, numel 0 and non-contiguous included; only the number of elements has to fit.
    CUDA tensors are staged through pinned host memory where the backend does not take them.

    A communicator is a context manager: leaving it closes it, leaving it with an exception aborts
    it, so that the other ranks learn of the failure at once.

    Raises (every method that communicates):
        ValueError, TypeError: wrong arguments; nothing was sent.
        CommTimeoutError: not every rank took part in time.
        PeerLostError: a rank is gone; the message and ``peers`` name it.
        CommClosedError: the communicator is closed or aborted.
        CommError: anything else; after any CommError the communicator is unusable.

    Attributes:
        rank: this process's place in the group, 0 to world_size - 1.
        world_size: the number of ranks.
        timeout_s: seconds that an operation may take unless it says otherwise.
        traffic: what this rank has sent so far, and how long operations took.
    """

    device_type: ClassVar[str] = "cpu"
    """The kind of device whose tensors the hooks take."""
    launcher: ClassVar[str] = "torchrun"
    """What starts several ranks of it: torchrun, mpirun, thread, or none."""

    def __init__(self, rank: int, world_size: int, timeout_s: float = 300.0) -> None:
        checks.group(rank, world_size, timeout_s)
        self.rank, self.world_size, self.timeout_s = rank, world_size, timeout_s
        self.traffic = Traffic()
        self._progress = Progress(f"minidist-rank{rank}", self.traffic)
        self._closed = ""
        self._failure: CommError | None = None
        self._channel = self._num_channels = 0

    # Point to point ---------------------------------------------------------------------------

    @final
    def send(self, tensor: Tensor, dst: int, tag: int = 0, timeout_s: float | None = None) -> None:
        """Send ``tensor`` to rank ``dst``; returns once the tensor may be changed again."""
        self.isend(tensor, dst, tag, timeout_s).wait()

    @final
    def recv(self, tensor: Tensor, src: int, tag: int = 0, timeout_s: float | None = None) -> None:
        """Receive into ``tensor`` what rank ``src`` sent with the same ``tag``, size and dtype."""
        self.irecv(tensor, src, tag, timeout_s).wait()

    @final
    def isend(self, tensor: Tensor, dst: int, tag: int = 0, timeout_s: float | None = None) -> Work:
        """Start to send ``tensor`` to rank ``dst``.

        Messages between two ranks with one tag arrive in the order in which they were sent. A send
        may wait for its receive. ``tag`` is 0 to 32766. A tensor of no elements sends nothing.
        """
        checks.message(self, "isend", tensor, "dst", dst, tag)
        return self._transfer("isend", self._isend, tensor, dst, tag, timeout_s)

    @final
    def irecv(self, tensor: Tensor, src: int, tag: int = 0, timeout_s: float | None = None) -> Work:
        """Start to receive into ``tensor``, which holds the message once ``wait()`` returned."""
        checks.message(self, "irecv", tensor, "src", src, tag)
        return self._transfer("irecv", self._irecv, tensor, src, tag, timeout_s)

    # Collectives ------------------------------------------------------------------------------

    @final
    def all_reduce(
        self,
        tensor: Tensor,
        op: ReduceOp = ReduceOp.SUM,
        async_op: bool = False,
        timeout_s: float | None = None,
    ) -> Work:
        """Combine ``tensor`` over all ranks, in place; every rank ends with identical bits."""
        checks.reduction(self, "all_reduce", op, tensor=tensor)
        op = self._divided(op, tensor)
        return self._run("all_reduce", self._all_reduce, (tensor,), (op,), async_op, timeout_s)

    @final
    def reduce(
        self,
        tensor: Tensor,
        dst: int,
        op: ReduceOp = ReduceOp.SUM,
        async_op: bool = False,
        timeout_s: float | None = None,
    ) -> Work:
        """Combine ``tensor`` over all ranks into rank ``dst``'s; the others keep theirs."""
        checks.reduction(self, "reduce", op, tensor=tensor)
        checks.peer(self, "reduce", "dst", dst)
        if self.rank != dst:
            tensor = tensor.detach().clone()
        op = self._divided(op, tensor)
        return self._run("reduce", self._reduce, (tensor,), (dst, op), async_op, timeout_s)

    @final
    def broadcast(
        self, tensor: Tensor, src: int, async_op: bool = False, timeout_s: float | None = None
    ) -> Work:
        """Overwrite ``tensor`` on every rank with that of rank ``src``."""
        checks.tensors(self, "broadcast", tensor=tensor)
        checks.peer(self, "broadcast", "src", src)
        return self._run("broadcast", self._broadcast, (tensor,), (src,), async_op, timeout_s)

    @final
    def all_gather(
        self, output: Tensor, input: Tensor, async_op: bool = False, timeout_s: float | None = None
    ) -> Work:
        """Write every rank's ``input`` into ``output`` (world_size times its numel), rank by rank."""
        checks.blocks(self, "all_gather", "output", output=output, input=input)
        return self._run("all_gather", self._all_gather, (output, input), (), async_op, timeout_s)

    @final
    def reduce_scatter(
        self,
        output: Tensor,
        input: Tensor,
        op: ReduceOp = ReduceOp.SUM,
        async_op: bool = False,
        timeout_s: float | None = None,
    ) -> Work:
        """Combine ``input`` (world_size times output's numel); rank r's ``output`` is block r.

        ``input`` keeps its values.
        """
        checks.reduction(self, "reduce_scatter", op, output=output)
        checks.blocks(self, "reduce_scatter", "input", output=output, input=input)
        if op is ReduceOp.AVG:  # before the sum, which could overflow float16
            op, input = ReduceOp.SUM, input / self.world_size
        return self._run("reduce_scatter", self._reduce_scatter, (output, input), (op,), async_op, timeout_s)

    @final
    def gather(
        self,
        output: Tensor | None,
        input: Tensor,
        dst: int,
        async_op: bool = False,
        timeout_s: float | None = None,
    ) -> Work:
        """Write every rank's ``input`` into rank ``dst``'s ``output``; None on the other ranks."""
        checks.rooted(self, "gather", ("dst", dst), "output", output=output, input=input)
        return self._run("gather", self._gather, (output, input), (dst,), async_op, timeout_s)

    @final
    def scatter(
        self,
        output: Tensor,
        input: Tensor | None,
        src: int,
        async_op: bool = False,
        timeout_s: float | None = None,
    ) -> Work:
        """Write block r of rank ``src``'s ``input`` into rank r's ``output``; None elsewhere."""
        checks.rooted(self, "scatter", ("src", src), "input", output=output, input=input)
        return self._run("scatter", self._scatter, (output, input), (src,), async_op, timeout_s)

    @final
    def all_to_all(
        self, output: Tensor, input: Tensor, async_op: bool = False, timeout_s: float | None = None
    ) -> Work:
        """Send block r of ``input`` to rank r; block r of ``output`` comes from rank r."""
        checks.exchange(self, "all_to_all", output, input)
        return self._run("all_to_all", self._all_to_all, (output, input), (), async_op, timeout_s)

    @final
    def barrier(self, async_op: bool = False, timeout_s: float | None = None) -> Work:
        """Finish once every rank has started it."""
        return self._run("barrier", self._barrier, (), (), async_op, timeout_s)

    @final
    def all_gather_object(self, obj: Any, timeout_s: float | None = None) -> list[Any]:
        """Return every rank's picklable ``obj``, by rank. Unpickles: only among trusted ranks."""
        data = torch.frombuffer(bytearray(pickle.dumps(obj)), dtype=torch.uint8)
        sizes = torch.empty(self.world_size, dtype=torch.int64, device=self.device_type)
        self.all_gather(sizes, sizes.new_tensor([data.numel()]), timeout_s=timeout_s)
        padded = torch.zeros(int(sizes.max()), dtype=torch.uint8, device=self.device_type)
        padded[: data.numel()].copy_(data)
        output = padded.new_empty((self.world_size, padded.numel()))
        self.all_gather(output, padded, timeout_s=timeout_s)
        rows = zip(output.cpu(), sizes.tolist(), strict=True)
        return [pickle.loads(row[:size].numpy().tobytes()) for row, size in rows]

    @final
    def broadcast_object(self, obj: Any, src: int, timeout_s: float | None = None) -> Any:
        """Return rank ``src``'s picklable ``obj``; the others' is ignored. Unpickles likewise."""
        data = torch.frombuffer(bytearray(pickle.dumps(obj)), dtype=torch.uint8)
        size = torch.tensor([data.numel()], dtype=torch.int64, device=self.device_type)
        self.broadcast(size, src, timeout_s=timeout_s)
        if self.rank != src:
            data = torch.empty(int(size), dtype=torch.uint8)
        data = data.to(self.device_type)
        self.broadcast(data, src, timeout_s=timeout_s)
        return obj if self.rank == src else pickle.loads(data.cpu().numpy().tobytes())

    # Life -------------------------------------------------------------------------------------

    @final
    def split(self, color: int | None, key: int = 0) -> Communicator | None:
        """Make a communicator of the ranks that give the same ``color``, ordered by ``key``.

        Every rank calls it. Equal keys keep the order of the ranks. Color None takes part and gets
        None. The new communicator is independent: its operations never meet this one's.
        """
        answers = self.all_gather_object((color, key))
        colors = sorted({c for c, _ in answers if c is not None})
        groups = [
            [r for _, r in sorted((k, r) for r, (c, k) in enumerate(answers) if c == color)]
            for color in colors
        ]
        return self._split(groups)

    def empty(
        self,
        shape: int | Sequence[int],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Return an uninitialised tensor in the memory that this backend moves fastest."""
        return torch.empty(shape, dtype=dtype, device=device or self.device_type)

    @final
    def close(self) -> None:
        """Wait for what was started, then leave the group. A second close does nothing."""
        if not self._closed:
            self._progress.finish()
            self._closed = "it is closed"
            self._close()

    @final
    def abort(self, reason: str) -> None:
        """Leave at once and make the other ranks raise PeerLostError with ``reason``."""
        if not self._closed:
            self._closed = f"it was aborted: {reason}"
            self._abort(reason)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close() if error is None else self.abort(f"{type(error).__name__}: {error}")

    def __repr__(self) -> str:
        return f"{type(self).__name__}(rank={self.rank}, world_size={self.world_size})"

    # How operations run -----------------------------------------------------------------------

    @final
    def who(self, operation: str) -> str:
        """Return the beginning of every message: this rank and the operation."""
        return f"[rank {self.rank}/{self.world_size}] {operation}"

    @final
    def ensure_usable(self, operation: str) -> None:
        """Raise if no operation can be started any more."""
        if self._closed:
            raise CommClosedError(f"{self.who(operation)}: the communicator cannot be used, {self._closed}")
        if self._failure is not None:
            raise type(self._failure)(f"{self.who(operation)}: unusable since {self._failure}")
        if self._gone():
            self._fail(operation, self._lost())

    def _tag(self, tag: int) -> int:
        """Return the tag that keeps this communicator's messages apart from others on one transport."""
        return tag + (self._channel << 15)

    def _new_channel(self) -> int:
        """Return the channel of the next communicator that is built on this one, the same on all ranks."""
        self._num_channels += 1
        channel = self._channel * 16 + self._num_channels
        if self._num_channels > 15 or channel >= 2**16:
            raise CommError(f"{self!r} carries 15 communicators already; use fewer, or longer")
        return channel

    def _divided(self, op: ReduceOp, tensor: Tensor) -> ReduceOp:
        """Turn an average into a sum; dividing before it, so that float16 does not overflow."""
        if op is not ReduceOp.AVG:
            return op
        tensor.detach().div_(self.world_size)
        return ReduceOp.SUM

    def _run(
        self,
        operation: str,
        hook: Callable[..., None],
        tensors: Sequence[Tensor | None],
        args: Sequence[object],
        async_op: bool,
        timeout_s: float | None,
    ) -> Work:
        self.ensure_usable(operation)
        timeout_s = checks.timeout(self, operation, timeout_s)
        if tensors and all(tensor is None or tensor.numel() == 0 for tensor in tensors):
            return DONE
        job = staged(
            hook, [tensor if tensor is None else tensor.detach() for tensor in tensors], self.device_type
        )

        def run() -> None:
            started = time.perf_counter()
            try:
                job(*args, timeout_s)
            except Exception as error:
                self._fail(operation, error)
            finally:
                self.traffic.seconds += time.perf_counter() - started

        return self._dispatch(run, async_op)

    def _dispatch(self, run: Callable[[], None], async_op: bool) -> Work:
        if async_op or not self._progress.idle:
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
        timeout_s = checks.timeout(self, operation, timeout_s)
        if tensor.numel() == 0:
            return DONE
        copy = Staged(tensor.detach(), self.device_type)
        if operation == "isend":
            copy.load()
            self.traffic.count(tensor.nbytes)
        try:
            work = hook(copy.memory, peer, self._tag(tag), timeout_s)
        except Exception as error:
            self._fail(operation, error)
        return _Message(self, operation, work, copy)

    def _fail(self, operation: str, error: Exception) -> NoReturn:
        """Raise what ``error`` means to the caller; nothing works on this communicator after it."""
        if self._closed:
            failure: CommError = CommClosedError(self._closed)
        else:
            failure = error if isinstance(error, CommError) else self._translate(error)
        failure.args = (f"{self.who(operation)}: {failure}",)
        self._failure = failure
        if failure is error:
            raise failure
        raise failure from error

    def _lost(self) -> PeerLostError:
        """Name the rank that left first: the others most often left because of it."""
        rank, why = next(iter(self._gone().items()))
        return PeerLostError(f"rank {rank} is gone: {why}", (rank,))

    # Hooks: what a backend implements ---------------------------------------------------------

    @abstractmethod
    def _isend(self, tensor: Tensor, dst: int, tag: int, timeout_s: float) -> Work:
        """Start a send. Tags are any int below 2**31; a message to oneself is possible."""

    @abstractmethod
    def _irecv(self, tensor: Tensor, src: int, tag: int, timeout_s: float) -> Work: ...

    @abstractmethod
    def _all_reduce(self, tensor: Tensor, op: ReduceOp, timeout_s: float) -> None:
        """Block until done. ``op`` is never AVG in any hook: the caller divides."""

    @abstractmethod
    def _reduce(self, tensor: Tensor, dst: int, op: ReduceOp, timeout_s: float) -> None:
        """Only dst's result counts: ``tensor`` is scratch on the other ranks."""

    @abstractmethod
    def _broadcast(self, tensor: Tensor, src: int, timeout_s: float) -> None: ...

    @abstractmethod
    def _all_gather(self, output: Tensor, input: Tensor, timeout_s: float) -> None: ...

    @abstractmethod
    def _reduce_scatter(self, output: Tensor, input: Tensor, op: ReduceOp, timeout_s: float) -> None: ...

    @abstractmethod
    def _gather(self, output: Tensor | None, input: Tensor, dst: int, timeout_s: float) -> None: ...

    @abstractmethod
    def _scatter(self, output: Tensor, input: Tensor | None, src: int, timeout_s: float) -> None: ...

    @abstractmethod
    def _all_to_all(self, output: Tensor, input: Tensor, timeout_s: float) -> None: ...

    @abstractmethod
    def _barrier(self, timeout_s: float) -> None: ...

    @abstractmethod
    def _split(self, groups: list[list[int]]) -> Communicator | None:
        """Return the communicator of this rank's group (ranks in their new order), if any."""

    def _close(self) -> None:
        """Release what the backend holds; called once."""
        return

    def _abort(self, reason: str) -> None:
        """Tell the other ranks why this one leaves and unblock what is running; never wait."""
        self._close()

    def _gone(self) -> Mapping[int, str]:
        """Return the ranks that are known to be gone and why, the first to go first."""
        return {}

    def _translate(self, error: Exception) -> CommError:
        """Return what an error of the backend's library means; the one place where they are mapped."""
        return CommError(f"{type(error).__name__}: {error}")


class _Message(Work):
    """A send or receive on its way, with what its caller still expects of it."""

    def __init__(self, comm: Communicator, operation: str, work: Work, copy: Staged) -> None:
        self._comm, self._operation, self._work = comm, operation, work
        self._copy: Staged | None = copy

    def wait(self) -> None:
        if self._copy is None:
            return
        started = time.perf_counter()
        try:
            self._work.wait()
        except Exception as error:
            self._comm._fail(self._operation, error)
        finally:
            self._comm.traffic.add_blocked(time.perf_counter() - started)
        if self._operation == "irecv":
            self._copy.store()
        self._copy = None

    def is_done(self) -> bool:
        return self._copy is None or self._work.is_done()

    def exception(self) -> BaseException | None:
        return self._work.exception()
