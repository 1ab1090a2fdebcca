"""Tells every rank which rank is gone, while the data path can only say that some connection broke.

A star of TCP connections beside the data path: every rank holds one to rank 0, which passes the news on.
A connection that ends without a farewell is a process that ended, and one over which nothing comes any more leads to a
host that cannot be reached; the first such news names the cause, and all that follow are its consequences::

    rank 2 closes     2 -> 0   {"rank": 2}                  0 -> 1, 3   the same: rank 2 said farewell
    rank 2 fails      2 -> 0   {"rank": 2, "lost": why}     0 -> 1, 3   the same
    rank 2 is killed  2 -> 0   the connection ends          0 -> 1, 3   {"rank": 2, "lost": "its process ended"}

An outage of the network is survived if it is over within ``outage_s``; 2 s later at the latest it is a loss.

Ranks also ask each other over it how far they have come, see `backends.processes.inquiry`.

To have left is not to be lost: who needs nothing of a rank any more may go on without it. So a farewell only makes the
end of a connection harmless, and whoever finds that it still needs the rank reports it lost.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import secrets
import selectors
import socket
import threading
from collections.abc import Callable
from datetime import timedelta

import torch.distributed as dist

from backends.deadline import Deadline
from backends.processes.inquiry import Inquiry, OwnStanding, nothing_known
from backends.processes.line import SEND_TIMEOUT_S, Line, Message
from minidist.contract.call_site import uncaught
from minidist.contract.forks import closed_in_forks, only_here
from minidist.contract.standing import Standing
from minidist.errors import CommError, CommTimeoutError, PeerLostError

DIED = "its process ended"
CUT = "the connection to it was lost"
OUTAGE_S = 5.0
OVERTAKEN_S = 0.5
"""How long worse news may come after a farewell: they take another way, over another rank's connection."""
EXIT_S = 1.0
"""How long a process that ends waits for what it does about a loss."""


