"""What replicas exchange in a job, and whether that goes with its other settings."""

from __future__ import annotations

import torch
from omegaconf import DictConfig
from torch import nn

from experiments.running.build import build, target
from experiments.tasks import data
from minidist import config
from minidist.errors import ConfigError
from minidist.gradients.hooks import AllReduce, Hook
from minidist.methods import EveryStep, Method
from minidist.methods.local import LocalMethod


def method(cfg: DictConfig) -> Method:
    """Return the method of a job, made anew.

    Raises:
        ConfigError: it does not take its settings.
    """
    made = build(cfg.method, "method")
    if not isinstance(made, Method):
        raise ConfigError(f"method._target_={cfg.method._target_} is not a Method; derive it from minidist's Method")
    return made


def hook(cfg: DictConfig) -> Hook:
    """Return what becomes of a full bucket, made anew.

    Raises:
        ConfigError: it does not take its settings, or is no hook.
    """
    made: Hook = build(cfg.ddp.hook, "ddp.hook")
    if not callable(made):
        raise ConfigError(f"ddp.hook makes {made!r}, which is no hook; a hook is called with (bucket, comm)")
    return made


def check(cfg: DictConfig, num_ranks: int) -> None:
    """Refuse a method that would fail on the way, before anything is started.

    Raises:
        ConfigError: it cannot do with so many ranks, the model, a sharded optimizer, or the hook; or there is no hook.
    """
    chosen = method(cfg)
    name = type(chosen).__name__
    if why := chosen.complaint(num_ranks):
        raise ConfigError(f"method: {name}: {why}")
    if isinstance(chosen, LocalMethod) and chosen.num_fragments > 1 and (why := chosen.misfit(_outline(cfg))):
        raise ConfigError(f"method: {name}: {why}")
    hook(cfg)
    if cfg.optim.get("sharded", False) and not isinstance(chosen, EveryStep):
        raise ConfigError(
            f"optim.sharded=true: it has all ranks step one model together, and with {name} each worker steps its "
            "own; use method=ddp, or optim.sharded=false"
        )
    if not chosen.uses_hook and target(cfg, "ddp.hook") is not AllReduce:
        raise ConfigError(
            f"ddp.hook is {cfg.ddp.hook._target_}, and with {name} no gradients are averaged; use ddp/hook=all_reduce"
        )


def _outline(cfg: DictConfig) -> nn.Module:
    """Return the model of a job without its numbers."""
    shape, num_classes = data.sizes_of(config.check(cfg).data)
    with torch.device("meta"):
        module: nn.Module = build(cfg.model, "model", shape=shape, num_classes=num_classes)
    return module
