"""One collective on several communicators, size by size: ``torchrun --nproc-per-node=2 experiments/bench.py``.

busbw is the bandwidth that the wires carry under the best algorithm, as nccl-tests defines it; ``ratio`` is the
time of the first communicator over this one's; ``volume`` is what all ranks send, where that is counted, in parts of
the least that the collective can do with; ``wrong`` counts elements that differ from the closed form. The row ``limit``
is what the memory of this host allows: the additions and copies of the shared-memory all-reduce, on the same memory,
without waiting for anybody. With ``fresh=true`` each rank writes its input before each call, outside of the time that
counts: repeated calls flatter, as what a rank combines stays in the cache of its core.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

import hydra
import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor

from backends.shm.communicator import ShmCommunicator
from experiments.drawing.pictures import LIMIT, draw_bandwidth
from experiments.measuring.collectives import Repeated
from experiments.measuring.compare import Action, communicators, interleaved, report, sizes
from experiments.running.choices import at_least, several
from experiments.running.run import CONF, main
from experiments.running.tables import Row
from minidist.collective import COLLECTIVES
from minidist.communicator import Communicator, ReduceOp
from minidist.errors import ConfigError
from minidist.launch import counted_ranks

FORMATS = {
    "bytes": "d",
    "count": "d",
    "dtype": "s",
    "op": "s",
    "comm": "s",
    "latency_us": ".1f",
    "p95_us": ".1f",
    "algbw_GBps": ".2f",
    "busbw_GBps": ".2f",
    "ratio": ".2f",
    "volume": "s",
    "wrong": "d",
}
MAX_BURST_BYTES = 2**28
"""Large sizes get shorter bursts."""


def measure(cfg: DictConfig, comms: dict[str, Communicator], nbytes: int) -> list[Row]:
    """Return one row per communicator."""
    dtype: torch.dtype = getattr(torch, cfg.dtype)
    numel = nbytes // dtype.itemsize
    first = next(iter(comms.values()))
    collectives = {name: Repeated(cfg, comm, numel) for name, comm in comms.items()}
    actions: dict[str, Action] = {name: collective.run for name, collective in collectives.items()}
    before: dict[str, Action] = {name: collective.renew for name, collective in collectives.items() if cfg.fresh}
    if cfg.collective == "all_reduce" and (shm := _shared_memory(comms)):
        tensor = shm.empty(numel, dtype).zero_()
        actions[LIMIT] = shm.without_meetings(tensor)
        if cfg.fresh:
            before[LIMIT] = lambda: _renew(shm, tensor)
    burst = max(2, min(cfg.burst, MAX_BURST_BYTES // nbytes))
    seconds = interleaved(actions, first, cfg.warmup, cfg.iterations, burst, before)
    volume = {name: _volume(cfg.collective, one, comms[name], first) for name, one in collectives.items()}
    wrong = {name: sum(first.all_gather_object(collective.num_wrong())) for name, collective in collectives.items()}
    reference = median(next(iter(seconds.values())))
    rows: list[Row] = []
    for name, times in seconds.items():
        rows.append(
            {
                "bytes": nbytes,
                "count": numel,
                "dtype": cfg.dtype,
                "op": cfg.op,
                "comm": name,
                **_speed(times, nbytes, COLLECTIVES[cfg.collective].bus_factor(first.world_size)),
                "ratio": reference / median(times),
                "volume": volume.get(name, "-"),
                "wrong": wrong.get(name, 0),
            }
        )
    return rows


def _speed(times: Sequence[float], nbytes: int, bus_factor: float) -> dict[str, float]:
    algbw = nbytes / median(times) / 1e9
    return {
        "latency_us": median(times) * 1e6,
        "p95_us": float(np.percentile(times, 95, method="higher")) * 1e6,
        "algbw_GBps": algbw,
        "busbw_GBps": algbw * bus_factor,
    }


def _volume(name: str, collective: Repeated, comm: Communicator, first: Communicator) -> str:
    """Return the bytes that all ranks send over the least possible."""
    before = comm.traffic.bytes
    collective.run()
    sent = comm.traffic.bytes - before
    total = sum(first.all_gather_object(sent))
    return f"{total / COLLECTIVES[name].least_sent(comm.world_size) / collective.nbytes:.2f}" if total else "-"


def _shared_memory(comms: dict[str, Communicator]) -> ShmCommunicator | None:
    return next((comm for comm in comms.values() if isinstance(comm, ShmCommunicator)), None)


def _renew(comm: Communicator, tensor: Tensor) -> None:
    tensor.fill_(1)
    comm.barrier()


def check(cfg: DictConfig) -> None:
    """Refuse settings that mean nothing.

    Raises:
        ConfigError: naming the setting and its choices.
    """
    choices = {
        "collective": [name for name, one in COLLECTIVES.items() if one.has_tensor],
        "op": [op.value for op in ReduceOp],
        "memory": ["empty", "ordinary"],
        "dtype": ["float64", "float32", "float16", "bfloat16", "int64", "int32"],
    }
    for key, allowed in choices.items():
        if cfg[key] not in allowed:
            raise ConfigError(f"{key} must be one of {', '.join(allowed)}, got {cfg[key]}")
    at_least(cfg, min_bytes=1, max_bytes=1, warmup=0, iterations=1, burst=1, factor=2)
    if cfg.max_bytes < cfg.min_bytes:
        raise ConfigError(f"max_bytes must be at least min_bytes = {cfg.min_bytes}, got {cfg.max_bytes}")
    if cfg.in_place and cfg.collective != "all_gather":
        raise ConfigError("in_place=true is for all_gather, whose input is then part of its output; leave it out")


@hydra.main(version_base="1.3", config_path=CONF, config_name="bench")
def bench(cfg: DictConfig) -> None:
    """Compare, print, and write bench.csv, bench.json and bench.png."""
    check(cfg)
    with communicators(several(cfg, "comms")) as comms:
        rows = [row for nbytes in sizes(cfg) for row in measure(cfg, comms, nbytes)]
        first = next(iter(comms.values()))
        if first.rank == 0:
            memory = "in memory from empty()" if cfg.memory == "empty" else "in ordinary memory"
            title = f"{cfg.collective} of {cfg.dtype} {memory}, {counted_ranks(first.world_size)}"
            path = report(f"{title}, medians of {cfg.iterations} bursts", rows, FORMATS, "bench")
            draw_bandwidth(path.with_suffix(".png"), title, rows)
            print(f"written: {path}.csv, .json, .png", flush=True)


if __name__ == "__main__":
    main(bench)
