"""Ranks of torch's own Gloo that dump what torch has recorded while rank 1 has not called what rank 0 waits for."""

from __future__ import annotations

import pickle
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import _dump_fr_trace


def dump_of(num_open: int) -> bytes:
    """Return a dump with only that many entries that torch has not retired, as it does a moment after they end."""
    until = time.monotonic() + 30
    while True:
        dump: bytes = _dump_fr_trace()
        if sum(not entry["retired"] for entry in pickle.loads(dump)["entries"]) == num_open:
            return dump
        assert time.monotonic() < until, "what has ended is not retired"


def main(folder: str) -> None:
    dist.init_process_group("gloo")
    rank, store = dist.get_rank(), dist.distributed_c10d._get_default_store()
    dist.all_reduce(torch.ones(3))
    works = [dist.broadcast(torch.ones(4, dtype=torch.int64), 0, async_op=True) for _ in range(2) if rank == 0]
    works += [dist.all_reduce(torch.ones(5), async_op=True) for _ in range(1) if rank == 0]
    Path(folder, f"trace_rank{rank}").write_bytes(dump_of(num_open=len(works)))
    dist.PrefixStore("dumped", store).set(str(rank), "")
    dist.PrefixStore("dumped", store).wait([str(one) for one in range(dist.get_world_size())])
    if rank == 1:
        works = [dist.broadcast(torch.ones(4, dtype=torch.int64), 0, async_op=True) for _ in range(2)]
        works += [dist.all_reduce(torch.ones(5), async_op=True)]
    for work in works:
        work.wait()
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
