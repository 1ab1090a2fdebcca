"""Methods, networks and tasks of a contest by their names in conf/; what is wrong is said before a rank starts."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable

import hydra
import torch
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig

from backends.serial import SerialCommunicator
from experiments.measuring.contest import Task
from experiments.running import optim
from experiments.running.build import build
from experiments.running.choices import at_least
from experiments.tasks import data
from minidist import config
from minidist.analysis.network import Network
from minidist.errors import ConfigError
from minidist.gradients.hooks import Hook

GROUPS = ("ddp/hook", "ddp/hook/compressor")
WRAPS = "error_feedback"


def hook_of(name: str) -> Callable[[], Hook]:
    """Return what makes the hook of a method; it is made once here, so that what is wrong with it is said now.

    Raises:
        ConfigError: there is none of that name, or it cannot be made.
    """
    make = _own(name) if "." in name else _chosen(name)
    try:
        made = make()
    except (TypeError, ValueError) as error:
        raise ConfigError(f"methods: {name} cannot be made without arguments: {error}") from error
    if not callable(made):
        raise ConfigError(f"methods: {name} makes {made!r}, which is no hook; a hook is called with (bucket, comm)")
    return make


def _own(path: str) -> Callable[[], Hook]:
    """Return the class that a dotted path names."""
    try:
        kind: Callable[[], Hook] = pkgutil.resolve_name(path)
    except (ImportError, AttributeError, ValueError) as error:
        why = f"methods: {path} cannot be imported: {error}"
        raise ConfigError(f"{why}; check the name, or set PYTHONPATH to where it lies") from error
    return kind


def _chosen(name: str) -> Callable[[], Hook]:
    """Return what makes a choice of ddp/hook, with that of its compressor behind a slash."""
    choices = name.split("/")
    config_loader = GlobalHydra.instance().config_loader()
    allowed = [config_loader.get_group_options(group) for group in GROUPS]
    known = len(choices) <= (2 if choices[0] == WRAPS else 1)
    if not known or any(choice not in group for choice, group in zip(choices, allowed, strict=False)):
        raise ConfigError(
            f"methods must be of {', '.join(allowed[0])}, or {WRAPS}/ and one of {', '.join(allowed[1])}, or the "
            f"dotted path of a class; got {name}"
        )
    overrides = [f"{group}={choice}" for group, choice in zip(GROUPS, choices, strict=False)]
    section = hydra.compose("config", overrides=overrides).ddp.hook

    def make() -> Hook:
        hook: Hook = build(section, "ddp.hook")
        return hook

    return make


def network_of(name: str) -> Network:
    """Return the model of that name.

    Raises:
        ConfigError: there is none.
    """
    allowed = GlobalHydra.instance().config_loader().get_group_options("network")
    if name not in allowed:
        raise ConfigError(f"networks must be of {', '.join(allowed)}, got {name}")
    network: Network = build(hydra.compose("config", overrides=[f"network={name}"]).network, f"network={name}")
    return network


def task_of(name: str, section: DictConfig, seed: int) -> Task:
    """Return the contest of that name, with the model that the seed gives.

    Raises:
        ConfigError: a setting is wrong.
    """
    at_least(section, steps=1, warmup=0)
    cfg = hydra.compose("config", overrides=list(section.overrides))
    checked = config.check(cfg)
    optim.check(cfg)
    with SerialCommunicator() as comm:
        chosen = data.load(checked.data, comm, seed)
    torch.manual_seed(seed)
    module = build(cfg.model, "model", shape=chosen.shape, num_classes=chosen.num_classes)
    return Task(
        name,
        chosen,
        module,
        lambda replica: optim.optimizer(cfg, replica),
        checked.data.batch_size,
        section.steps,
        section.warmup,
    )
