"""A schedule as a picture and as a page to step through: ``python experiments/draw.py algorithm=ring world_size=4``.

With ``curves=[ring,halving_doubling]``, what these algorithms cost instead, by size and by number of ranks. It runs
alone, on the clock of `minidist.analysis.simulate` and under the model of a network that the group network names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, ListConfig

from experiments.drawing.algorithms import schedule_of, schedules_of
from experiments.drawing.curves import Curves, over_ranks, over_sizes
from experiments.drawing.diagrams import draw_curves, draw_timeline, spell_bytes, spell_ranks, spell_seconds
from experiments.drawing.page import frames, write_page
from experiments.running.build import build
from experiments.running.choices import check_groups
from experiments.running.run import CONF, main
from experiments.running.tables import multiplied
from minidist.analysis.network import Network
from minidist.analysis.simulate import MAX_WORLD_SIZE, simulate
from minidist.collective import COLLECTIVES, Run
from minidist.errors import ConfigError, ScheduleError
from minidist.launch import counted_ranks

MAX_DRAWN = 64
"""More ranks are a picture of nothing."""


def check(cfg: DictConfig) -> None:
    """Refuse settings that mean nothing.

    Raises:
        ConfigError: naming the setting and its choices.
    """
    if cfg.collective not in COLLECTIVES:
        raise ConfigError(f"collective must be one of {', '.join(COLLECTIVES)}, got {cfg.collective}")
    least = {"world_size": 1, "nbytes": 0, "root": 0, "min_bytes": 1, "max_bytes": 1, "max_world_size": 2}
    for key, bound in least.items():
        if isinstance(cfg[key], bool) or not isinstance(cfg[key], int) or cfg[key] < bound:
            raise ConfigError(f"{key} must be a whole number of at least {bound}, got {cfg[key]}")
    for key, of in (("curves", "algorithms"), ("comm_overrides", "overrides")):
        if not isinstance(cfg[key], ListConfig):
            raise ConfigError(f"{key} must be a list of {of}, got {cfg[key]}")
    if cfg.root >= cfg.world_size:
        raise ConfigError(f"root must be a rank from 0 to {cfg.world_size - 1}, got {cfg.root}")
    (_check_curves if cfg.curves else _check_picture)(cfg)


def _check_picture(cfg: DictConfig) -> None:
    if cfg.world_size > MAX_DRAWN:
        raise ConfigError(
            f"world_size must be at most {MAX_DRAWN} for a picture that can be read, got {cfg.world_size}; "
            "set curves=[...] to see what more ranks cost"
        )


def _check_curves(cfg: DictConfig) -> None:
    if len(set(cfg.curves)) < len(cfg.curves) or len(cfg.curves) < 2:
        raise ConfigError(f"curves must be two or more different algorithms, got [{', '.join(map(str, cfg.curves))}]")
    if cfg.max_bytes < 2 * cfg.min_bytes:
        raise ConfigError(f"max_bytes must be at least twice min_bytes = {cfg.min_bytes}, got {cfg.max_bytes}")
    for key in ("world_size", "max_world_size"):
        if not 2 <= cfg[key] <= MAX_WORLD_SIZE:
            raise ConfigError(f"{key} must be 2 to {MAX_WORLD_SIZE} for curves, got {cfg[key]}")


def picture(cfg: DictConfig, directory: Path) -> None:
    """Write schedule.png, schedule.svg and schedule.html, and print their paths.

    Raises:
        ConfigError: the algorithm has no such schedule, or the network not so many ranks.
        ScheduleError: the schedule is wrong.
    """
    schedule = schedule_of(cfg.algorithm, cfg.collective, cfg.world_size, cfg.comm_overrides)
    network = build(cfg.network, "network")
    run = Run(cfg.collective, cfg.world_size, cfg.root)
    with _refusing():
        timeline = simulate(schedule, run, cfg.nbytes, network, record=True)
    what = f"{cfg.algorithm}: {_what(cfg)} on {counted_ranks(cfg.world_size)}"
    total = f"{spell_bytes(cfg.nbytes)}, network {_network()}: {spell_seconds(timeline.seconds)}"
    path = directory / "schedule"
    draw_timeline(path, f"{what}\n{total}", cfg.world_size, timeline.messages, timeline.ends)
    shown = frames(schedule, run, timeline.messages)
    write_page(path.with_suffix(".html"), f"{what}; {total}", run, shown)
    print(f"{what}; {total}\nwritten: {path}.png, .svg, .html")


def costs(cfg: DictConfig, directory: Path) -> None:
    """Write curves.png and curves.svg, and print their paths and where the fastest algorithm changes.

    Raises:
        ConfigError: an algorithm has no such schedule, or the network not so many ranks.
        ScheduleError: a schedule is wrong.
    """
    by_size, by_ranks = curves(cfg, build(cfg.network, "network"))
    halves = (f"on {counted_ranks(cfg.world_size)}", f"of {spell_bytes(cfg.nbytes)}")
    path = directory / "curves"
    draw_curves(path, f"{_what(cfg)}, network {_network()}", halves, by_size, by_ranks)
    for half, of_one, spell in ((halves[0], by_size, spell_bytes), (halves[1], by_ranks, spell_ranks)):
        for line in describe(of_one, spell):
            print(f"{_what(cfg)} {half}: {line}")
    print(f"written: {path}.png, .svg")


def curves(cfg: DictConfig, network: Network) -> tuple[Curves, Curves]:
    """Return the time of the algorithms over the size, and over the number of ranks.

    Raises:
        ConfigError: an algorithm has no such schedule, or the network not so many ranks.
        ScheduleError: a schedule cannot be run.
    """
    algorithms = {name: schedules_of(name, cfg.collective, cfg.comm_overrides) for name in cfg.curves}
    sizes = list(multiplied(cfg.min_bytes, cfg.max_bytes, 2))
    counts = list(multiplied(2, cfg.max_world_size, 2))
    with _refusing():
        by_size = over_sizes(algorithms, cfg.world_size, sizes, network, cfg.collective, cfg.root)
        by_ranks = over_ranks(algorithms, counts, cfg.nbytes, network, cfg.collective, cfg.root)
    return by_size, by_ranks


def describe(of_one: Curves, spell: Callable[[float], str]) -> list[str]:
    """Return one line per crossover, or one that says that there is none."""
    found = of_one.crossovers()
    if not found:
        return [f"{of_one.fastest()} is the fastest everywhere"]
    return [
        f"{crossover.before} is the fastest up to {spell(crossover.x)}, {crossover.after} beyond "
        f"({spell_seconds(crossover.seconds)})"
        for crossover in found
    ]


@contextmanager
def _refusing() -> Iterator[None]:
    """Turn what the network says of ranks that it does not have into a mistake of the configuration."""
    try:
        yield
    except (ConfigError, ScheduleError):
        raise
    except ValueError as error:
        raise ConfigError(f"network={_network()}: {error}; change world_size, max_world_size or network") from error


def _what(cfg: DictConfig) -> str:
    way = {"source": "from", "destination": "to", None: None}[COLLECTIVES[cfg.collective].root]
    return f"{cfg.collective} {way} rank {cfg.root}" if way else str(cfg.collective)


def _network() -> str:
    return str(HydraConfig.get().runtime.choices["network"])


@hydra.main(version_base="1.3", config_path=CONF, config_name="draw")
def draw(cfg: DictConfig) -> None:
    """Draw a schedule, or the curves of several."""
    check_groups()
    check(cfg)
    (costs if cfg.curves else picture)(cfg, Path(HydraConfig.get().runtime.output_dir))


if __name__ == "__main__":
    main(draw)
