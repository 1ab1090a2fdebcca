"""The typed configuration: which settings exist, of which type, in which range.

`register` puts the dataclasses into Hydra's store as group ``schema``; the YAML files of conf/ build on
them, so a misspelt key or a wrong type fails while the configuration is composed. Hydra merges into
untyped containers, so ranges are checked in `check`, which turns those into the dataclasses.

The sections ``comm``, ``model``, ``optim`` and ``method`` are open: whatever ``_target_`` takes is a setting there.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from minidist.errors import ConfigError

AUTOCAST = ("none", "bfloat16")
DEVICES = ("auto", "cpu", "cuda")
LR_SCHEDULES = ("constant", "cosine")
CHECKED = "checked"
"""The setting of any communicator that has its ranks compare what they call."""


@dataclass
class DataConfig:
    """What to train on.

    Attributes:
        name: the data set.
        root: the directory of data sets that are downloaded.
        batch_size, eval_batch_size: samples per rank and step.
        num_workers: processes that load data, per rank; 0 loads in the rank itself.
        strict: whether data that cannot be had is an error instead of a reason to take other data.
    """

    name: str = "digits"
    root: str = "data"
    batch_size: int = 32
    eval_batch_size: int = 256
    num_workers: int = 0
    strict: bool = False

    def __post_init__(self) -> None:
        _at_least("data.batch_size", self.batch_size, 1)
        _at_least("data.eval_batch_size", self.eval_batch_size, 1)
        _at_least("data.num_workers", self.num_workers, 0)


@dataclass
class SyntheticConfig(DataConfig):
    """Random tensors of any shape.

    Attributes:
        shape: of one sample.
        num_classes: the number of labels.
        num_samples, num_test_samples: how many there are to train and to evaluate on.
    """

    name: str = "synthetic"
    shape: list[int] = field(default_factory=lambda: [3, 32, 32])
    num_classes: int = 10
    num_samples: int = 4096
    num_test_samples: int = 512

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least("data.shape", min(self.shape, default=0), 1)
        _at_least("data.num_classes", self.num_classes, 2)
        _at_least("data.num_samples", self.num_samples, 1)
        _at_least("data.num_test_samples", self.num_test_samples, 1)


@dataclass
class TextConfig(DataConfig):
    """Text, to be predicted character by character.

    Attributes:
        context: characters of a sample.
        num_files, num_test_files: how many files there are to train and to evaluate on, about.
    """

    name: str = "stdlib"
    context: int = 64
    num_files: int = 64
    num_test_files: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least("data.context", self.context, 1)
        _at_least("data.num_files", self.num_files, 1)
        _at_least("data.num_test_files", self.num_test_files, 1)


@dataclass
class DdpConfig:
    """Arguments of `minidist.ddp.DistributedDataParallel`; ``hook`` is an open section."""

    bucket_cap_mb: float = 25.0
    broadcast_buffers: bool = True
    find_unused_parameters: bool = False
    direct_gradients: bool = False
    hook: Any = None

    def __post_init__(self) -> None:
        _above("ddp.bucket_cap_mb", self.bucket_cap_mb, 0)


@dataclass
class EngineConfig:
    """How to train.

    Attributes:
        epochs: how often to go through the training data.
        accumulation_steps: batches per optimizer step.
        max_grad_norm: clip gradients to this global norm; null does not clip.
        autocast: the dtype of the forward pass, or none.
        lr_schedule: what becomes of optim.lr after the warm-up: constant, or cosine down to 0.
        warmup_steps: optimizer steps over which the learning rate rises from 0.
        device: cpu, cuda, or auto (cuda where the communicator or the machine has it).
        seed: of everything that is random.
        log_every: optimizer steps between two lines.
        progress, tensorboard: what to show of the run.
        checkpoint_every_steps: 0 for one checkpoint at the end of each epoch.
        keep_checkpoints: how many to keep.
        checkpoint_dir: null for checkpoints/ in the directory of the run.
        resume: whether to go on from the last checkpoint of this run, or of the last run of this job.
        elastic: whether it may be one of another number of ranks.
    """

    epochs: int = 5
    accumulation_steps: int = 1
    max_grad_norm: float | None = None
    autocast: str = "none"
    lr_schedule: str = "constant"
    warmup_steps: int = 0
    device: str = "auto"
    seed: int = 0
    log_every: int = 100
    progress: bool = True
    tensorboard: bool = False
    checkpoint_every_steps: int = 0
    keep_checkpoints: int = 2
    checkpoint_dir: str | None = None
    resume: bool = False
    elastic: bool = False

    def __post_init__(self) -> None:
        _at_least("engine.epochs", self.epochs, 1)
        _at_least("engine.accumulation_steps", self.accumulation_steps, 1)
        if self.max_grad_norm is not None:
            _above("engine.max_grad_norm", self.max_grad_norm, 0)
        _one_of("engine.autocast", self.autocast, AUTOCAST)
        _one_of("engine.lr_schedule", self.lr_schedule, LR_SCHEDULES)
        _at_least("engine.warmup_steps", self.warmup_steps, 0)
        _one_of("engine.device", self.device, DEVICES)
        _at_least("engine.seed", self.seed, 0)
        _at_least("engine.log_every", self.log_every, 1)
        _at_least("engine.checkpoint_every_steps", self.checkpoint_every_steps, 0)
        _at_least("engine.keep_checkpoints", self.keep_checkpoints, 1)


@dataclass
class LaunchConfig:
    """How many ranks a plain ``python`` starts.

    Attributes:
        nproc: ranks on this machine; null trains in this process alone.
        max_restarts: how often torchrun starts all ranks again after a failure.
    """

    nproc: int | None = None
    max_restarts: int = 0

    def __post_init__(self) -> None:
        if self.nproc is not None:
            _at_least("launch.nproc", self.nproc, 1)
        _at_least("launch.max_restarts", self.max_restarts, 0)


@dataclass
class Config:
    """The whole configuration of a job; ``comm``, ``model``, ``optim``, ``method`` and a ``network`` are open."""

    data: DataConfig
    ddp: DdpConfig
    engine: EngineConfig
    launch: LaunchConfig
    comm: Any
    model: Any
    optim: Any
    method: Any
    network: Any = None


OPEN_SECTIONS = ("comm", "model", "optim", "method", "ddp.hook")
SCHEMAS: dict[str, type] = {
    "data": DataConfig,
    "synthetic": SyntheticConfig,
    "text": TextConfig,
    "ddp": DdpConfig,
    "engine": EngineConfig,
    "launch": LaunchConfig,
}
# Settings of open sections that mean the same wherever they appear, and what a number must satisfy there.
_OPEN_LIMITS: dict[str, Callable[[str, float], None]] = {
    "timeout_s": lambda key, value: _above(key, value, 0),
    "segment_bytes": lambda key, value: _at_least(key, value, 16),
    "lr": lambda key, value: _above(key, _finite(key, value), 0),
    "weight_decay": lambda key, value: _at_least(key, _finite(key, value), 0),
    "momentum": lambda key, value: _at_least(key, _finite(key, value), 0),
    "width": lambda key, value: _at_least(key, value, 1),
    "depth": lambda key, value: _at_least(key, value, 1),
    "outer_lr": lambda key, value: _above(key, _finite(key, value), 0),
    "outer_momentum": lambda key, value: _at_least(key, _finite(key, value), 0),
    "num_fragments": lambda key, value: _at_least(key, value, 1),
    "tau": lambda key, value: _at_least(key, value, 0),
    "period": lambda key, value: _at_least(key, value, 1),
    "local_after": lambda key, value: _at_least(key, value, 0),
    "ranks_per_worker": lambda key, value: _at_least(key, value, 1),
}


def register() -> None:
    """Put the schemas into Hydra's store; needed once, before a configuration is composed."""
    for name, schema in SCHEMAS.items():
        ConfigStore.instance().store(group="schema", name=name, node=schema)


