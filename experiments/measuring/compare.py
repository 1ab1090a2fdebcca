"""What the benchmarks share: several communicators in one run, measured in turn, so that noise hits all alike."""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import hydra
import torch
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from experiments.running.build import check_available, communicator
from experiments.running.choices import check_groups
from experiments.running.tables import Row, multiplied, table, write_csv, write_json
from minidist.communicator import Communicator
from minidist.errors import ConfigError
from minidist.launch import detect

Action = Callable[[], object]


@contextmanager
def communicators(names: Sequence[str], key: str = "comms") -> Iterator[dict[str, Communicator]]:
    """Make the communicators that ``names`` (``gloo``, ``ring/mpi``) stand for; close them at the end.

    The names are those of the setting ``key``.

    Each rank gets one thread for its arithmetic: what is compared is communication.

    Raises:
        ConfigError: there is one rank, or a name stands for nothing.
    """
    if detect().launcher == "alone":
        raise ConfigError(
            "there is nothing to compare on one rank; start with torchrun --nproc-per-node=2, or mpirun -n 2"
        )
    check_groups()
    for name in names:
        _check_name(name, key)
    torch.set_num_threads(1)
    sections = {name: hydra.compose("config", overrides=_overrides(name)).comm for name in names}
    for section in sections.values():
        check_available(section)
    with ExitStack() as stack:
        yield {name: stack.enter_context(communicator(section)) for name, section in sections.items()}


def _check_name(name: object, key: str) -> None:
    allowed = GlobalHydra.instance().config_loader().get_group_options("comm")
    if not isinstance(name, str) or name.split("/")[0] not in allowed:
        raise ConfigError(
            f"{key} must be of {', '.join(allowed)}, or a transport beneath one, as in ring/mpi; got {name}"
        )


def _overrides(name: str) -> list[str]:
    beneath = "inter" if name.startswith("hierarchical") else "transport"
    groups = ("comm", f"comm/{beneath}", f"comm/transport@comm.{beneath}.transport")
    network = [one for one in HydraConfig.get().overrides.task if one.startswith(("network=", "network."))]
    return [*(f"{group}={choice}" for group, choice in zip(groups, name.split("/"), strict=False)), *network]


def sizes(cfg: DictConfig) -> Iterator[int]:
    """Return the sizes in bytes."""
    return multiplied(cfg.min_bytes, cfg.max_bytes, cfg.factor)


def interleaved(
    actions: Mapping[str, Action],
    comm: Communicator,
    warmup: int,
    iterations: int,
    burst: int = 0,
    before: Mapping[str, Action] | None = None,
) -> dict[str, list[float]]:
    """Run every action in turn, again and again; return the seconds of the slowest rank, by action.

    ``comm`` lines the ranks up before each turn, and gathers what they measured. A barrier leaves some ranks
    earlier than others, which counts where an action is short: with a ``burst``, a turn is one action that is
    not measured and then so many that are, each lined up by the one before it. What is in ``before`` under an action's
    name runs before each of its calls, and is not measured.
    """
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for iteration in range(warmup + iterations):
        for name, action in actions.items():
            prepare = None if before is None else before.get(name)
            comm.barrier()
            if burst:
                action()
            measured = [_seconds(action, prepare) for _ in range(max(burst, 1))]
            if iteration >= warmup:
                seconds[name] += measured
    by_rank = comm.all_gather_object(seconds)
    return {name: [max(times) for times in zip(*(rank[name] for rank in by_rank), strict=True)] for name in actions}


def _seconds(action: Action, before: Action | None) -> float:
    if before is not None:
        before()
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def report(title: str, rows: Sequence[Row], formats: Mapping[str, str], name: str) -> Path:
    """Print the rows beneath ``title``, and write all as CSV and JSON; return the path without its ending."""
    path = Path(HydraConfig.get().runtime.output_dir) / name
    print(f"{title}\n{table(rows, formats)}")
    write_csv(path.with_suffix(".csv"), rows, list(rows[0]))
    write_json(path.with_suffix(".json"), {"title": title, **_machine()}, rows)
    return path


def _machine() -> dict[str, str | int | None]:
    """Return what a result has to be read with."""
    model = next((line for line in _cpu_info() if line.startswith("model name")), ": unknown")
    return {
        "command": " ".join(sys.argv),
        "date": time.strftime("%Y-%m-%d"),
        "cpu": model.split(": ", 1)[1],
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _cpu_info() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []
