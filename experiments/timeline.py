"""Draws an all-reduce that really ran: ``torchrun --nproc-per-node=4 experiments/timeline.py algorithm=ring``.

An arrow goes from where its rank posted the message to where the other rank saw that it had come.
"""

from __future__ import annotations

from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from backends.algorithm import AlgorithmCommunicator
from backends.traced import TracedCommunicator, timed
from experiments.drawing.algorithms import schedule_of
from experiments.drawing.diagrams import draw_timeline
from experiments.measuring.compare import communicators
from experiments.running.choices import at_least
from experiments.running.run import CONF, main
from minidist.analysis.network import Flat
from minidist.analysis.simulate import Message, simulate
from minidist.collective import Run
from minidist.communicator import Communicator
from minidist.launch import counted_ranks
from minidist.schedule import Schedule, chunks_of


def trace(comm: Communicator, schedule: Schedule, nbytes: int, warmup: int) -> list[Message]:
    """Run the schedule, and return the messages of the last run; every rank calls it."""
    traced = TracedCommunicator(comm)
    algorithm = AlgorithmCommunicator(traced, {"all_reduce": schedule}, segment_bytes=max(nbytes, 16))
    tensor = comm.empty(max(nbytes // 4, 1)).zero_()
    for _ in range(warmup + 1):
        comm.barrier()
        traced.log.clear()
        algorithm.all_reduce(tensor)
    logs = comm.all_gather_object(traced.log)
    return timed(simulate(schedule, Run("all_reduce", comm.world_size), nbytes, Flat(1, 0), record=True).messages, logs)


@hydra.main(version_base="1.3", config_path=CONF, config_name="timeline")
def experiment(cfg: DictConfig) -> None:
    """Run, and write timeline.png and timeline.svg."""
    with communicators([cfg.transport], "transport") as comms:
        (comm,) = comms.values()
        schedule = schedule_of(cfg.algorithm, "all_reduce", comm.world_size)
        # A chunk without elements is not sent, and would be missing in the picture.
        at_least(cfg, nbytes=4 * chunks_of(schedule, "all_reduce", comm.world_size), warmup=0)
        messages = trace(comm, schedule, cfg.nbytes, cfg.warmup)
        if comm.rank == 0:
            what = f"{cfg.algorithm} all_reduce of {cfg.nbytes} bytes over {cfg.transport}"
            path = Path(HydraConfig.get().runtime.output_dir) / "timeline"
            draw_timeline(path, f"{what}, {counted_ranks(comm.world_size)}, as it ran", comm.world_size, messages)
            print(f"written: {path}.png, .svg", flush=True)


if __name__ == "__main__":
    main(experiment)
