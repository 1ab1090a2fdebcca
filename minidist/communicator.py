"""The contract between training code and whatever moves bytes between ranks.

`Communicator` is what users call and what backends implement. The public methods are final: they
check their arguments once, on the rank that made the mistake and before a byte moves, and then
call a hook beneath. A hook may rely on what was checked: tensors are dense, contiguous, on the
backend's own kind of device, not empty, and fit together.

To write a transport, derive from `backends.scheduled.ScheduledCommunicator`; to write something
around or over another communicator, from `backends.wrapper.Wrapper`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, final

import torch
from torch import Tensor

from minidist.contract import checks, objects, uneven
from minidist.contract.fused_step import FusedStep
from minidist.contract.membership import Membership
from minidist.contract.reduce_op import ReduceOp
from minidist.contract.traffic import Traffic
from minidist.contract.work import Work

__all__ = ["Communicator", "ReduceOp", "Traffic", "Work"]

SUM = ReduceOp.SUM
Seconds = float | None
Sizes = Sequence[int]
Shape = int | Sequence[int]
Device = torch.device | str | None


class Communicator(Membership):
    """A fixed group of ranks that exchange tensors.

    Every rank of the group calls the same collectives in the same order with tensors of the same
    size and dtype. One thread at a time uses a communicator.

    All collectives take ``async_op`` and ``timeout_s`` and return a `Work`. With ``async_op=False``
    it is finished on return; with ``async_op=True`` the operation goes on in the background, its
    tensors must be left alone until ``wait()``, and operations of one communicator, also on one tensor,
    run and finish in the order in which they were started. ``timeout_s`` (seconds, None for the communicator's
    own) bounds the operation from the moment it runs.

    dtypes: all floating-point, integer and complex ones of torch, and bool, with what `ReduceOp` says of each; uint64
    and float8_e8m0fnu are only moved. int8, int16, uint16, uint32, float8 and complex32 are combined in a wider dtype.
    Any shape works, numel 0 and non-contiguous included; only the number of elements has to fit.
    ``output`` and ``input`` may share memory: what is sent are the values from before. What is written
    into must not overlap itself.
    CUDA tensors are staged through pinned host memory where the backend does not take them.

    A communicator is a context manager: leaving it closes it, leaving it with an exception aborts
    it, so that the other ranks learn of the failure at once.

    Raises (every method that communicates):
        ValueError, TypeError: wrong arguments; nothing was sent.
        CommTimeoutError: not every rank took part in time.
        PeerLostError: a rank is gone; the message and ``peers`` name it.
        CommClosedError: the communicator is closed or aborted.
        CommError: anything else; after any CommError the communicator is unusable, but for objects.

    Attributes:
        rank: this process's place in the group, 0 to world_size - 1.
        world_size: the number of ranks.
        timeout_s: seconds that an operation may take unless it says otherwise.
        traffic: what this rank has sent so far, and how long operations took.
        purpose: what the operations are for that are started now, told where one of them is wrong; nothing if empty.
        recorder: what it has called last; its ``step`` is for you to set, and then named by errors.
    """

    purpose = ""

    # Point to point ---------------------------------------------------------------------------

    @final
    def send(self, tensor: Tensor, dst: int, tag: int = 0, timeout_s: Seconds = None) -> None:
        """Send ``tensor`` to rank ``dst``; returns once the tensor may be changed again."""
        self.isend(tensor, dst, tag, timeout_s).wait()

    @final
    def recv(self, tensor: Tensor, src: int | None, tag: int = 0, timeout_s: Seconds = None) -> int:
        """Receive into ``tensor`` what rank ``src`` sent with the same ``tag``; return the rank that it came from.

        None for ``src`` takes the message of whoever's comes first; see `irecv`.

        Raises:
            MismatchError: it has another size or dtype; what is in ``tensor`` then means nothing.
            ValueError: ``src`` is None, and `receives_from_any` is not; among other wrong arguments.
        """
        work = self.irecv(tensor, src, tag, timeout_s)
        work.wait()
        assert work.peer is not None  # a message has come, and from somebody
        return work.peer

    @final
    def isend(self, tensor: Tensor, dst: int, tag: int = 0, timeout_s: Seconds = None) -> Work:
        """Start to send ``tensor`` to rank ``dst``.

        Messages between two ranks with one tag arrive in the order in which they were sent. A send
        may wait for its receive. ``tag`` is 0 to `max_tag`. A tensor of no elements is a message too.
        """
        checks.message(self, "isend", tensor, "dst", dst, tag)
        return self._transfer("isend", self._isend, tensor, dst, tag, timeout_s)

    @final
    def irecv(self, tensor: Tensor, src: int | None, tag: int = 0, timeout_s: Seconds = None) -> Work:
        """Start to receive into ``tensor``, which holds the message once ``wait()`` returned; see `recv`.

        With None for ``src``, where `receives_from_any`, the Work's ``peer`` then is the rank that it came from. A
        receive of the same tag that names its source may go before one that does not. While one that does not is open,
        large messages to it, and to those of its tag after it, may move only while this rank waits for them.
        """
        source = checks.source(self, "irecv", tensor, src, tag)
        return self._transfer("irecv", self._irecv, tensor, source, tag, timeout_s)

    # Collectives ------------------------------------------------------------------------------

    @final
    def all_reduce(self, tensor: Tensor, op: ReduceOp = SUM, async_op: bool = False, timeout_s: Seconds = None) -> Work:
        """Combine ``tensor`` over all ranks, in place; every rank ends with identical bits."""
        op = checks.reduction(self, "all_reduce", op, tensor=tensor)
        return self._run("all_reduce", (tensor,), (op,), async_op, timeout_s)

    @final
    def reduce(
        self, tensor: Tensor, dst: int, op: ReduceOp = SUM, async_op: bool = False, timeout_s: Seconds = None
    ) -> Work:
        """Combine ``tensor`` over all ranks into rank ``dst``'s; the others keep theirs."""
        op = checks.reduction(self, "reduce", op, tensor=tensor)
        checks.peer(self, "reduce", "dst", dst)
        return self._run("reduce", (tensor,), (dst, op), async_op, timeout_s, keep=self.rank != dst)

    @final
    def broadcast(self, tensor: Tensor, src: int, async_op: bool = False, timeout_s: Seconds = None) -> Work:
        """Overwrite ``tensor`` on every rank with that of rank ``src``."""
        checks.tensors(self, "broadcast", tensor=tensor)
        checks.peer(self, "broadcast", "src", src)
        return self._run("broadcast", (tensor,), (src,), async_op, timeout_s)

    @final
    def all_gather(
        self,
        output: Tensor,
        input: Tensor,
        async_op: bool = False,
        timeout_s: Seconds = None,
        sizes: Sizes | None = None,
    ) -> Work:
        """Write every rank's ``input`` into ``output`` (world_size times its numel), rank by rank.

        Where the inputs differ in size, ``sizes`` gives the number of elements of each, the same on all ranks.
        """
        if sizes is not None:
            checks.uneven_blocks(self, "all_gather", "output", sizes, output=output, input=input)
            return self.in_order(lambda: uneven.all_gather(self, output, input, sizes, timeout_s), async_op)
        checks.blocks(self, "all_gather", "output", output=output, input=input)
        return self._run("all_gather", (output, input), (), async_op, timeout_s)

    @final
    def reduce_scatter(
        self,
        output: Tensor,
        input: Tensor,
        op: ReduceOp = SUM,
        async_op: bool = False,
        timeout_s: Seconds = None,
        sizes: Sizes | None = None,
    ) -> Work:
        """Combine ``input`` (world_size times output's numel); rank r's ``output`` is block r.

        ``input`` keeps its values, but for those in the memory of ``output``. Where the outputs differ in size,
        ``sizes`` gives the number of elements of each, the same on all ranks.
        """
        op = checks.reduction(self, "reduce_scatter", op, output=output)
        if sizes is not None:
            checks.uneven_blocks(self, "reduce_scatter", "input", sizes, output=output, input=input)
            return self.in_order(lambda: uneven.reduce_scatter(self, output, input, op, sizes, timeout_s), async_op)
        checks.blocks(self, "reduce_scatter", "input", output=output, input=input)
        return self._run("reduce_scatter", (output, input), (op,), async_op, timeout_s)

    @final
    def gather(
        self, output: Tensor | None, input: Tensor, dst: int, async_op: bool = False, timeout_s: Seconds = None
    ) -> Work:
        """Write every rank's ``input`` into rank ``dst``'s ``output``; None on the other ranks."""
        checks.rooted(self, "gather", ("dst", dst), "output", output=output, input=input)
        return self._run("gather", (output, input), (dst,), async_op, timeout_s)

    @final
    def scatter(
        self, output: Tensor, input: Tensor | None, src: int, async_op: bool = False, timeout_s: Seconds = None
    ) -> Work:
        """Write block r of rank ``src``'s ``input`` into rank r's ``output``; None elsewhere."""
        checks.rooted(self, "scatter", ("src", src), "input", output=output, input=input)
        return self._run("scatter", (output, input), (src,), async_op, timeout_s)

    @final
    def all_to_all(
        self,
        output: Tensor,
        input: Tensor,
        async_op: bool = False,
        timeout_s: Seconds = None,
        output_sizes: Sizes | None = None,
        input_sizes: Sizes | None = None,
    ) -> Work:
        """Send block r of ``input`` to rank r; block r of ``output`` comes from rank r.

        Where blocks differ in size, all ranks give both sizes: the number of elements of each block. What a rank sends
        to another one has to be as large as what that one expects.
        """
        if output_sizes is not None or input_sizes is not None:
            sizes = checks.uneven_all_to_all(self, output, input, output_sizes, input_sizes)
            return self.in_order(lambda: uneven.all_to_all(self, output, input, *sizes, timeout_s), async_op)
        checks.equal_blocks(self, "all_to_all", output, input)
        return self._run("all_to_all", (output, input), (), async_op, timeout_s)

    @final
    def barrier(self, async_op: bool = False, timeout_s: Seconds = None) -> Work:
        """Finish once every rank has started it."""
        return self._run("barrier", (), (), async_op, timeout_s)

    @final
    def all_gather_object(self, obj: Any, timeout_s: Seconds = None) -> list[Any]:
        """Return every rank's picklable ``obj``, by rank. Unpickles: only among trusted ranks.

        Raises:
            TypeError: ``obj`` cannot be pickled.
            CommError: another rank's cannot, or it cannot be unpickled here. In all three cases every rank has
                taken part, and the communicator goes on.
        """
        return objects.all_gather_object(self, obj, timeout_s)

    @final
    def broadcast_object(self, obj: Any, src: int, timeout_s: Seconds = None) -> Any:
        """Return rank ``src``'s picklable ``obj``; the others' is ignored. Unpickles, and raises, likewise."""
        checks.peer(self, "broadcast_object", "src", src)
        return objects.broadcast_object(self, obj, src, timeout_s)

    # Groups and memory ------------------------------------------------------------------------

    @final
    def split(self, color: int | None, key: int = 0) -> Communicator | None:
        """Make a communicator of the ranks that give the same ``color``, ordered by ``key``.

        Every rank calls it. Equal keys keep the order of the ranks. Color None takes part and gets
        None. The new communicator is independent: its operations never meet this one's.
        """
        answers = self.all_gather_object((color, key))
        colors = sorted({c for c, _ in answers if c is not None})
        by_key = sorted(range(self.world_size), key=lambda rank: (answers[rank][1], rank))
        child = self._split([[rank for rank in by_key if answers[rank][0] == c] for c in colors])
        if child is not None:
            mine = [rank for rank in by_key if answers[rank][0] == color]
            child.recorder.among(mine, self.recorder)
            self.traffic.splits.append(child.traffic)
        return child

    def empty(self, shape: Shape, dtype: torch.dtype = torch.float32, device: Device = None) -> Tensor:
        """Return an uninitialised tensor in the memory that this backend moves fastest."""
        return torch.empty(shape, dtype=dtype, device=device or self.device_type)

    def fuses_steps(self, dtype: torch.dtype) -> bool:
        """Whether `fused_step` does something for parameters of this dtype."""
        return False

    @final
    def fused_step(self, step: FusedStep) -> None:
        """Reduce the gradients of a bucket, step its parameters and give them to all ranks, in one pass.

        Only where `fuses_steps`; every rank calls it for the same buckets, as `minidist.ShardedOptimizer` does.
        """
        self._run("fused_step", (step.memory,), (step,), False, None)

    def _start_send(self, tensor: Tensor, dst: int, timeout_s: Seconds) -> Work:
        """Start a message of a collective that is made of some; the messages of its steps are told apart by nothing."""
        return self._transfer("isend", self._isend, tensor, dst, self.max_tag + 1, timeout_s)

    def _start_receive(self, tensor: Tensor, src: int, timeout_s: Seconds) -> Work:
        return self._transfer("irecv", self._irecv, tensor, src, self.max_tag + 1, timeout_s)

    def _new_channel(self) -> int:
        """Agree on a channel that no communicator on the same transport uses; all ranks call it."""
        used: list[int] = self.all_gather_object(self._root._num_channels)
        self._root._num_channels = channel = max(used) + 1
        return channel

    # Hooks: what every communicator implements -------------------------------------------------

    @abstractmethod
    def _isend(self, tensor: Tensor, dst: int, tag: int, timeout_s: float) -> Work:
        """Start a send. Tags are any int below 2**31; ``dst`` is another rank."""

    @abstractmethod
    def _irecv(self, tensor: Tensor, src: int, tag: int, timeout_s: float) -> Work:
        """Start a receive. What comes is as large as ``tensor``, unless ``checks_sizes`` makes others errors.

        ``src`` is another rank; or, only if ``receives_from_any``, ANY_SOURCE: then the Work's ``peer`` has to tell.
        """

    @abstractmethod
    def _collective(self, name: str) -> Callable[..., None]:
        """Return what runs a collective and blocks until it is done.

        It takes the tensors, the root and the op of the public method of that name, in its order and as far as it has
        them, and last ``timeout_s``. The op is never AVG.
        """

    @abstractmethod
    def _split(self, groups: list[list[int]]) -> Communicator | None:
        """Return the communicator of this rank's group (ranks in their new order), if any."""
