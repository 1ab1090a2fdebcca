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
    while (attempt := _agreed(store, rank, world_size, word)) is None:
        if time.monotonic() > deadline:
            others = range(1, world_size)
            missing = [0] if rank else [other for other in others if not store.check([f"{word}/{other}"])]
            raise CommTimeoutError(
                f"[rank {rank}/{world_size}] rendezvous: ranks {missing} did not come within {timeout_s:g} s"
            )
        time.sleep(POLL_S)
    return attempt


def _agreed(store: dist.Store, rank: int, world_size: int, word: str) -> str | None:
    """Return the name of this start once this rank has seen that the others, or rank 0 for these, are of it."""
    if rank == 0:
        keys = [f"word{each}" for each in range(world_size)]
        if store.check(keys):
            store.set("words", json.dumps([each.decode() for each in store.multi_get(keys)]))
        return word if store.check([f"{word}/{other}" for other in range(1, world_size)]) else None
    shown: list[str] = json.loads(store.compare_set("words", "", "[]"))
    if word not in shown:
        return None
    store.set(f"{shown[0]}/{rank}", "")
    return shown[0]