class Lifeline:
    """This rank's end of the star.

    Args:
        store: a store for the ranks of this group alone.
        host: an address of rank 0 of the group.
        rank, world_size: place in the group.
        on_lost: called, in a thread of the lifeline, when a rank is lost.
        timeout_s: for all ranks to connect.
        outage_s: how long a host may be out of reach.
        own_standing: tells how far this rank has come on a channel; called in the lifeline's thread, too.

    Attributes:
        lost: ranks that died, aborted or left while they were needed, and why; the first one first.
        left: ranks that said farewell.
    """

    def __init__(
        self,
        store: dist.Store,
        host: str,
        rank: int,
        world_size: int,
        on_lost: Callable[[], None],
        timeout_s: float,
        outage_s: float = OUTAGE_S,
        own_standing: OwnStanding = nothing_known,
    ) -> None:
        self.rank = rank
        self.lost: dict[int, str] = {}
        self.left: set[int] = set()
        self._on_lost = on_lost
        self._acting = threading.Lock()
        self._leaving = self._exiting = False
        self._news = threading.Condition()
        self._inquiry = Inquiry(rank, own_standing, self._send)
        store.set_timeout(timedelta(seconds=timeout_s))
        if rank == 0:
            self._lines = _serve(store, world_size, timeout_s)
        else:
            self._lines = {0: _connect(store, host, rank, timeout_s)}
        for line in self._lines.values():
            line.notice_outages(outage_s)
        self._listener = threading.Thread(target=self._listen, name=f"lifeline-rank{rank}", daemon=True)
        self._at_exit = only_here(self._finish_acting)
        atexit.register(self._at_exit)
        self._listener.start()

    def report(self, rank: int, why: str) -> None:
        """Tell everybody that ``rank`` is lost."""
        self._learn({"rank": rank, "lost": why}, None)

    def leave(self) -> None:
        """Say farewell and hang up."""
        self._learn({"rank": self.rank}, None)
        self._hang_up()

    def abort(self, why: str) -> None:
        """Tell everybody that this rank fails, and hang up."""
        self.report(self.rank, why)
        self._hang_up()

    def standings(self, channel: int, world_size: int, timeout_s: float) -> dict[int, Standing]:
        """Return how far each rank has come on a channel; of those that are gone, what they said last."""
        if threading.current_thread() is self._listener:
            return {}  # nobody else hears the answers
        with self._news:
            return self._inquiry.ask(channel, world_size, self._news, lambda: self.left | set(self.lost), timeout_s)

    def wait_for_news(self, timeout_s: float, peer: int | None = None) -> None:
        """Wait until ``peer``, or any rank, is known to be gone; a farewell may have been overtaken by worse news."""

        def is_known() -> bool:
            return bool(self.lost) or (bool(self.left) if peer is None else peer in self.left)

        with self._news:
            if self._news.wait_for(is_known, timeout_s):
                self._news.wait_for(lambda: bool(self.lost), OVERTAKEN_S)

    def _hang_up(self) -> None:
        """Close the connections; those of rank 0 carry the others' news until the others hang up."""
        # The listener of rank 0 goes on in its daemon thread. If the process of rank 0 ends before the others have
        # left, they hear no more of each other; rank 0 itself has said farewell, so its end alarms nobody.
        if self.rank != 0:
            self._leaving = True
            for line in self._lines.values():
                line.shut_down()  # which also wakes the listener
            self._listener.join()

    def _listen(self) -> None:
        with selectors.DefaultSelector() as selector:
            for rank, line in self._lines.items():
                selector.register(line.socket, selectors.EVENT_READ, rank)
            for rank, line in self._lines.items():
                # What came together with the last message that was read while the ranks met is in no socket any more,
                # so that select would not tell of it.
                for message in line.complete():
                    self._take(message, came_from=rank)
            while selector.get_map() and not self._leaving:
                for key, _ in selector.select(timeout=1.0):
                    self._read(selector, key.data)
        for line in self._lines.values():
            line.socket.close()
        atexit.unregister(self._at_exit)

    def _read(self, selector: selectors.BaseSelector, rank: int) -> None:
        line = self._lines[rank]
        why = DIED
        try:
            messages = list(line.messages())
        except ConnectionResetError:  # by the other end
            messages = [None]
        except (OSError, ValueError):  # it did not answer, there is no way to it, or its last message was cut off
            messages = [None]
            why = f"{CUT} (host {line.host})"
        for message in messages:
            if message is not None:
                self._take(message, came_from=rank)
            elif not self._leaving:  # else it is this rank that hung up
                selector.unregister(line.socket)
                # A farewell comes before the end on the same connection, so by now it has been read.
                if rank not in self.left:
                    self._learn({"rank": rank, "lost": why}, came_from=rank)

    def _take(self, message: Message, came_from: int) -> None:
        if not self._inquiry.concerns(message):
            return self._learn(message, came_from)
        with self._news:
            self._inquiry.take(message, came_from)
            self._news.notify_all()

    def _send(self, message: Message, came_from: int | None) -> None:
        """Send a message of this rank, or pass one on if this is rank 0; under the lock, as messages are not to mix."""
        for peer, line in self._lines.items():
            if peer != came_from:
                line.send(message)

    def _learn(self, message: Message, came_from: int | None) -> None:
        """Take in a message, and pass it on if this is rank 0 or its source."""
        rank = int(message["rank"])
        why = message.get("lost")
        with self._news:
            if why is None:
                self.left.add(rank)
            # The first cause stays. That a rank that left cannot be reached is no news, but that it was needed is: a
            # farewell does not protect from being reported lost.
            elif rank in self.lost or (rank in self.left and str(why).startswith((DIED, CUT))):
                return
            else:
                self.lost[rank] = str(why)
            # Under the lock and before anybody here acts on it: a rank that fails because of this loss aborts, and what
            # it then says of itself must reach every other rank second, or that would be taken for the cause.
            # The rank of which it tells need not hear it; but rank 0 has to, as it tells all others.
            for peer, line in self._lines.items():
                if peer != came_from and (peer != rank or peer == 0):
                    line.send(message)
            self._news.notify_all()
        if why is not None and rank != self.rank:
            self._act()

    def _act(self) -> None:
        """Do what is to be done about a loss; not under the lock of the news, as others go on while it lasts."""
        with self._acting:
            if not self._exiting:
                self._on_lost()

    def _finish_acting(self) -> None:
        """Let no thread be inside of a library when the process ends: torch's C++ takes it for a crash to be cut off.

        If an error ends it, that is told first: what the others hear then is why, and not only that it ended. The
        connections stay as they are: that they end with the process is what the other ranks listen for.
        """
        error = uncaught()
        if error is not None and self.rank not in self.left:
            self.report(self.rank, f"{type(error).__name__}: {error}")
        self._exiting = True  # first: who gets the lock from now on does nothing with it
        if self._acting.acquire(timeout=EXIT_S):
            self._acting.release()


