"""What replicas exchange in a job, and whether that goes with its other settings."""

from __future__ import annotations

from omegaconf import DictConfig

from experiments.running.build import build, target
from minidist.errors import ConfigError
from minidist.gradients.hooks import AllReduce
from minidist.methods import EveryStep, Method


def method(cfg: DictConfig) -> Method:
    """Return the method of a job, made anew.

    Raises:
        ConfigError: it does not take its settings.
    """
    made = build(cfg.method, "method")
    if not isinstance(made, Method):
        raise ConfigError(f"method._target_={cfg.method._target_} is not a Method; derive it from minidist's Method")
    return made


def check(cfg: DictConfig, num_ranks: int) -> None:
    """Refuse a method that would fail on the way, before anything is started.

    Raises:
        ConfigError: it cannot do with so many ranks, a sharded optimizer, or the hook.
    """
    chosen = method(cfg)
    name = type(chosen).__name__
    if why := chosen.complaint(num_ranks):
        raise ConfigError(f"method: {name}: {why}")
    if cfg.optim.get("sharded", False) and not isinstance(chosen, EveryStep):
        raise ConfigError(
            f"optim.sharded=true: it has all ranks step one model together, and with {name} each worker steps its "
            "own; use method=ddp, or optim.sharded=false"
        )
    if not chosen.uses_hook and target(cfg, "ddp.hook") is not AllReduce:
        raise ConfigError(
            f"ddp.hook is {cfg.ddp.hook._target_}, and with {name} no gradients are averaged; use ddp/hook=all_reduce"
        )
