"""Judges methods that train with fewer bytes, on networks that nobody has to own: ``python experiments/judge.py``.

Each one trains the same tasks on virtual ranks, with several seeds. What is learned does not depend on the network:
one training gives the times on all of them. ``methods=[all_reduce,mine.Hook,mine.Method]`` puts one's own beside
another; `experiments.measuring.contenders` says what can stand there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from experiments.drawing.contest import draw_contest, write_contest_page
from experiments.measuring.compare import report
from experiments.measuring.contenders import contenders_of, network_of, task_of
from experiments.measuring.contest import Trial, trial
from experiments.measuring.verdict import Verdict, rows_of, target_of, undisturbed, winners
from experiments.running.choices import at_least, several
from experiments.running.run import CONF, main
from experiments.running.tables import table
from minidist.errors import ConfigError
from minidist.launch import counted_ranks, detect

FORMATS = {"task": "s", "method": "s", "loss": ".3f", "accuracy": ".3f", "bytes_per_step": ".0f", "fewer": ".1f"}


def check(cfg: DictConfig) -> None:
    """Refuse what cannot be judged before any rank starts.

    Raises:
        ConfigError: naming the setting.
    """
    if detect().launcher != "alone":
        raise ConfigError("the ranks are threads of one process; start with python alone, and set world_size")
    at_least(cfg, world_size=2, num_at_once=1, seeds=0)
    several(cfg, "seeds")
    for network in several(cfg, "networks"):
        network_of(network)
    for name in several(cfg, "tasks", list(cfg.contests)):
        task_of(name, cfg.contests[name], 0)
        contenders_of(cfg, name)


def judged(cfg: DictConfig, name: str, directory: Path) -> Verdict:
    """Hold the contest of a task, and draw it."""
    section = cfg.contests[name]
    networks = {network: network_of(network) for network in several(cfg, "networks")}
    contenders = contenders_of(cfg, name)
    trials: dict[str, list[Trial]] = {one.name: [] for one in contenders}
    for seed in several(cfg, "seeds"):
        task = task_of(name, section, seed)
        # The first ranks of a process are slower, which is not the first contender's fault.
        trial(replace(task, steps=task.test_every), contenders[0], networks, cfg.world_size, seed, cfg.num_at_once)
        for one in contenders:
            done = trial(task, one, networks, cfg.world_size, seed, cfg.num_at_once)
            trials[one.name].append(done)
            print(f"{name}, seed {seed}: {one.name} | Test loss: {done.losses[-1]:.4f}", flush=True)
    trials = {method: undisturbed(of_one) for method, of_one in trials.items()}
    target = target_of(trials) if section.target is None else float(section.target)
    rows = rows_of(name, trials, list(networks), target)
    picture = directory / f"judge_{name}.png"
    title = f"{name} on {counted_ranks(cfg.world_size)}"
    draw_contest(picture, title, trials, list(networks), cfg.world_size * task.batch_size, target)
    return Verdict(rows, winners(rows, list(networks), target), picture)


def formats(networks: Sequence[str]) -> dict[str, str]:
    """Return the columns of the table."""
    exposed = {f"exposed_ms_{network}": ".2f" for network in networks}
    target = {f"target_s_{network}": ".2f" for network in networks}
    return FORMATS | exposed | target


@hydra.main(version_base="1.3", config_path=CONF, config_name="judge")
def judge(cfg: DictConfig) -> None:
    """Judge, print, and write judge.csv, judge.json, judge.html and a picture per task."""
    check(cfg)
    directory = Path(HydraConfig.get().runtime.output_dir)
    verdicts = {name: judged(cfg, name, directory) for name in several(cfg, "tasks")}
    columns = formats(several(cfg, "networks"))
    num_seeds = len(several(cfg, "seeds"))
    seeds = "one seed" if num_seeds == 1 else f"means of {num_seeds} seeds"
    title = f"{counted_ranks(cfg.world_size)} in virtual time, {seeds}"
    path = report(title, [row for verdict in verdicts.values() for row in verdict.rows], columns, "judge")
    texts = {name: "\n".join([table(one.rows, columns), "", *one.lines]) for name, one in verdicts.items()}
    write_contest_page(path.with_suffix(".html"), title, texts, {name: one.picture for name, one in verdicts.items()})
    for verdict in verdicts.values():
        print("\n".join(verdict.lines))
    print(
        f"written: {path}.csv, .json, .html, and {', '.join(one.picture.name for one in verdicts.values())}", flush=True
    )


if __name__ == "__main__":
    main(judge)
