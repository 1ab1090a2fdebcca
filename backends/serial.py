"""One rank that talks to nobody, so that training code never has to ask whether it is alone."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from backends.scheduled import ScheduledCommunicator
from minidist.communicator import Work
from minidist.errors import BackendUnavailableError
from minidist.launch import detect


class SerialCommunicator(ScheduledCommunicator):
    """World size 1; every collective is the identity, since its schedule is empty.

    Raises:
        BackendUnavailableError: it was started as one of several ranks.
    """

    launcher: ClassVar[str] = "none"

    def __init__(self, timeout_s: float = 300.0) -> None:
        world = detect()
        if world.world_size > 1:
            raise BackendUnavailableError(
                f"serial is for one rank, but {world.launcher} started {world.world_size}, and each would "
                "train alone; choose comm=gloo or another that communicates"
            )
        super().__init__(0, 1, timeout_s)

    def _isend(self, tensor: Tensor, dst: int, tag: int, timeout_s: float) -> Work:
        raise AssertionError("a rank sends nothing to itself")

    def _irecv(self, tensor: Tensor, src: int, tag: int, timeout_s: float) -> Work:
        raise AssertionError("a rank receives nothing from itself")
