"""One collective on several communicators, size by size: ``torchrun --nproc-per-node=2 experiments/bench.py``.

busbw is the bandwidth that the wires carry under the best algorithm, as nccl-tests defines it; ``ratio`` is the
time of the first communicator over this one's; ``volume`` is what all ranks send, where that is counted, in parts of
the least that the collective can do with; ``wrong`` counts elements that differ from the closed form. The row ``limit``
is what the memory of this host allows: the additions and copies of the shared-memory all-reduce, on the same memory,
without waiting for anybody.
"""

from __future__ import annotations

import hydra
import torch
from omegaconf import DictConfig

from backends.shm.all_reduce import add_and_write
from backends.shm.communicator import ShmCommunicator
from experiments.drawing.pictures import LIMIT, draw_bandwidth
from experiments.measuring.collectives import BUSBW, LEAST, Collective
from experiments.measuring.compare import Action, communicators, interleaved, median, percentile_95, report, sizes
from experiments.running.choices import at_least, several
from experiments.running.run import CONF, main
from experiments.running.tables import Row
from minidist.communicator import Communicator, ReduceOp
from minidist.errors import ConfigError

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
    dtype, first = getattr(torch, cfg.dtype), next(iter(comms.values()))
    collectives = {name: Collective(cfg, comm, nbytes // dtype.itemsize) for name, comm in comms.items()}
    actions: dict[str, Action] = {name: collective.run for name, collective in collectives.items()}
    if cfg.collective == "all_reduce" and (shm := _shared_memory(comms)):
        actions[LIMIT] = _memory_limit(shm, nbytes // dtype.itemsize, dtype)
    burst = max(2, min(cfg.burst, MAX_BURST_BYTES // nbytes))
    seconds = interleaved(actions, first, cfg.warmup, cfg.iterations, burst)
    volume = {name: _volume(cfg.collective, one, comms[name], first) for name, one in collectives.items()}
    wrong = {name: sum(first.all_gather_object(collective.num_wrong())) for name, collective in collectives.items()}
    reference, rows = median(next(iter(seconds.values()))), []
    for name, times in seconds.items():
        algbw = nbytes / median(times) / 1e9
        busbw = algbw * BUSBW[cfg.collective](first.world_size)
        what = (nbytes, nbytes // dtype.itemsize, cfg.dtype, cfg.op, name)
        latency = (median(times) * 1e6, percentile_95(times) * 1e6)
        values = (*what, *latency, algbw, busbw, reference / median(times), volume.get(name, "-"), wrong.get(name, 0))
        rows.append(dict(zip(FORMATS, values, strict=True)))
    return rows


def _volume(name: str, collective: Collective, comm: Communicator, first: Communicator) -> str:
    """Return the bytes that all ranks send over the least possible."""
    before = comm.traffic.bytes
    collective.run()
    sent = comm.traffic.bytes - before
    total = sum(first.all_gather_object(sent))
    return f"{total / LEAST[name](comm.world_size) / collective.nbytes:.2f}" if total else "-"


def _shared_memory(comms: dict[str, Communicator]) -> ShmCommunicator | None:
    return next((comm for comm in comms.values() if isinstance(comm, ShmCommunicator)), None)


def _memory_limit(comm: ShmCommunicator, numel: int, dtype: torch.dtype) -> Action:
    blocks = comm.shared_blocks(comm.empty(numel, dtype).zero_())
    return lambda: add_and_write(blocks, ReduceOp.SUM)


def check(cfg: DictConfig) -> None:
    """Refuse settings that mean nothing.

    Raises:
        ConfigError: naming the setting and its choices.
    """
    choices = {
        "collective": list(BUSBW),
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
            title = f"{cfg.collective} of {cfg.dtype} {memory}, {first.world_size} ranks"
            path = report(f"{title}, medians of {cfg.iterations} bursts", rows, FORMATS, "bench")
            draw_bandwidth(path.with_suffix(".png"), title, rows)
            print(f"written: {path}.csv, .json, .png", flush=True)


if __name__ == "__main__":
    main(bench)
