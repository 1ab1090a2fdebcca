"""Ranks that are started again agree on a name for this start, in a store that holds what earlier ones have left.

The store of torchrun's agent outlives the ranks, and the agents' numbers of restarts do not tell the starts apart: an
agent whose rank was lost counts a restart, and one that hears of it from the rendezvous counts none. So each rank puts
a new word under its name. Rank 0 shows the words of all, its own first, again and again, until each other rank has
found its own among them: a list with a word of this start can only have been shown by the rank 0 of this start. ::

    rank 0    word0 = k     words = k s    words = k m    saw k/1: it is k
    rank 1    (word1 = s, of an earlier start)   word1 = m    sees m in words: sets k/1, it is k
"""

from __future__ import annotations

import json
import secrets
import time

import torch.distributed as dist

from minidist.contract.place import POLL_S
from minidist.errors import CommTimeoutError


def agreed_attempt(store: dist.Store, rank: int, world_size: int, timeout_s: float) -> str:
    """Return what rank 0 calls this start of all ranks, a new word; all of them call it, once.

    Raises:
        CommTimeoutError: not all of them came within ``timeout_s``.
    """
    deadline = time.monotonic() + timeout_s
    word = secrets.token_hex(8)
    store.set(f"word{rank}", word)
    attempt, missing = _seen(store, rank, world_size, word)
    while missing:
        if time.monotonic() > deadline:
            raise CommTimeoutError(
                f"[rank {rank}/{world_size}] rendezvous: ranks {missing} did not come within {timeout_s:g} s"
            )
        time.sleep(POLL_S)
        attempt, missing = _seen(store, rank, world_size, word)
    return attempt


def _seen(store: dist.Store, rank: int, world_size: int, word: str) -> tuple[str, list[int]]:
    """Return the name of this start, and the ranks of which this one has not yet seen that they are of it."""
    if rank == 0:
        keys = [f"word{each}" for each in range(world_size)]
        if store.check(keys):
            store.set("words", json.dumps([store.get(key).decode() for key in keys]))
        return word, [other for other in range(1, world_size) if not store.check([f"{word}/{other}"])]
    shown = json.loads(store.compare_set("words", "", "[]"))
    if word not in shown:
        return "", [0]
    store.set(f"{shown[0]}/{rank}", "")
    return shown[0], []
