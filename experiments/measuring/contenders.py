"""Contenders, networks and tasks of a contest by their names in conf/; what is wrong is said before a rank starts.

A contender is a choice of ddp/hook, with that of its compressor behind a slash; a choice of method; or the dotted path
of one's own class or function. What that makes tells what it is: a `Method`, or a hook, called with (bucket, comm).
Settings go behind it::

    methods: [all_reduce, error_feedback/sign, local_sgd, mine.Method, diloco: {period: 32, optim: sgd, optim.lr: 0.1}]

Those that begin with ``optim`` or ``ddp/hook`` are of the whole configuration, the others are the contender's own.
"""

from __future__ import annotations

import json
import math
import pkgutil
from collections.abc import Mapping, Sequence
from typing import Any

import hydra
import torch
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict

from backends.serial import SerialCommunicator
from experiments.measuring.contest import Contender, Task
from experiments.running import method, optim
from experiments.running.build import build
from experiments.running.choices import at_least
from experiments.tasks import data
from minidist import config
from minidist.analysis.network import Network
from minidist.errors import ConfigError
from minidist.methods import Method

HOOKS, COMPRESSORS, METHODS = "ddp/hook", "ddp/hook/compressor", "method"
WRAPS = "error_feedback"
OF_ALL = ("optim", "ddp/hook")


def contenders_of(cfg: DictConfig, task: str) -> list[Contender]:
    """Return those of a task, in their order; each is made once here, so that what is wrong with it is said now.

    Raises:
        ConfigError: there is none of that name, one is named twice, or it cannot do with its settings, the task's, or
            so many ranks.
    """
    given = OmegaConf.to_container(cfg.methods)
    listed = given if isinstance(given, list) else [given]
    if not listed:
        raise ConfigError(f"methods must be a list of one or more values, got {given}; write methods=[all_reduce,int8]")
    found = [_contender(*_parts(one), list(cfg.contests[task].overrides), cfg.world_size) for one in listed]
    names = [one.name for one in found]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"methods has {name} twice: [{', '.join(names)}]")
    return found


def _parts(given: Any) -> tuple[str, Mapping[str, Any]]:
    """Return the name and the settings."""
    if isinstance(given, str):
        return given, {}
    if not isinstance(given, dict) or len(given) != 1:
        raise ConfigError(
            f"methods: each must be a name, or one with settings, as in diloco: {{period: 32}}; got {given}"
        )
    [(name, settings)] = given.items()
    if not isinstance(settings, dict):
        raise ConfigError(
            f"methods: {name} must be followed by its settings, as in {name}: {{period: 32}}; got {settings}"
        )
    return str(name), settings


def _contender(name: str, settings: Mapping[str, Any], task: Sequence[str], num_ranks: int) -> Contender:
    title = name + (f"({', '.join(f'{key}={value}' for key, value in settings.items())})" if settings else "")
    of_all = [f"{key}={_text(value)}" for key, value in settings.items() if key.startswith(OF_ALL)]
    own = {key: value for key, value in settings.items() if not key.startswith(OF_ALL)}
    chosen, section = ([], "") if "." in name else _chosen(name)
    try:
        cfg = hydra.compose(
            "config",
            overrides=[*task, *chosen, *of_all, *(f"{section}.{key}={_text(own[key])}" for key in own if section)],
        )
        if not section:
            _put(cfg, name, own)
        _check(cfg, num_ranks)
    except (HydraException, ConfigError) as error:
        raise ConfigError(f"methods: {title}: {' '.join(str(error).split())}") from error
    return Contender(
        title,
        lambda: method.hook(cfg),
        lambda: method.method(cfg),
        lambda replica: optim.optimizer(cfg, replica),
    )


def _text(value: Any) -> str:
    """Return a setting as Hydra reads it."""
    return str(value) if isinstance(value, str | float) else json.dumps(value)  # JSON's Infinity is not Hydra's


def _chosen(name: str) -> tuple[list[str], str]:
    """Return what chooses the hook or the method of a name, and the section of its settings."""
    hooks, compressors, methods = (_choices(group) for group in (HOOKS, COMPRESSORS, METHODS))
    if name in hooks and name in methods:
        raise ConfigError(
            f"methods: {name} is a choice of both ddp/hook and method; rename one of the files, or give the "
            "dotted path of its class"
        )
    if name in methods:
        return [f"{METHODS}={name}"], "method"
    choice, _, compressor = name.partition("/")
    if choice not in hooks or (compressor and (choice != WRAPS or compressor not in compressors)):
        raise ConfigError(
            f"methods must be of {', '.join(hooks)}; of {', '.join(methods)}; {WRAPS}/ and one of "
            f"{', '.join(compressors)}; or the dotted path of a class; got {name}"
        )
    return [f"{HOOKS}={choice}", *([f"{COMPRESSORS}={compressor}"] if compressor else [])], "ddp.hook"


def _choices(group: str) -> list[str]:
    return GlobalHydra.instance().config_loader().get_group_options(group)


def _put(cfg: DictConfig, path: str, own: Mapping[str, Any]) -> None:
    """Put the class that a dotted path names where it belongs, by what it makes."""
    try:
        pkgutil.resolve_name(path)
    except (ImportError, AttributeError, ValueError) as error:
        why = f"it cannot be imported: {error}"
        raise ConfigError(f"{why}; check the name, or set PYTHONPATH to where it lies") from error
    section = OmegaConf.create({"_target_": path, **own})
    made = build(section, "it cannot be made")
    if not isinstance(made, Method) and not callable(made):
        raise ConfigError(
            f"it makes {made!r}, which is neither a Method nor a hook; a hook is called with (bucket, comm)"
        )
    with open_dict(cfg):
        if isinstance(made, Method):
            cfg.method = section
        else:
            cfg.ddp.hook = section


def _check(cfg: DictConfig, num_ranks: int) -> None:
    config.check(cfg)
    optim.check(cfg)
    method.check(cfg, num_ranks)


def network_of(name: str) -> Network:
    """Return the model of that name.

    Raises:
        ConfigError: there is none.
    """
    allowed = _choices("network")
    if name not in allowed:
        raise ConfigError(f"networks must be of {', '.join(allowed)}, got {name}")
    network: Network = build(hydra.compose("config", overrides=[f"network={name}"]).network, f"network={name}")
    return network


def task_of(name: str, section: DictConfig, seed: int) -> Task:
    """Return the contest of that name, with the model that the seed gives.

    Raises:
        ConfigError: a setting is wrong.
    """
    at_least(section, steps=1, warmup=0, test_every=1)
    if section.target is not None and not (isinstance(section.target, int | float) and 0 < section.target < math.inf):
        raise ConfigError(f"target of {name} must be a loss greater than 0, or null, got {section.target}")
    cfg = hydra.compose("config", overrides=list(section.overrides))
    checked = config.check(cfg)
    with SerialCommunicator() as comm:
        chosen = data.load(checked.data, comm, seed)
    torch.manual_seed(seed)
    module = build(cfg.model, "model", shape=chosen.shape, num_classes=chosen.num_classes)
    return Task(name, chosen, module, checked.data.batch_size, section.steps, section.warmup, section.test_every)
