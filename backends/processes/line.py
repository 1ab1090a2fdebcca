"""A connection of the lifeline, over which ranks send each other objects of JSON."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Iterator
from typing import Any

from minidist.contract.forks import closed_in_forks

PROBE_S = 1
"""How often the kernel asks a silent connection whether its other end is there."""
SEND_TIMEOUT_S = 5.0
READ_BYTES = 2**16
Message = dict[str, Any]


class Line:
    """One connection: a JSON object per line.

    Attributes:
        host: that of the rank at the other end, as it calls itself.
    """

    def __init__(self, connection: socket.socket) -> None:
        self.socket = closed_in_forks(connection)
        self.host = ""
        self._unread = b""
        connection.settimeout(SEND_TIMEOUT_S)

    def notice_outages(self, outage_s: float) -> None:
        """Let the kernel give the connection up when its other end has been silent for longer."""
        # What was heard last may be a probe's time older than the outage. The limit holds for what was sent and not
        # acknowledged too, during which there are no probes.
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        limit_ms = int((outage_s + PROBE_S) * 1000)
        for name, value in (("KEEPIDLE", PROBE_S), ("KEEPINTVL", PROBE_S), ("USER_TIMEOUT", limit_ms)):
            self.socket.setsockopt(socket.IPPROTO_TCP, getattr(socket, f"TCP_{name}"), value)

    def send(self, message: Message) -> None:
        try:
            self.socket.sendall(json.dumps(message).encode() + b"\n")
        except OSError:  # the other end is gone, and its line says so to whoever reads it
            self.shut_down()  # or it does not read: half a message may be on its way, behind which none has a meaning

    def messages(self) -> Iterator[Message | None]:
        """Read once and yield the complete messages; None where the other end hung up."""
        data = self.socket.recv(READ_BYTES)
        self._unread += data
        yield from self.complete()
        if not data:
            yield None

    def complete(self) -> Iterator[Message]:
        """Yield the complete messages among what was read."""
        *lines, self._unread = self._unread.split(b"\n")
        yield from map(json.loads, lines)

    def first(self, timeout_s: float) -> Message | None:
        """Wait for the first message, and keep what comes with it; None where the other end hung up.

        Raises:
            OSError: it does not come in time.
            ValueError: something longer than any first message came.
        """
        deadline = time.monotonic() + timeout_s
        while b"\n" not in self._unread:
            self.socket.settimeout(max(deadline - time.monotonic(), 1e-3))
            data = self.socket.recv(READ_BYTES)
            if not data:
                return None
            self._unread += data
            if len(self._unread) > READ_BYTES:
                raise ValueError(f"more than {READ_BYTES} bytes without an end")
        self.socket.settimeout(SEND_TIMEOUT_S)
        first, _, self._unread = self._unread.partition(b"\n")
        message: Message = json.loads(first)
        return message

    def shut_down(self) -> None:
        with contextlib.suppress(OSError):  # the other end may have been faster
            self.socket.shutdown(socket.SHUT_RDWR)
