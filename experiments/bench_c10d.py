"""What torch.distributed costs over a communicator: ``torchrun --nproc-per-node=2 experiments/bench_c10d.py spec=shm``.

All-reduces of the same tensor by the communicator itself, by ``torch.distributed.all_reduce`` over it, and by
torch.distributed over native Gloo, in turn. ``added_us`` is what a call takes longer than the communicator's own.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from statistics import median
from typing import Any

import hydra
import torch
import torch.distributed as dist
from omegaconf import DictConfig

from backends.processes.rendezvous import meet
from experiments.measuring.compare import interleaved, report, sizes
from experiments.running.choices import at_least
from experiments.running.run import CONF, main
from experiments.running.tables import Row
from minidist.communicator import Communicator
from minidist.errors import ConfigError
from minidist.launch import counted_ranks, detect

FORMATS = {"bytes": "d", "variant": "s", "latency_us": ".1f", "added_us": ".1f", "ratio": ".2f"}
GLOO = "torch.distributed, gloo"


def measure(cfg: DictConfig, group: Any, comm: Communicator, nbytes: int) -> list[Row]:
    """Return a row for each of the three."""
    tensor = torch.zeros(nbytes // 4)
    calls: dict[str, Callable[[], object]] = {
        f"{cfg.spec} itself": lambda: comm.all_reduce(tensor),
        f"torch.distributed, {cfg.spec}": lambda: dist.all_reduce(tensor, group=group),
        GLOO: lambda: dist.all_reduce(tensor),
    }
    times = {name: median(s) for name, s in interleaved(calls, comm, cfg.warmup, cfg.iterations, cfg.burst).items()}
    own = next(iter(times.values()))
    return [
        {
            "bytes": nbytes,
            "variant": name,
            "latency_us": seconds * 1e6,
            "added_us": (seconds - own) * 1e6,
            "ratio": seconds / times[GLOO],
        }
        for name, seconds in times.items()
    ]


@hydra.main(version_base="1.3", config_path=CONF, config_name="bench_c10d")
def bench_c10d(cfg: DictConfig) -> None:
    """Compare, print, and write bench_c10d.csv and bench_c10d.json."""
    at_least(cfg, min_bytes=4, max_bytes=4, warmup=0, iterations=1, burst=1, factor=2)
    if detect().launcher == "alone":
        raise ConfigError("there is nothing to compare on one rank; start with torchrun --nproc-per-node=2")
    torch.set_num_threads(1)
    meeting = meet()
    world = meeting.world
    dist.init_process_group(
        "gloo",
        store=meeting.job_store(),
        rank=world.rank,
        world_size=world.world_size,
        timeout=timedelta(seconds=300),
    )
    group: Any = dist.new_group(backend="minidist", pg_options=cfg.spec)
    comm = group._get_backend(torch.device("cpu")).comm
    rows = [row for nbytes in sizes(cfg) for row in measure(cfg, group, comm, nbytes)]
    if comm.rank == 0:
        title = f"all_reduce of float32 in ordinary memory, {counted_ranks(comm.world_size)}"
        path = report(f"{title}, medians of {cfg.iterations} bursts", rows, FORMATS, "bench_c10d")
        print(f"written: {path}.csv, .json", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(bench_c10d)
