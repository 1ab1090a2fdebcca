"""One operation on several communicators, size by size: ``torchrun --nproc-per-node=2 experiments/bench.py``.

busbw is the bandwidth that the wires carry under the best algorithm, as nccl-tests defines it; ``ratio`` is the
time of the first communicator over this one's; ``wrong`` counts elements that differ from the closed form.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import hydra
import torch
from omegaconf import DictConfig
from torch import Tensor

from experiments.compare import Row, communicators, interleaved, median, percentile_95, report
from experiments.run import main
from minidist.communicator import Communicator
from minidist.errors import ConfigError

FORMATS = {
    "bytes": "d",
    "comm": "s",
    "median_us": ".1f",
    "p95_us": ".1f",
    "algbw_GBps": ".2f",
    "busbw_GBps": ".2f",
    "ratio": ".2f",
    "wrong": "d",
}
BUSBW = {
    "all_reduce": lambda n: 2 * (n - 1) / n,
    "reduce_scatter": lambda n: (n - 1) / n,
    "all_gather": lambda n: (n - 1) / n,
    "broadcast": lambda n: 1.0,
}


class Operation:
    """One operation on memory of its own, whose result is known without communication.

    Element i of rank r is i mod 7 + r; sums of few of these are exact in every dtype.
    """

    def __init__(self, name: str, comm: Communicator, numel: int, dtype: torch.dtype) -> None:
        self._name, self._comm = name, comm
        self._numel = numel = numel // comm.world_size * comm.world_size
        self._pattern = (torch.arange(numel) % 7).to(dtype)
        self._large = comm.empty(numel, dtype)
        self._small = comm.empty(numel // comm.world_size, dtype)
        self.fill()

    def fill(self) -> None:
        """Write the input."""
        torch.add(self._pattern, self._comm.rank, out=self._large)
        self._small.copy_(self._block(self._large))

    def run(self) -> None:
        """Run the operation once."""
        comm, large, small = self._comm, self._large, self._small
        {
            "all_reduce": partial(comm.all_reduce, large),
            "reduce_scatter": partial(comm.reduce_scatter, small, large),
            "all_gather": partial(comm.all_gather, large, small),
            "broadcast": partial(comm.broadcast, large, 0),
        }[self._name]()

    def num_wrong(self) -> int:
        """Run once on fresh input, and count the wrong elements."""
        self.fill()
        self.run()
        n = self._comm.world_size
        total = self._pattern * n + n * (n - 1) // 2
        ranks = torch.arange(n, dtype=self._pattern.dtype).repeat_interleave(self._numel // n)
        result, expected = {
            "all_reduce": (self._large, total),
            "reduce_scatter": (self._small, self._block(total)),
            "all_gather": (self._large, self._pattern + ranks),
            "broadcast": (self._large, self._pattern),
        }[self._name]
        return int((result != expected).sum())

    def _block(self, tensor: Tensor) -> Tensor:
        return tensor.view(self._comm.world_size, -1)[self._comm.rank]


def sizes(cfg: DictConfig) -> Iterator[int]:
    """Yield the sizes in bytes."""
    nbytes = cfg.min_bytes
    while nbytes <= cfg.max_bytes:
        yield nbytes
        nbytes *= cfg.factor


def measure(cfg: DictConfig, comms: dict[str, Communicator], nbytes: int) -> list[Row]:
    """Return one row per communicator."""
    dtype = getattr(torch, cfg.dtype)
    first = next(iter(comms.values()))
    operations = {n: Operation(cfg.op, comm, nbytes // dtype.itemsize, dtype) for n, comm in comms.items()}
    actions: dict[str, Callable[[], None]] = {name: operation.run for name, operation in operations.items()}
    seconds = interleaved(actions, first, cfg.warmup, cfg.iterations)
    wrong = {name: sum(first.all_gather_object(operation.num_wrong())) for name, operation in operations.items()}
    reference, rows = median(next(iter(seconds.values()))), []
    for name, times in seconds.items():
        algbw = nbytes / median(times) / 1e9
        busbw = algbw * BUSBW[cfg.op](first.world_size)
        latency = (median(times) * 1e6, percentile_95(times) * 1e6)
        values = (nbytes, name, *latency, algbw, busbw, reference / median(times), wrong[name])
        rows.append(dict(zip(FORMATS, values, strict=True)))
    return rows


@hydra.main(version_base="1.3", config_path="../conf", config_name="bench")
def bench(cfg: DictConfig) -> None:
    """Compare, print, and write bench.csv."""
    if cfg.op not in BUSBW:
        raise ConfigError(f"op must be one of {', '.join(BUSBW)}, got {cfg.op}")
    with communicators(cfg.comms) as comms:
        rows = [row for nbytes in sizes(cfg) for row in measure(cfg, comms, nbytes)]
        first = next(iter(comms.values()))
        if first.rank == 0:
            title = f"{cfg.op} of {cfg.dtype}, {first.world_size} ranks, medians of {cfg.iterations}"
            report(title, rows, FORMATS, "bench.csv")


if __name__ == "__main__":
    main(bench)