def _serve(store: dist.Store, world_size: int, timeout_s: float) -> dict[int, Line]:
    """Accept the other ranks; strangers, who do not know the store's secret, are turned away."""
    lines: dict[int, Line] = {}
    if world_size == 1:
        return lines
    deadline = Deadline(timeout_s)
    with contextlib.ExitStack() as opened, closed_in_forks(_server(world_size)) as server:
        secret = secrets.token_hex(16)
        store.set("lifeline", json.dumps([server.getsockname()[1], secret]))
        while len(lines) < world_size - 1:
            server.settimeout(deadline.left_s)
            try:
                line = Line(opened.enter_context(server.accept()[0]))
            except TimeoutError as error:
                missing = sorted(set(range(1, world_size)) - set(lines))
                raise CommTimeoutError(f"[rank 0] ranks {missing} did not come within {timeout_s:g} s") from error
            rank = _accepted_rank(line, secret)
            if rank is None:
                line.socket.close()
            else:
                lines[rank] = line
        opened.pop_all()
    for line in lines.values():
        line.send({"rank": 0, "complete": world_size, "host": socket.gethostname()})
    return lines


def _server(backlog: int) -> socket.socket:
    """Listen on all addresses, of IPv6 too: the others come to whichever their launcher calls rank 0 by."""
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, backlog=backlog, dualstack_ipv6=True)
    return socket.create_server(("", 0), backlog=backlog)


def _accepted_rank(line: Line, secret: str) -> int | None:
    try:
        hello = line.first(SEND_TIMEOUT_S)
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(hello, dict) or hello.get("secret") != secret:
        return None
    line.host = str(hello["host"])
    return int(hello["rank"])


def _connect(store: dist.Store, host: str, rank: int, timeout_s: float) -> Line:
    """Connect to rank 0, and wait until it has heard from everybody."""
    deadline = Deadline(timeout_s)
    try:
        port, secret = json.loads(store.get("lifeline"))
    except dist.DistStoreError as error:
        raise _incomplete(rank, timeout_s) from error
    with contextlib.ExitStack() as opened:
        line = Line(opened.enter_context(_connection(host, port, rank, deadline)))
        try:
            line.send({"rank": rank, "secret": secret, "host": socket.gethostname()})
            answer = line.first(deadline.left_s)
        except TimeoutError as error:
            raise _incomplete(rank, timeout_s) from error
        except ConnectionResetError:
            answer = None  # as if it had hung up in order
        if answer is None:
            raise PeerLostError(f"[rank {rank}] rank 0 is gone: it hung up before all ranks had come", (0,))
        line.host = str(answer["host"])
        opened.pop_all()
    return line


def _connection(host: str, port: int, rank: int, deadline: Deadline) -> socket.socket:
    try:
        return socket.create_connection((host, port), deadline.left_s)
    except TimeoutError as error:
        raise _incomplete(rank, deadline.timeout_s) from error
    except OSError as error:
        raise CommError(
            f"[rank {rank}] cannot connect to rank 0 at {host}, port {port}: {error}; "
            "that address has to lead to its host from all hosts"
        ) from error


def _incomplete(rank: int, timeout_s: float) -> CommTimeoutError:
    return CommTimeoutError(f"[rank {rank}] not every rank came within {timeout_s:g} s")
