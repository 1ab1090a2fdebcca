"""The optimizer of a job: the whole of it on every rank, or in shares with ``optim.sharded=true``."""

from __future__ import annotations

from omegaconf import DictConfig, OmegaConf, open_dict
from torch.optim import SGD, Optimizer

from experiments.running.build import build, target
from minidist.ddp import DistributedDataParallel
from minidist.errors import ConfigError
from minidist.gradients.hooks import AllReduce
from minidist.sharded import ShardedOptimizer, ensure_elementwise

SHARDED = "sharded"


def check(cfg: DictConfig) -> None:
    """Refuse an optimizer that would fail on the way, before anything is started.

    Raises:
        ConfigError: in shares, it steps more than single elements, or the hook needs whole buckets; fused, it cannot do
            without a gradient.
    """
    _check_fused(cfg)
    if _is_sharded(cfg):
        _check_sharded(cfg)


def _check_fused(cfg: DictConfig) -> None:
    """Torch's fused SGD with momentum fails once a parameter has its first gradient later than the others."""
    is_sgd = target(cfg, "optim") is SGD
    if is_sgd and cfg.optim.get("fused") and cfg.optim.get("momentum") and cfg.ddp.find_unused_parameters:
        raise ConfigError(
            "ddp.find_unused_parameters=true: torch's fused SGD with momentum takes no parameter that has had no "
            "gradient at first; use optim.fused=false"
        )


def _check_sharded(cfg: DictConfig) -> None:
    try:
        ensure_elementwise(target(cfg, "optim"))
    except TypeError as error:
        raise ConfigError(f"optim.sharded=true: {error}") from None
    if target(cfg, "ddp.hook") is not AllReduce:
        raise ConfigError(
            f"optim.sharded=true: ddp.hook is {cfg.ddp.hook._target_}, which reduces whole buckets, and a rank needs "
            "its share alone; use ddp/hook=all_reduce"
        )


def optimizer(cfg: DictConfig, replica: DistributedDataParallel) -> Optimizer:
    """Return the optimizer of the replica's parameters."""
    settings = OmegaConf.create(cfg.optim)
    with open_dict(settings):
        settings.pop(SHARDED, None)
    factory = build(settings, "optim")
    if not _is_sharded(cfg):
        plain: Optimizer = factory(replica.parameters())
        return plain
    return ShardedOptimizer(replica.parameters(), factory.func, replica.comm, **factory.keywords)


def _is_sharded(cfg: DictConfig) -> bool:
    sharded = cfg.optim.get(SHARDED, False)
    if not isinstance(sharded, bool):
        raise ConfigError(f"optim.sharded must be true or false, got {sharded!r}")
    return sharded
