"""A port for ranks that are told where to meet before anybody listens there."""

from __future__ import annotations

import random
import socket
from pathlib import Path

FIRST = 20000


def free_port() -> int:
    """Return a port that nobody listens on, and that the system gives to nobody who asks for any.

    A port that the system gave, and that was let go again, it may give to the next connection before the ranks meet.
    """
    low, _ = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    candidates = range(FIRST, low)
    while True:
        port = random.SystemRandom().choice(candidates)  # a seed of the test would give the same one to all
        try:
            socket.create_server(("", port)).close()
        except OSError:
            continue
        return port
