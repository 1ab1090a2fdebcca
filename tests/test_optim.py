"""The optimizer of a job, as ``optim.sharded`` asks for it."""

from __future__ import annotations

import pytest
from torch import optim

from backends.thread import run_threads
from experiments.running.optim import check_sharded, optimizer
from minidist.ddp import DistributedDataParallel
from minidist.errors import ConfigError
from minidist.sharded import ShardedOptimizer
from tests import models
from tests.test_config import composed


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd"])
def test_every_optimizer_of_conf_can_be_sharded_and_is_fused(name: str) -> None:
    def job(comm):
        made = []
        for sharded in ("false", "true"):
            cfg = composed(f"optim={name}", f"optim.sharded={sharded}")
            check_sharded(cfg)
            ddp = DistributedDataParallel(models.seeded(models.mlp()), comm)
            made.append((ddp, optimizer(cfg, ddp)))
        (_, plain), (_, shares) = made
        assert isinstance(shares, ShardedOptimizer)
        assert type(shares.inner) is type(plain)
        assert plain.defaults["fused"]
        assert shares.defaults == plain.defaults

    run_threads(job, 2, timeout_s=30)


def test_a_section_of_ones_own_needs_no_such_setting() -> None:
    cfg = composed("~optim.sharded")
    check_sharded(cfg)
    ddp = DistributedDataParallel(models.mlp(), run_threads(lambda comm: comm, 1)[0])
    assert type(optimizer(cfg, ddp)) is optim.Adam


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optim._target_=torch.optim.LBFGS"], "optim.sharded=true: .*LBFGS is not known to compute each element"),
        (["ddp/hook=bfloat16"], "ddp.hook is minidist.hooks.BFloat16, .*use ddp/hook=all_reduce"),
        (["optim.sharded=maybe"], "optim.sharded must be true or false, got 'maybe'"),
    ],
)
def test_refused_before_ranks_start(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_sharded(composed("optim.sharded=true", *overrides))
