"""The judge: one's own hook beside another, on all networks; and what it refuses before any rank starts."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir

from backends.serial import SerialCommunicator
from experiments.judge import check
from experiments.measuring.contenders import contenders_of
from experiments.measuring.contest import Contender, Task, Trial, trial
from experiments.measuring.verdict import rows_of, target_of, undisturbed, winners
from experiments.tasks import data
from experiments.tasks.models import gpt, mlp
from experiments.tasks.text import Text, standard_library
from minidist import config
from minidist.analysis.network import Flat
from minidist.config import TextConfig
from minidist.ddp import DistributedDataParallel
from minidist.errors import ConfigError
from minidist.gradients.hooks import AllReduce, BFloat16, Hook
from minidist.methods import DiLoCo, EveryStep, Gossip, LocalSGD, Method, StreamingDiLoCo
from tests.test_commands import ROOT, run_python

NETWORKS = {"slow": Flat(1e-3, 1e-6), "fast": Flat(1e-5, 1e-9)}


def run(tmp_path: Path, *settings: str) -> subprocess.CompletedProcess[str]:
    program = str(ROOT / "experiments" / "judge.py")
    variables = {"PYTHONPATH": str(tmp_path)}
    return run_python(tmp_path, program, *settings, f"hydra.run.dir={tmp_path}", variables=variables)


def made_up(losses: list[float], step_s: float) -> Trial:
    """Return a trial with a test after every second step, on networks of which the first one takes twice as long."""
    steps = 2.0 * np.arange(1, len(losses) + 1)
    seconds = step_s * steps[:, None] * np.array([[2.0, 1.0]])
    return Trial(steps, np.array(losses), np.full(len(losses), 0.5), 100 * steps, seconds, np.array([0.5, 0.25]))


@contextmanager
def hydra_of_the_project() -> Iterator[None]:
    config.register()
    config.register_resolvers(run_id=lambda: "a_run", rank=lambda: 0)
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        yield


def found(methods: str) -> list[Contender]:
    """Return the contenders of a setting, on 8 ranks."""
    with hydra_of_the_project():
        return contenders_of(compose("judge", overrides=[f"methods={methods}"]), "digits")


def nbytes_of(task: Task) -> int:
    return sum(parameter.nbytes for parameter in task.module.parameters())


def plain(hook: Callable[[], Hook] = AllReduce, method: Callable[[], Method] = EveryStep) -> Contender:
    return Contender("a contender", hook, method, lambda replica: torch.optim.SGD(replica.parameters(), 0.1))


def digits_task(steps: int) -> Task:
    with SerialCommunicator() as comm:
        digits = data.load(data.DataConfig("digits"), comm, 0)
    torch.manual_seed(0)
    return Task("digits", digits, mlp(digits.shape, digits.num_classes, 8, 1), 8, steps, 1, 1)


def test_one_contest_of_ones_own(tmp_path: Path) -> None:
    """A hook and a method that lie in a file of their own."""
    (tmp_path / "mine.py").write_text(
        "from minidist.gradients.hooks import BFloat16\n"
        "from minidist.methods import LocalSGD\n\n\n"
        "class Hook:\n"
        "    def __call__(self, bucket, comm):\n"
        "        return BFloat16()(bucket, comm)\n\n\n"
        "def every(period):\n"
        "    return LocalSGD(period)\n"
    )
    done = run(
        tmp_path,
        "methods=[all_reduce,mine.Hook,{mine.every:{period:2}}]",
        "tasks=[digits]",
        "seeds=[0]",
        "world_size=2",
        "contests.digits.steps=4",
        "networks=[ethernet_1g,ethernet_10g]",
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "judge.json").read_text())["rows"]
    assert [row["method"] for row in rows] == ["all_reduce", "mine.Hook", "mine.every(period=2)"]
    assert [row["fewer"] for row in rows] == [1.0, 2.0, 2.0]
    assert all(row["exposed_ms_ethernet_1g"] > row["exposed_ms_ethernet_10g"] > 0 for row in rows)
    assert "digits on ethernet_1g: " in done.stderr
    for name in ("judge.csv", "judge.html", "judge_digits.png"):
        assert (tmp_path / name).stat().st_size > 0


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("methods=[top_q]", "methods must be of all_reduce, "),
        ("methods=[mine.Method]", "methods: mine.Method: it cannot be imported: No module named 'mine'"),
        ("methods=[fractions.Fraction]", "which is neither a Method nor a hook; a hook is called with (bucket, comm)"),
        ("methods=[minidist.methods.Method]", "methods: minidist.methods.Method: it cannot be made: "),
        ("methods=[int8,int8]", "methods has int8 twice: [int8, int8]"),
        ("methods=[int8/top_k]", "methods must be of all_reduce, "),
        ("methods=[error_feedback/top_q]", "; error_feedback/ and one of float8, int8, "),
        ("methods=[{diloco:{period:0}}]", "methods: diloco(period=0): method.period must be at least 1, got 0"),
        ("methods=[{diloco:{perod:4}}]", "methods: diloco(perod=4): Could not override 'method.perod'"),
        ("methods=[{diloco:4}]", "methods: diloco must be followed by its settings, as in diloco: {period: 32}; got 4"),
        ("methods=[{diloco:{period:4},gossip:{}}]", "methods: each must be a name, or one with settings"),
        ("methods=[{local_sgd:{ranks_per_worker:3}}]", "ranks_per_worker is 3, which does not divide the number of"),
        ("methods=[{gossip:{ranks_per_worker:8}}]", "Gossip: there is nobody to tell with one worker"),
        ("methods=[{streaming_diloco:{tau:16}}]", "tau must be below period, 16"),
        ("methods=[{diloco:{ddp/hook:int8}}]", "with DiLoCo no gradients are averaged; use ddp/hook=all_reduce"),
        ("methods=[{diloco:{optim.sharded:true}}]", "optim.sharded=true: it has all ranks step one model together"),
        ("methods=[{int8:{optim:adamx}}]", "methods: int8(optim=adamx): "),
        (
            "methods=[{streaming_diloco:{num_fragments:9}}]",
            "num_fragments is 9, and there are 8 parameters",
        ),
        ("methods=[{diloco:{outer_lr:inf}}]", "method.outer_lr must be finite, got inf"),
        ("methods=[{diloco:{outer_momentum:1}}]", "outer_momentum must be at least 0 and below 1, got 1"),
        ("methods=[{top_k:{fraction:0}}]", "fraction must be above 0 and at most 1, got 0"),
        ("methods=[{minidist.compression.PowerSGD:{rank:0}}]", "rank must be a whole number of at least 1, got 0"),
        ("seeds=[0.5]", "seeds must be a whole number of at least 0, got 0.5"),
        ("contests.digits.test_every=nan", "test_every must be a whole number of at least 1, got nan"),
        ("contests.digits.target=soon", "target of digits must be a loss greater than 0, or null, got soon"),
        ("methods=[]", "methods must be a list of one or more values"),
        ("networks=[token_ring]", "networks must be of "),
        ("tasks=[chess]", "tasks must be of digits, gpt, got chess"),
        ("world_size=1", "world_size must be at least 2, got 1"),
        ("contests.gpt.steps=0", "steps must be at least 1, got 0"),
    ],
)
def test_a_wrong_setting_is_one_sentence(setting: str, message: str) -> None:
    with hydra_of_the_project(), pytest.raises(ConfigError) as caught:
        check(compose("judge", overrides=[setting]))
    assert message in str(caught.value)


def test_what_is_wrong_is_said_before_any_rank_starts(tmp_path: Path) -> None:
    done = run(tmp_path, "methods=[all_reduce,top_q]")
    assert done.returncode != 0
    assert done.stderr.splitlines()[-1].startswith("error: methods must be of all_reduce, ")
    assert "Loss" not in done.stderr


def test_what_is_learned_does_not_depend_on_the_network() -> None:
    task = digits_task(steps=3)
    one = trial(task, plain(), NETWORKS, 2, 0, 1)
    other = trial(task, plain(), {"fast": NETWORKS["fast"]}, 2, 0, 2)
    assert one.losses.tolist() == other.losses.tolist()
    assert one.accuracies.tolist() == other.accuracies.tolist()
    assert one.sent.tolist() == [nbytes_of(task) * step for step in (1, 2, 3)]
    assert trial(task, plain(BFloat16), NETWORKS, 2, 0, 1).sent.tolist() == [
        nbytes_of(task) / 2 * step for step in (1, 2, 3)
    ]
    assert (one.seconds[:, 0] > one.seconds[:, 1]).all()


def test_a_method_sends_when_it_says() -> None:
    """On 4 ranks, M bytes of a model: local SGD 3/2 M every second step; gossip M + 8 each; two workers of two more."""
    task = digits_task(steps=4)
    nbytes = nbytes_of(task)

    def sent(method: Callable[[], Method]) -> list[float]:
        return trial(task, plain(method=method), NETWORKS, 4, 0, 1).sent.tolist()

    average = 1.5 * nbytes
    assert sent(lambda: LocalSGD(2)) == pytest.approx([0, average, average, 2 * average])
    assert sent(lambda: LocalSGD(2, local_after=2)) == pytest.approx([average, 2 * average, 2 * average, 3 * average])
    assert sent(Gossip) == [(nbytes + 8) * step for step in (1, 2, 3, 4)]
    # A rank averages M with its neighbour in every step; in every second it exchanges its half, and passes it on.
    workers = sent(lambda: DiLoCo(2, ranks_per_worker=2))
    assert workers == pytest.approx([nbytes, 3 * nbytes, 4 * nbytes, 6 * nbytes], rel=0.02)


def test_what_is_tested_is_what_all_ranks_stand_for() -> None:
    """DiLoCo shows what it agreed on last, though its replicas have learned; local SGD shows their mean."""
    task = digits_task(steps=7)
    done = trial(task, plain(method=lambda: DiLoCo(4)), NETWORKS, 2, 0, 1)
    assert done.losses.tolist() == [done.losses[0]] * 3 + [done.losses[3]] * 4
    assert done.losses[3] < done.losses[0]
    local = trial(task, plain(method=lambda: LocalSGD(4)), NETWORKS, 2, 0, 1)
    assert len(set(local.losses.tolist())) == 7


@pytest.mark.parametrize("method", [EveryStep, lambda: LocalSGD(3), lambda: StreamingDiLoCo(4, 2, tau=2), Gossip])
def test_tests_change_nothing(method: Callable[[], Method]) -> None:
    """Neither what is learned, nor what is sent."""
    task = digits_task(steps=8)
    often, once = (trial(replace(task, test_every=every), plain(method=method), NETWORKS, 2, 0, 1) for every in (1, 8))
    assert often.steps.tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    assert (once.steps.tolist(), once.losses[0], once.sent[0]) == ([8], often.losses[-1], often.sent[-1])


def test_a_name_is_found_where_it_is() -> None:
    names = "[int8,error_feedback/top_k,gossip,minidist.methods.LocalSGD,minidist.gradients.hooks.BFloat16]"
    made = [(type(one.hook()).__name__, type(one.method()).__name__) for one in found(names)]
    assert made == [
        ("Quantized", "EveryStep"),
        ("ErrorFeedback", "EveryStep"),
        ("AllReduce", "Gossip"),
        ("AllReduce", "LocalSGD"),
        ("BFloat16", "EveryStep"),
    ]


def test_settings_are_those_of_what_stands_before_them() -> None:
    streaming, own, wrapped, cast = found(
        "[{streaming_diloco:{period:32,ddp/hook@method.hook:float8,optim:sgd,optim.lr:0.5}},"
        "{minidist.methods.LocalSGD:{period:3}},{error_feedback/top_k:{compressor.fraction:0.5}},bfloat16]"
    )
    made = streaming.method()
    assert isinstance(made, StreamingDiLoCo)
    assert (made.period, type(made.hook).__name__) == (32, "Quantized")
    assert streaming.name == "streaming_diloco(period=32, ddp/hook@method.hook=float8, optim=sgd, optim.lr=0.5)"
    local = own.method()
    assert isinstance(local, LocalSGD)
    assert local.period == 3
    assert wrapped.hook().describe().count("0.5") == 1  # type: ignore[attr-defined]  # a Compressor has it
    with SerialCommunicator() as comm:
        replica = DistributedDataParallel(torch.nn.Linear(2, 2), comm)
        (theirs,) = streaming.optimizer(replica).param_groups
        (ours,) = cast.optimizer(replica).param_groups
    assert (theirs["lr"], ours["lr"]) == (0.5, 0.002)
    assert "momentum" in theirs
    assert "betas" in ours


def test_each_rank_gets_its_own() -> None:
    for one in found("[error_feedback/top_k,diloco,minidist.methods.LocalSGD]"):
        assert one.method() is not one.method()
        assert one.hook() is not one.hook()


def test_a_name_in_both_groups_is_refused(tmp_path: Path) -> None:
    for group, target in (("ddp/hook", "minidist.hooks.AllReduce"), ("method", "minidist.methods.Gossip")):
        (tmp_path / group).mkdir(parents=True)
        (tmp_path / group / "mine.yaml").write_text(f"_target_: {target}\n")
    done = run(tmp_path, "--config-dir", str(tmp_path), "methods=[all_reduce,mine]")
    assert done.stderr.splitlines()[-1].startswith("error: methods: mine is a choice of both ddp/hook and method;")


def test_who_is_the_first_at_the_target() -> None:
    """The other method needs twice the steps at a quarter of their time."""
    trials = {"plain": [made_up([4, 3, 2, 1], 1.0)], "other": [made_up([4, 4, 4, 2], 0.25)]}
    assert target_of(trials) == 3.0
    assert trials["other"][0].seconds_to(1.0) is None
    rows = rows_of("toy", trials, ["slow", "fast"], 2.0)
    assert [row["target_s_slow"] for row in rows] == [12.0, 4.0]
    assert [row["exposed_ms_fast"] for row in rows] == [250.0, 250.0]
    assert [row["bytes_per_step"] for row in rows] == [100.0, 100.0]
    line = "toy on slow: other is the first at loss 2.000, after 4 s, 3 times as fast as plain"
    assert winners(rows, ["slow"], 2.0) == [line]
    nobody = rows_of("toy", trials, ["slow", "fast"], 0.5)
    assert winners(nobody, ["fast"], 0.5) == ["toy on fast: nobody reaches a loss of 0.500"]
    plain_wins = rows_of("toy", trials, ["slow", "fast"], 1.5)
    sentence = "toy on fast: nothing is faster than plain, which is at loss 1.500 after 7 s"
    assert winners(plain_wins, ["fast"], 1.5) == [sentence]


def test_what_disturbs_one_seed_for_a_while_does_not_count() -> None:
    """One seed is slow before its first test, and the other one after that."""
    one, other = made_up([4, 3], 1.0), made_up([5, 2], 1.0)
    late, later = np.array([[5.0, 5.0], [5.0, 5.0]]), np.array([[0.0, 0.0], [7.0, 7.0]])
    calm = undisturbed([replace(one, seconds=one.seconds + late), replace(other, seconds=other.seconds + later)])
    assert [trial.seconds.tolist() for trial in calm] == [made_up([4, 3], 1.0).seconds.tolist()] * 2
    assert [trial.losses.tolist() for trial in calm] == [[4, 3], [5, 2]]


def test_between_two_tests_the_loss_falls_evenly() -> None:
    one = made_up([4, 3, 1, 2], 1.0)
    times = [one.seconds_to(target) for target in (4.0, 3.5, 2.5, 1.0)]
    assert [then.tolist() for then in times if then is not None] == [[4, 2], [6, 3], [9, 4.5], [12, 6]]


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
