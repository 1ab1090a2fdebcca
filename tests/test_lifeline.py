"""The lifeline's connections: whatever pieces TCP cuts their messages into, none is lost and no rank is turned away."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from backends.processes.lifeline import Lifeline
from minidist.errors import PeerLostError
from tests.harness import ROOT

LIMIT_S = 20.0


class Rank0:
    """Rank 0 as rank 1 of 3 sees it, in the hands of a test."""

    def __init__(self, store: dist.Store) -> None:
        self.server = socket.create_server(("127.0.0.1", 0))
        store.set("lifeline", json.dumps([self.server.getsockname()[1], "secret"]))

    def accept(self) -> None:
        self.line = self.server.accept()[0]
        assert json.loads(self.line.recv(1000)) == {"rank": 1, "secret": "secret", "host": socket.gethostname()}


@contextmanager
def rank_1(news: list[bytes]) -> Iterator[Lifeline]:
    """Yield the lifeline of rank 1 of 3, to which rank 0 sends ``news``, each after the one before it was read."""
    store, made, failed = dist.HashStore(), list[Lifeline](), list[Exception]()
    rank_0 = Rank0(store)

    def make() -> None:
        try:
            made.append(Lifeline(store, "127.0.0.1", 1, 3, lambda: None, LIMIT_S))
        except Exception as error:
            failed.append(error)

    thread = threading.Thread(target=make)
    thread.start()
    rank_0.accept()
    with rank_0.server, rank_0.line as line:
        for piece in news:
            send_after_all_was_read(line, piece)
        if not news:
            line.close()
        thread.join(LIMIT_S)
        if failed:
            raise failed[0]
        yield made[0]
        made[0].leave()


def send_after_all_was_read(line: socket.socket, piece: bytes) -> None:
    until = time.monotonic() + LIMIT_S
    while num_unread(line):
        assert time.monotonic() < until, "what was sent is not read"
    line.sendall(piece)


def num_unread(line: socket.socket) -> int:
    """Return how many bytes the kernel holds for the other end, which is a socket of this host too."""
    ports = f":{line.getpeername()[1]:04X}", f":{line.getsockname()[1]:04X}"
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for row in Path(table).read_text().splitlines()[1:]:
            _, local, remote, _, queues, *_ = row.split()
            if (local[-5:], remote[-5:]) == ports:
                return int(queues.split(":")[1], 16)
    return 0


COMPLETE, LOST, LEFT = (
    json.dumps(message).encode() + b"\n"
    for message in ({"rank": 0, "complete": 3, "host": "h0"}, {"rank": 2, "lost": "boom"}, {"rank": 0})
)


@pytest.mark.parametrize(
    "news",
    [
        [COMPLETE, LOST + LEFT],
        [COMPLETE + LOST + LEFT],
        [COMPLETE + LOST[:7], LOST[7:] + LEFT],
        [COMPLETE[:5], COMPLETE[5:] + LOST, LEFT],
        [bytes([byte]) for byte in COMPLETE + LOST + LEFT],
    ],
    ids=["apart", "in-one-read", "the-second-cut", "the-first-cut", "byte-by-byte"],
)
def test_news_is_heard_in_whatever_pieces_it_comes(news: list[bytes]) -> None:
    with rank_1(news) as lifeline:
        lifeline.wait_for_news(LIMIT_S)
        assert lifeline.lost == {2: "boom"}
        until = time.monotonic() + LIMIT_S
        while lifeline.left != {0}:
            assert time.monotonic() < until, "what came after the news is lost"


def test_a_rank_0_that_hangs_up_before_all_have_come_is_named() -> None:
    with (
        pytest.raises(PeerLostError, match=r"\[rank 1\] rank 0 is gone: it hung up before all ranks had come") as error,
        rank_1([]),
    ):
        pass
    assert error.value.peers == (0,)


STRANGERS = [
    b"",
    b"5\n",
    b"[]\n",
    b'{"rank": 1}\n',
    b'{"rank": 1, "secret": [1]}\n',
    b"GET / HTTP/1.1\r\n",
    b"\xff\n",
    b"[" * 30000 + b"]" * 30000 + b"\n",
    b"without an end" * 10000,
]


def test_strangers_are_turned_away_and_a_hello_in_two_pieces_is_not() -> None:
    store, made = dist.HashStore(), list[Lifeline]()
    thread = threading.Thread(target=lambda: made.append(Lifeline(store, "127.0.0.1", 0, 2, lambda: None, LIMIT_S)))
    thread.start()
    port, secret = json.loads(store.get("lifeline"))
    for words in STRANGERS:
        with socket.create_connection(("127.0.0.1", port)) as stranger:
            stranger.settimeout(LIMIT_S)
            with contextlib.suppress(OSError):  # it may be turned away before it has ended
                stranger.sendall(words)
                stranger.shutdown(socket.SHUT_WR)
            assert nothing_comes(stranger), f"{words[:20]!r} was let in"
    hello: dict[str, Any] = {"rank": 1, "secret": secret, "host": "h1"}
    with socket.create_connection(("127.0.0.1", port)) as rank:
        data = json.dumps(hello).encode() + b"\n"
        send_after_all_was_read(rank, data[:9])
        send_after_all_was_read(rank, data[9:])
        rank.settimeout(LIMIT_S)
        assert json.loads(rank.recv(1000)) == {"rank": 0, "complete": 2, "host": socket.gethostname()}
        thread.join(LIMIT_S)
        made[0].leave()


def nothing_comes(connection: socket.socket) -> bool:
    try:
        return connection.recv(10) == b""
    except ConnectionResetError:
        return True


SLOW_TO_ACT = """
import json, socket, threading, time
import torch.distributed as dist
from backends.processes.lifeline import Lifeline

def act():
    began.set()
    time.sleep(0.5)
    print("acted", flush=True)

began, store = threading.Event(), dist.HashStore()
with socket.create_server(("127.0.0.1", 0)) as server:
    store.set("lifeline", json.dumps([server.getsockname()[1], "secret"]))
    rank_0 = threading.Thread(target=lambda: lines.append(server.accept()[0]))
    lines = []
    rank_0.start()
    made = []
    rank_1 = threading.Thread(target=lambda: made.append(Lifeline(store, "127.0.0.1", 1, 3, act, 20)))
    rank_1.start()
    rank_0.join()
    lines[0].sendall(b'{"rank": 0, "complete": 3, "host": "h0"}\\n{"rank": 2, "lost": "boom"}\\n')
    assert began.wait(20)
"""


def test_a_process_does_not_end_while_its_lifeline_acts_on_a_loss() -> None:
    """To act may be to call torch, and a thread that is cut off there takes the process along."""
    done = subprocess.run([sys.executable, "-c", SLOW_TO_ACT], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert (done.returncode, done.stdout) == (0, "acted\n"), done.stderr