def register_resolvers(run_id: Callable[[], str], rank: Callable[[], int]) -> None:
    """Define ``${run_id:}``, ``${rank:}`` and ``${rank_zero:a,b}``, which is a on rank 0 and b elsewhere."""
    OmegaConf.register_new_resolver("run_id", run_id, replace=True)
    OmegaConf.register_new_resolver("rank", rank, replace=True)
    OmegaConf.register_new_resolver("rank_zero", lambda yes, no: no if rank() else yes, replace=True)


def check(cfg: DictConfig) -> Config:
    """Return ``cfg`` as dataclasses.

    Raises:
        ConfigError: a setting does not exist or is out of range; the message names its key.
    """
    _known("the configuration", cfg, Config)
    for section in ("data", "ddp", "engine", "launch"):
        _known(section, cfg[section], OmegaConf.get_type(cfg[section]))
    for key in OPEN_SECTIONS:
        _check_open(key, OmegaConf.to_container(cfg, resolve=True))
    sections = {name: _object(cfg.get(name)) for name in Config.__dataclass_fields__}
    return Config(**sections)


def _object(section: Any) -> Any:
    return OmegaConf.to_object(section) if OmegaConf.is_config(section) else section


def _known(section: str, node: DictConfig, schema: Any) -> None:
    """Refuse what ``+key=value`` added to a closed section: it would have no effect."""
    unknown = set(node) - set(schema.__dataclass_fields__)
    if unknown:
        choices = ", ".join(schema.__dataclass_fields__)
        raise ConfigError(f"{min(map(str, unknown))} is not a setting; {section} has {choices}")


def _check_open(key: str, cfg: Any) -> None:
    section = functools.reduce(operator.getitem, key.split("."), cfg)
    if not isinstance(section, dict) or "_target_" not in section:
        raise ConfigError(
            f"{key} must be a section with a _target_, got {section!r}; "
            f"choose one of conf/ with {key.replace('.', '/')}=<name>"
        )
    checked = section.get(CHECKED, False) if key == "comm" else False
    if not isinstance(checked, int) or checked < 0:
        raise ConfigError(f"comm.{CHECKED} must be true, false, or k to compare k collectives at once, got {checked!r}")
    for leaf, value in _leaves(section, key):
        _check_limit(leaf, value)


def _leaves(node: Any, key: str) -> Iterator[tuple[str, Any]]:
    if isinstance(node, dict):
        for name, child in node.items():
            yield from _leaves(child, f"{key}.{name}")
    else:
        yield key, node


def _check_limit(key: str, value: Any) -> None:
    limit = _OPEN_LIMITS.get(key.rpartition(".")[2])
    if limit is None or value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"{key} must be a number, got {value!r}")
    limit(key, value)


def _at_least(key: str, value: float, least: float) -> None:
    if not value >= least:
        raise ConfigError(f"{key} must be at least {least}, got {value}")


def _above(key: str, value: float, bound: float) -> None:
    if not value > bound:
        raise ConfigError(f"{key} must be greater than {bound}, got {value}")


def _finite(key: str, value: float) -> float:
    if not math.isfinite(value):
        raise ConfigError(f"{key} must be finite, got {value}")
    return value


def _one_of(key: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{key} must be one of {', '.join(choices)}, got {value}")
