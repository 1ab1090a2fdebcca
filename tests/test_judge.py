"""The judge: one's own hook beside another, on all networks; and what it refuses before any rank starts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir

from backends.serial import SerialCommunicator
from experiments.judge import check
from experiments.measuring.contest import Task, Trial, trial
from experiments.measuring.verdict import rows_of, target_of, winners
from experiments.tasks import data
from experiments.tasks.models import gpt, mlp
from experiments.tasks.text import Text, standard_library
from minidist import config
from minidist.analysis.network import Flat
from minidist.config import TextConfig
from minidist.errors import ConfigError
from minidist.gradients.hooks import AllReduce, BFloat16

ROOT = Path(__file__).parent.parent
NETWORKS = {"slow": Flat(1e-3, 1e-6), "fast": Flat(1e-5, 1e-9)}


def run(tmp_path: Path, *settings: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "experiments" / "judge.py"), f"hydra.run.dir={tmp_path}", *settings]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)


def made_up(losses: list[float], step_s: float) -> Trial:
    seconds = step_s * np.arange(1, len(losses) + 1)[:, None] * np.array([[2.0, 1.0]])
    return Trial(np.array(losses), 100.0 * np.arange(1, len(losses) + 1), seconds, np.array([0.5, 0.25]), 1.0, 0.5)


def test_one_contest_of_ones_own_hook(tmp_path: Path) -> None:
    done = run(
        tmp_path,
        "methods=[all_reduce,minidist.gradients.hooks.BFloat16]",
        "tasks=[digits]",
        "seeds=[0]",
        "world_size=2",
        "contests.digits.steps=4",
        "networks=[ethernet_1g,ethernet_10g]",
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "judge.json").read_text())["rows"]
    assert [row["method"] for row in rows] == ["all_reduce", "minidist.gradients.hooks.BFloat16"]
    assert [row["fewer"] for row in rows] == [1.0, 2.0]
    assert all(row["exposed_ms_ethernet_1g"] > row["exposed_ms_ethernet_10g"] > 0 for row in rows)
    assert "digits on ethernet_1g: " in done.stdout
    for name in ("judge.csv", "judge.html", "judge_digits.png"):
        assert (tmp_path / name).stat().st_size > 0


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("methods=[top_q]", "methods must be of all_reduce, "),
        ("methods=[mine.Method]", "methods: mine.Method cannot be imported: No module named 'mine'"),
        ("methods=[fractions.Fraction]", "which is no hook; a hook is called with (bucket, comm)"),
        ("methods=[]", "methods must be a list of one or more values"),
        ("networks=[token_ring]", "networks must be of "),
        ("tasks=[chess]", "tasks must be of digits, gpt, got chess"),
        ("world_size=1", "world_size must be at least 2, got 1"),
        ("contests.gpt.steps=0", "steps must be at least 1, got 0"),
    ],
)
def test_a_wrong_setting_is_one_sentence(setting: str, message: str) -> None:
    config.register()
    config.register_resolvers(run_id=lambda: "a_run", rank=lambda: 0)
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"), pytest.raises(ConfigError) as caught:
        check(compose("judge", overrides=[setting]))
    assert message in str(caught.value)


def test_what_is_wrong_is_said_before_any_rank_starts(tmp_path: Path) -> None:
    done = run(tmp_path, "methods=[all_reduce,top_q]")
    assert done.returncode != 0
    assert done.stderr.splitlines()[-1].startswith("error: methods must be of all_reduce, ")
    assert "Loss" not in done.stdout


def test_what_is_learned_does_not_depend_on_the_network() -> None:
    with SerialCommunicator() as comm:
        digits = data.load(data.DataConfig("digits"), comm, 0)
    torch.manual_seed(0)
    module = mlp(digits.shape, digits.num_classes, 8, 1)
    task = Task("digits", digits, module, lambda replica: torch.optim.SGD(replica.parameters(), 0.1), 8, 3, 1)
    one = trial(task, AllReduce, NETWORKS, 2, 0, 1)
    other = trial(task, AllReduce, {"fast": NETWORKS["fast"]}, 2, 0, 2)
    assert one.losses.tolist() == other.losses.tolist()
    assert (one.test_loss, one.test_accuracy) == (other.test_loss, other.test_accuracy)
    numel = sum(parameter.numel() for parameter in module.parameters())
    assert one.sent.tolist() == [4 * numel * step for step in (1, 2, 3)]
    assert trial(task, BFloat16, NETWORKS, 2, 0, 1).sent.tolist() == [2 * numel * step for step in (1, 2, 3)]
    assert (one.seconds[:, 0] > one.seconds[:, 1]).all()


def test_who_is_the_first_at_the_target() -> None:
    """The other method needs twice the steps at a quarter of their time."""
    trials = {"plain": [made_up([4, 3, 2, 1], 1.0)], "other": [made_up([4, 4, 4, 2], 0.25)]}
    target = target_of(trials, window=1)
    assert target == 1.0
    assert trials["other"][0].seconds_to(1.0, window=1) is None
    rows = rows_of("toy", trials, ["slow", "fast"], 2.0, window=1)
    assert [row["target_s_slow"] for row in rows] == [6.0, 2.0]
    assert [row["exposed_ms_fast"] for row in rows] == [250.0, 250.0]
    line = "toy on slow: other is the first at loss 2.000, after 2 s, 3 times as fast as plain"
    assert winners(rows, ["slow"], 2.0) == [line]
    nobody = rows_of("toy", trials, ["slow", "fast"], 0.5, window=1)
    assert winners(nobody, ["fast"], 0.5) == ["toy on fast: nobody reaches a loss of 0.500"]


def test_the_loss_is_smoothed_over_the_steps_up_to_it() -> None:
    assert made_up([4, 2, 3, 1], 1.0).smoothed(2).tolist() == [4, 3, 2.5, 2]


def test_text_is_followed_by_its_next_character() -> None:
    text = Text(torch.arange(10, dtype=torch.uint8), context=4)
    inputs, targets = text.__getitems__([0, 1])
    assert inputs.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert targets.tolist() == [[1, 2, 3, 4], [5, 6, 7, 8]]
    assert len(Text(torch.zeros(9, dtype=torch.uint8), context=4)) == 2


def test_the_standard_library_is_there_to_be_read() -> None:
    train, test = standard_library(8, 2)
    assert min(len(train), len(test)) > 1000
    assert max(train.max(), test.max()) < 128
    with SerialCommunicator() as comm:
        chosen = data.load(TextConfig(num_files=8, num_test_files=2, context=16), comm, 0)
    assert (chosen.name, chosen.shape, chosen.num_classes) == ("stdlib", (16,), 128)


def test_a_transformer_sees_no_later_character() -> None:
    torch.manual_seed(0)
    model = gpt((6,), 128, width=8, depth=2, num_heads=2)
    text = torch.randint(128, (2, 6))
    changed = text.clone()
    changed[:, 4:] = 0
    before, after = model(text), model(changed)
    assert before.shape == (2, 128, 6)
    assert torch.allclose(before[..., :4], after[..., :4], atol=1e-6)
    assert not torch.allclose(before[..., 4:], after[..., 4:], atol=1e-6)
    with pytest.raises(ValueError, match=r"gpt reads text, and samples of shape \(1, 28, 28\) are none"):
        gpt((1, 28, 28), 10, 8, 2, 2)
    with pytest.raises(ValueError, match="width must be a multiple of num_heads = 3, got 8"):
        gpt((6,), 128, 8, 2, 3)
