"""Schedules over a transport: the communicator of every algorithm."""

from __future__ import annotations

import logging
import pkgutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from backends.scheduled import ScheduledCommunicator
from minidist.analysis.prove import prove
from minidist.communicator import Communicator, Device, ReduceOp, Shape, Work
from minidist.errors import CommError, ScheduleError
from minidist.schedule import COLLECTIVES, Schedule, Step

log = logging.getLogger(__name__)
MAX_PROVED = 256
"""The most ranks on which a schedule is proved before it runs; that takes up to some ten seconds."""


class AlgorithmCommunicator(ScheduledCommunicator):
    """Runs the collectives that it has schedules for; the transport does everything else.

    It takes the transport over, and closing it closes the transport. Several can share a transport, each on a
    channel of its own; they share its traffic and the order of its operations. A schedule is proved for the world size
    when it is first used, on every rank, before it touches a tensor.

    Args:
        transport: the communicator that moves the bytes.
        schedules: a schedule, or the dotted path of one, by the name of its collective; None is the transport's own.
        timeout_s: None for the transport's.
        segment_bytes: see `ScheduledCommunicator`.

    Raises:
        ValueError: a schedule cannot be found, or there is no such collective.
    """

    def __init__(
        self,
        transport: Communicator,
        schedules: Mapping[str, Schedule | str | None],
        timeout_s: float | None = None,
        segment_bytes: int = 2**22,
    ) -> None:
        super().__init__(
            transport.rank, transport.world_size, transport.timeout_s if timeout_s is None else timeout_s, segment_bytes
        )
        self.transport = transport
        self.schedules = {name: _found(name, schedule) for name, schedule in schedules.items() if schedule is not None}
        self._plans: dict[tuple[Any, ...], list[Step]] = {}  # proved; the steps of this rank
        # One order for everything that runs on the transport, whoever starts it.
        self.traffic, self._progress = transport.traffic, transport._progress
        self.device_type = transport.device_type  # type: ignore[misc]  # the class's is only the default
        self.overlaps = transport.overlaps
        self.checks_sizes, self.checks_dtypes = transport.checks_sizes, transport.checks_dtypes
        self._root, self._channel = transport._root, transport._new_channel()

    def empty(self, shape: Shape, dtype: torch.dtype = torch.float32, device: Device = None) -> Tensor:
        return self.transport.empty(shape, dtype, device)

    def _steps(self, collective: str, *root: int) -> Iterator[Step]:
        key = collective, *root
        if key not in self._plans:
            self._prove(collective, *root)
            self._plans[key] = list(super()._steps(collective, *root))
        return iter(self._plans[key])

    def _prove(self, collective: str, *root: int) -> None:
        if self.world_size > MAX_PROVED:
            if self.rank == 0:
                log.warning(
                    "%s: its schedule is not proved, as that takes long on more than %d ranks", collective, MAX_PROVED
                )
            return
        try:
            prove(self.schedules[collective], collective, self.world_size, root=next(iter(root), 0))
        except ScheduleError as error:
            raise ScheduleError(f"the schedule is wrong on {self.world_size} ranks; {error}") from None

    def _execute(self, collective: str, chunks: Sequence[Tensor], op: ReduceOp, timeout_s: float, *root: int) -> None:
        super()._execute(collective, chunks, op, self._agree(collective, chunks, op, root, timeout_s), *root)

    def _agree(
        self, collective: str, chunks: Sequence[Tensor], op: ReduceOp, root: Sequence[int], timeout_s: float
    ) -> float:
        return self.transport._agree(collective, chunks, op, root, timeout_s)

    def _isend(self, tensor: Tensor, dst: int, tag: int, timeout_s: float) -> Work:
        return self.transport._isend(tensor, dst, tag, timeout_s)

    def _irecv(self, tensor: Tensor, src: int, tag: int, timeout_s: float) -> Work:
        return self.transport._irecv(tensor, src, tag, timeout_s)

    def _by(self, collective: str, nbytes: int) -> Communicator:
        """Return who runs it on so many bytes: the executor of the base class, or the transport."""
        return super() if collective in self.schedules else self.transport  # type: ignore[return-value]

    def _all_reduce(self, tensor: Tensor, op: ReduceOp, timeout_s: float) -> None:
        self._by("all_reduce", tensor.nbytes)._all_reduce(tensor, op, timeout_s)

    def _reduce(self, tensor: Tensor, dst: int, op: ReduceOp, timeout_s: float) -> None:
        self._by("reduce", tensor.nbytes)._reduce(tensor, dst, op, timeout_s)

    def _broadcast(self, tensor: Tensor, src: int, timeout_s: float) -> None:
        self._by("broadcast", tensor.nbytes)._broadcast(tensor, src, timeout_s)

    def _all_gather(self, output: Tensor, input: Tensor, timeout_s: float) -> None:
        self._by("all_gather", output.nbytes)._all_gather(output, input, timeout_s)

    def _reduce_scatter(self, output: Tensor, input: Tensor, op: ReduceOp, timeout_s: float) -> None:
        self._by("reduce_scatter", input.nbytes)._reduce_scatter(output, input, op, timeout_s)

    def _gather(self, output: Tensor | None, input: Tensor, dst: int, timeout_s: float) -> None:
        self._by("gather", input.nbytes * self.world_size)._gather(output, input, dst, timeout_s)

    def _scatter(self, output: Tensor, input: Tensor | None, src: int, timeout_s: float) -> None:
        self._by("scatter", output.nbytes * self.world_size)._scatter(output, input, src, timeout_s)

    def _all_to_all(self, output: Tensor, input: Tensor, timeout_s: float) -> None:
        self._by("all_to_all", input.nbytes)._all_to_all(output, input, timeout_s)

    def _barrier(self, timeout_s: float) -> None:
        self._by("barrier", 1)._barrier(timeout_s)

    def _dispatch(self, run: Callable[[], None], async_op: bool) -> Work:
        return self.transport._dispatch(run, async_op)

    def _split(self, groups: list[list[int]]) -> Communicator | None:
        child = self.transport._split(groups)
        return (
            None if child is None else AlgorithmCommunicator(child, self.schedules, self.timeout_s, self.segment_bytes)
        )

    def _close(self) -> None:
        self.transport.close()

    def _abort(self, reason: str) -> None:
        self.transport.abort(reason)

    def _gone(self) -> Mapping[int, str]:
        return self.transport._gone()

    def _translate(self, error: Exception) -> CommError:
        return self.transport._translate(error)


def _found(collective: str, schedule: Schedule | str) -> Schedule:
    """Return what a dotted path names."""
    if collective not in COLLECTIVES:
        raise ValueError(f"{collective} is not a collective; there are schedules for {', '.join(COLLECTIVES)}")
    if not isinstance(schedule, str):
        return schedule
    try:
        found: Schedule = pkgutil.resolve_name(schedule)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"the schedule {schedule} of {collective} cannot be imported: {error}") from error
    if not callable(found):
        raise ValueError(f"{schedule} is not a schedule but {found!r}; a schedule is a generator function")
    return found
