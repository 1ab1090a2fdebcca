"""Predicts and checks: ``torchrun --nproc-per-node=2 experiments/predict.py transport=gloo``.

First the all-reduce of every algorithm and size on this machine, as the model of the network has it and as it is
measured, with the error and with the sizes at which another algorithm becomes the fastest. Then the training step of a
model on 8 to 4096 ranks of the network ``scale``, overlap included, from one step measured here without communication;
and the size of buckets with which it is shortest.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import median

import hydra
from omegaconf import DictConfig

from backends.algorithm import AlgorithmCommunicator
from backends.calibration import Tables, slowest_median
from backends.host_calibration import HostTables, calibrated, medians
from experiments.drawing.algorithms import schedule_of, schedules_of
from experiments.measuring.compare import communicators, report, sizes
from experiments.measuring.step_model import MEGABYTE, Profile, profile
from experiments.running.build import build
from experiments.running.choices import at_least, several
from experiments.running.run import CONF, main
from experiments.running.tables import Row, table
from minidist.analysis.network import Network, interpolated
from minidist.analysis.simulate import simulate
from minidist.collective import Run
from minidist.communicator import Communicator
from minidist.launch import counted_ranks
from minidist.schedule import Schedule

FORMATS = {
    "bytes": "d",
    "algorithm": "s",
    "predicted_us": ".0f",
    "measured_us": ".0f",
    "error": "+.0%",
}
CALIBRATED = [4**power * 1024 for power in range(9)]
"""The sizes of messages that are measured: 1 KB to 64 MB."""
STEP_FORMATS = {
    "world_size": "d",
    "algorithm": "s",
    "bucket_cap_mb": ".0f",
    "step_ms": ".1f",
    "exposed_ms": ".1f",
    "efficiency": ".0%",
}
Schedules = Mapping[str, Schedule]


def measure(cfg: DictConfig, comm: Communicator, schedules: Schedules) -> tuple[Network, dict[tuple[int, str], float]]:
    """Return the model, and the seconds of every size and algorithm.

    The speed of a shared machine changes from minute to minute, so both are measured in turn, some rounds long.
    """
    algorithms = {name: AlgorithmCommunicator(comm, {"all_reduce": one}) for name, one in schedules.items()}
    tables: list[Tables | HostTables] = []
    seconds: dict[tuple[int, str], list[float]] = {}
    for _ in range(cfg.rounds):
        if cfg.network is None:
            tables.append(calibrated(comm, CALIBRATED, cfg.iterations, cfg.budget_s))
        for nbytes in sizes(cfg):
            tensor = comm.empty(nbytes // 4).zero_()
            for name, algorithm in algorithms.items():
                run = functools.partial(algorithm.all_reduce, tensor)
                seconds.setdefault((nbytes, name), []).append(slowest_median(comm, run, nbytes, cfg.iterations))
    network = build(cfg.network, "network") if cfg.network is not None else medians(tables).network()
    return network, {key: median(times) for key, times in seconds.items()}


def compare(
    world_size: int, schedules: Schedules, network: Network, seconds: Mapping[tuple[int, str], float]
) -> list[Row]:
    """Return one row per size and algorithm: what the model says, and what was measured."""
    rows: list[Row] = []
    for (nbytes, name), measured in seconds.items():
        predicted = simulate(schedules[name], Run("all_reduce", world_size), nbytes, network).seconds
        rows.append(
            {
                "bytes": nbytes,
                "algorithm": name,
                "predicted_us": predicted * 1e6,
                "measured_us": measured * 1e6,
                "error": predicted / measured - 1,
            }
        )
    return rows


def geometric_mean_error(rows: Sequence[Row]) -> float:
    """Return the mean factor between prediction and measurement, less 1."""
    factors = [abs(math.log(row["predicted_us"] / row["measured_us"])) for row in rows]
    return math.exp(sum(factors) / len(factors)) - 1


def fastest(rows: Sequence[Row], column: str) -> Iterator[tuple[int, str]]:
    """Yield the size from which on an algorithm is the fastest, and the algorithm."""
    last = ""
    for nbytes in dict.fromkeys(row["bytes"] for row in rows):
        best = min((row for row in rows if row["bytes"] == nbytes), key=lambda row: row[column])["algorithm"]
        if best != last:
            yield nbytes, best
        last = best


def cost(schedule: Schedule, world_size: int, network: Network) -> Callable[[float], float]:
    """Return what an all-reduce takes by its bytes: simulated at some sizes, on lines between them."""
    at = [float(16 * 1024 * 16**power) for power in range(5)]
    seconds = [simulate(schedule, Run("all_reduce", world_size), nbytes, network).seconds for nbytes in at]
    return lambda nbytes: interpolated(at, seconds, nbytes)


def scale(cfg: DictConfig, step: Profile, network: Network) -> list[Row]:
    """Return the predicted training step by number of ranks, algorithm and size of buckets."""
    algorithms = {name: schedules_of(name, "all_reduce") for name in several(cfg, "scale_algorithms")}
    rows: list[Row] = []
    for world_size in several(cfg, "world_sizes"):
        for name, schedule_on in algorithms.items():
            costs = cost(schedule_on(world_size), world_size, network)
            for cap in several(cfg, "bucket_caps_mb"):
                seconds = step.seconds(cap, costs)
                rows.append(
                    {
                        "world_size": world_size,
                        "algorithm": name,
                        "bucket_cap_mb": cap,
                        "step_ms": seconds * 1e3,
                        "exposed_ms": (seconds - step.step) * 1e3,
                        "efficiency": step.step / seconds,
                    }
                )
    return rows


def recommended(rows: Sequence[Row]) -> list[Row]:
    """Return the shortest step for each number of ranks."""
    sizes = dict.fromkeys(row["world_size"] for row in rows)
    return [min((row for row in rows if row["world_size"] == n), key=lambda row: row["step_ms"]) for n in sizes]


@hydra.main(version_base="1.3", config_path=CONF, config_name="predict")
def experiment(cfg: DictConfig) -> None:
    """Predict, measure, and print both; then predict what cannot be measured here."""
    at_least(cfg, min_bytes=4, iterations=1, rounds=1, factor=2, batch_size=1, world_sizes=1, bucket_caps_mb=1.0)
    at_least(cfg, max_bytes=cfg.min_bytes)
    with communicators([cfg.transport], "transport") as comms:
        (comm,) = comms.values()
        schedules = {name: schedule_of(name, "all_reduce", comm.world_size) for name in several(cfg, "algorithms")}
        measured = measure(cfg, comm, schedules)
        step = profile(build(cfg.model, "model"), list(cfg.model.shape), cfg.batch_size)
        if comm.rank == 0:
            show(cfg, comm.world_size, compare(comm.world_size, schedules, *measured))
            show_scale(cfg, step)


def show(cfg: DictConfig, world_size: int, rows: list[Row]) -> None:
    """Print and write what was predicted and measured on this machine."""
    path = report(f"all_reduce over {cfg.transport}, {counted_ranks(world_size)}", rows, FORMATS, "predict")
    print(f"geometric mean error: {geometric_mean_error(rows):.0%}")
    for kind in ("predicted", "measured"):
        steps = ", ".join(f"{name} from {nbytes} bytes" for nbytes, name in fastest(rows, f"{kind}_us"))
        print(f"fastest as {kind}: {steps}")
    print(f"written: {path}.csv, .json")


def show_scale(cfg: DictConfig, step: Profile) -> None:
    """Print and write what is predicted for more ranks."""
    rows = scale(cfg, step, build(cfg.scale, "scale"))
    megabytes = sum(step.nbytes) / MEGABYTE
    title = f"a training step of {step.step * 1e3:.1f} ms, {megabytes:.0f} MB of gradients, on the network scale"
    path = report(title, rows, STEP_FORMATS, "predict_step")
    print(f"recommended:\n{table(recommended(rows), STEP_FORMATS)}\nwritten: {path}.csv, .json", flush=True)


if __name__ == "__main__":
    main(experiment)
