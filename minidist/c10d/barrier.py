"""A barrier that names who is missing, over the store alone, so that the communicator stays usable."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence

import torch.distributed as dist

from minidist.communicator import Communicator
from minidist.errors import CommTimeoutError

POLL_S = 0.002
VERDICT_S = 5.0
"""How much longer the others wait for what rank 0 has found."""


def monitored_barrier(store: dist.Store, comm: Communicator, timeout_s: float, wait_all_ranks: bool) -> None:
    """Finish once every rank has come.

    Args:
        store: nobody uses it for anything else.
        comm: whose ranks they are.
        timeout_s: for all of them to come.
        wait_all_ranks: whether all missing ranks are named, and not only the first one.

    Raises:
        CommTimeoutError: some did not come.
    """
    begin = f"{comm.who('monitored_barrier')}: "
    if comm.rank != 0:  # torch's words, which programs look for
        begin += (
            f"Rank {comm.rank} successfully reached monitoredBarrier, but received errors while waiting for send/recv "
            "from rank 0: "
        )
    if timeout_s == 0:
        raise CommTimeoutError(f"{begin}Rank {comm.rank} timed out in monitoredBarrier after 0 ms")
    store.set(str(comm.rank), "")
    if comm.rank == 0:
        missing = _missing(store, [str(rank) for rank in range(comm.world_size)], timeout_s)
        store.set("missing", json.dumps(missing))
        # The store may end with rank 0's process.
        readers = [f"read{rank}" for rank in range(1, comm.world_size) if str(rank) not in missing]
        _missing(store, readers, VERDICT_S)
    elif _missing(store, ["missing"], timeout_s + VERDICT_S):
        raise CommTimeoutError(f"{begin}it did not come within {timeout_s * 1e3:.0f} ms")
    missing = json.loads(store.get("missing"))
    store.set(f"read{comm.rank}", "")
    if missing:
        named = missing if wait_all_ranks else missing[:1]
        who = f"Ranks {', '.join(named)}" if wait_all_ranks else f"Rank {named[0]}"
        raise CommTimeoutError(f"{begin}{who} failed to pass monitoredBarrier in {timeout_s * 1e3:.0f} ms")


def _missing(store: dist.Store, keys: Sequence[str], timeout_s: float) -> list[str]:
    """Return the keys that nobody has set in time."""
    deadline = time.monotonic() + timeout_s
    while not store.check(list(keys)):
        if time.monotonic() > deadline:
            return [key for key in keys if not store.check([key])]
        time.sleep(POLL_S)
    return []
