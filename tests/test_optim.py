"""The optimizer of a job, as ``optim.sharded`` asks for it."""

from __future__ import annotations

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from torch import optim

from backends.serial import SerialCommunicator
from backends.thread import run_threads
from experiments.running.optim import check, optimizer
from experiments.running.run import CONF
from minidist.ddp import DistributedDataParallel
from minidist.errors import ConfigError
from minidist.sharded import ShardedOptimizer
from tests import models


def composed(*overrides: str) -> DictConfig:
    with initialize_config_dir(CONF, version_base="1.3"):
        return compose("mnist", overrides=list(overrides))


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd"])
def test_every_optimizer_of_conf_can_be_sharded_and_is_fused(name: str) -> None:
    configurations = [composed(f"optim={name}", f"optim.sharded={sharded}") for sharded in ("false", "true")]

    def job(comm):
        ddps = [DistributedDataParallel(models.seeded(models.mlp()), comm) for _ in configurations]
        plain, shares = (optimizer(cfg, ddp) for cfg, ddp in zip(configurations, ddps, strict=True))
        assert isinstance(shares, ShardedOptimizer)
        assert type(shares.inner) is type(plain)
        assert plain.defaults["fused"]
        assert shares.defaults == plain.defaults

    for cfg in configurations:
        check(cfg)
    run_threads(job, 2, timeout_s=30)


def test_a_section_of_ones_own_needs_no_such_setting() -> None:
    cfg = composed("~optim.sharded")
    check(cfg)
    ddp = DistributedDataParallel(models.mlp(), SerialCommunicator())
    assert type(optimizer(cfg, ddp)) is optim.Adam


@pytest.mark.parametrize("setting", ["optim.fused=false", "optim.momentum=0", "optim=adamw"])
def test_what_takes_late_gradients_may_have_them(setting: str) -> None:
    check(composed("optim=sgd", "ddp.find_unused_parameters=true", setting))


def test_torch_fused_sgd_takes_no_late_gradient() -> None:
    first, second = (torch.ones(3, requires_grad=True) for _ in range(2))
    fused = optim.SGD([first, second], lr=0.1, momentum=0.9, fused=True)
    first.grad = torch.ones(3)
    fused.step()
    second.grad = torch.ones(3)
    with pytest.raises(TypeError):  # else the check above has lost its reason
        fused.step()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["optim.sharded=true", "optim._target_=torch.optim.LBFGS"],
            r"optim.sharded=true: .*LBFGS is not known to compute each element",
        ),
        (
            ["optim.sharded=true", "ddp/hook=bfloat16"],
            r"ddp.hook is minidist.hooks.BFloat16, .*use ddp/hook=all_reduce",
        ),
        (
            ["optim=sgd", "ddp.find_unused_parameters=true"],
            r"fused SGD with momentum takes no parameter .*use optim.fused=false",
        ),
        (["optim.sharded=maybe"], r"optim.sharded must be true or false, got 'maybe'"),
    ],
)
def test_refused_before_ranks_start(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check(composed(*overrides))
