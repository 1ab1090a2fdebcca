"""The algorithms of conf/comm, and what the theory says that each of them costs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from hydra.utils import instantiate
from omegaconf import OmegaConf

from backends import ring, two_level
from backends.schedules import binomial, bruck, direct, dissemination, double_tree, doubling, pairwise, swing
from minidist.communicator import Communicator
from minidist.schedule import Schedule

CONF = Path(__file__).parent.parent / "conf" / "comm"
WRAPPERS = ("checked", "delayed", "killed", "lossy", "paced", "virtual")
"""What runs over a transport and is no algorithm."""
ALGORITHMS = sorted(
    path.stem for path in CONF.glob("*.yaml") if "transport: " in path.read_text() and path.stem not in WRAPPERS
)


def make(path: str) -> Communicator:
    """Return the communicator of ``algorithm/transport``, as the configuration has it."""
    algorithm, transport = path.split("/")
    return around(algorithm, instantiate(OmegaConf.load(CONF / f"{transport}.yaml")))


def around(name: str, transport: Communicator) -> Communicator:
    """Return the communicator of an algorithm over a transport."""
    algorithm = OmegaConf.load(CONF / f"{name}.yaml")
    del algorithm["defaults"]
    if name == "two_level" and transport.world_size % 2 == 0:
        algorithm.ranks_per_host = 2
    made: Communicator = instantiate(algorithm, transport=transport)
    return made


def collectives(algorithm: str) -> list[str]:
    """Return the collectives that the algorithm has schedules for."""
    return list(OmegaConf.load(CONF / f"{algorithm}.yaml").get("schedules", {"all_reduce": None}))


@dataclass(frozen=True)
class Theory:
    """What one schedule costs on n ranks.

    Attributes:
        schedule: what runs.
        collective: what it is.
        steps: the most steps that a rank takes.
        messages: how many all ranks send together.
        volume: what all ranks send together, in parts of the larger tensor; in tokens for a barrier.
    """

    schedule: Schedule
    collective: str
    steps: Callable[[int], int]
    messages: Callable[[int], int]
    volume: Callable[[int], float]

    @property
    def name(self) -> str:
        return getattr(self.schedule, "func", self.schedule).__name__


def each(count: Callable[[int], float]) -> Callable[[int], float]:
    """Return n times what every rank sends."""
    return lambda n: n * count(n)


def others(n: int) -> int:
    return n - 1


def log(n: int) -> int:
    return math.ceil(math.log2(n))


def floor_log(n: int) -> int:
    return math.floor(math.log2(n))


def folded(n: int) -> int:
    """Return how many ranks are too many for a power of two."""
    return n - 2 ** floor_log(n)


def halving(schedule: Schedule) -> Theory:
    return Theory(
        schedule,
        "all_reduce",
        lambda n: 2 * floor_log(n) + 2 * (folded(n) > 0),
        lambda n: 2 * (2 ** floor_log(n) * floor_log(n) + folded(n)),
        lambda n: 2 * (n - 1),
    )


def doubled(n: int) -> int:
    return 2 ** floor_log(n) * floor_log(n) + 2 * folded(n)


def block(n: int) -> float:
    """Return what a rank sends that sends each other rank its block."""
    return (n - 1) / n


K = double_tree.CHUNKS_PER_TREE
THEORY = (
    Theory(ring.ring_all_reduce, "all_reduce", lambda n: 2 * (n - 1), lambda n: 2 * n * (n - 1), lambda n: 2 * (n - 1)),
    Theory(ring.ring_reduce_scatter, "reduce_scatter", others, each(others), each(block)),
    Theory(ring.ring_all_gather, "all_gather", others, each(others), each(block)),
    Theory(direct.one_shot_all_reduce, "all_reduce", lambda n: 1, each(others), each(others)),
    Theory(direct.two_shot_all_reduce, "all_reduce", lambda n: 2, lambda n: 2 * n * (n - 1), lambda n: 2 * (n - 1)),
    Theory(direct.direct_reduce_scatter, "reduce_scatter", lambda n: 1, each(others), each(block)),
    Theory(direct.direct_all_gather, "all_gather", lambda n: 1, each(others), each(block)),
    Theory(direct.direct_all_to_all, "all_to_all", lambda n: 1, each(others), each(block)),
    Theory(direct.direct_gather, "gather", lambda n: 1, others, block),
    Theory(direct.direct_scatter, "scatter", lambda n: 1, others, block),
    Theory(binomial.binomial_broadcast, "broadcast", log, others, others),
    Theory(binomial.binomial_reduce, "reduce", log, others, others),
    Theory(
        binomial.binomial_all_reduce, "all_reduce", lambda n: 2 * log(n), lambda n: 2 * (n - 1), lambda n: 2 * (n - 1)
    ),
    Theory(
        double_tree.double_tree_all_reduce,
        "all_reduce",
        lambda n: 2 * (K - 1 + floor_log(n)),
        lambda n: 4 * K * (n - 1),
        lambda n: 2 * (n - 1),
    ),
    Theory(
        doubling.recursive_doubling_all_reduce,
        "all_reduce",
        lambda n: floor_log(n) + 2 * (folded(n) > 0),
        doubled,
        doubled,
    ),
    halving(doubling.halving_doubling_all_reduce),
    halving(swing.swing_all_reduce),
    Theory(bruck.bruck_all_gather, "all_gather", log, each(log), each(block)),
    Theory(
        bruck.bruck_all_to_all,
        "all_to_all",
        log,
        each(log),
        lambda n: sum(distance.bit_count() for distance in range(n)),
    ),
    Theory(pairwise.pairwise_all_to_all, "all_to_all", others, each(others), each(block)),
    Theory(dissemination.dissemination_barrier, "barrier", log, each(log), each(log)),
)


def two_level_theory(ranks_per_host: int) -> Theory:
    """Return what two levels cost with hosts of this size, of which there are n / ranks_per_host."""

    def steps(n: int) -> int:
        return 2 * (ranks_per_host - 1) + 2 * (n // ranks_per_host - 1)

    schedule = partial(two_level.two_level_all_reduce, ranks_per_host=ranks_per_host)
    return Theory(schedule, "all_reduce", steps, each(steps), lambda n: 2 * (n - 1))
