"""Calibration, the choice by the model, the trace of a real run, and the prediction of a step."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from backends import auto
from backends.algorithm import AlgorithmCommunicator
from backends.auto import OWN, AutoCommunicator, fits, in_order, own_seconds
from backends.calibration import FLOOR_S, Tables, calibrate, fitted, slowest_median
from backends.ring import ring_all_reduce
from backends.schedules.bruck import bruck_all_to_all
from backends.schedules.direct import one_shot_all_reduce, two_shot_all_reduce
from backends.schedules.doubling import halving_doubling_all_reduce, recursive_doubling_all_reduce
from backends.serial import SerialCommunicator
from backends.thread import ThreadCommunicator, run_threads, spawn_threads
from backends.traced import Entry, TracedCommunicator, timed
from experiments.calibrate import show, write
from experiments.measuring.step_model import MEGABYTE, Profile, profile
from experiments.predict import fastest, geometric_mean_error, recommended
from minidist.analysis.network import Flat
from minidist.analysis.simulate import Message, simulate
from minidist.collective import Run
from minidist.communicator import Communicator
from minidist.schedule import Reduce, Send, Step, num_chunks
from tests.test_commands import ROOT, run_python, run_ranks

TABLES = Tables(2, 5e-5, [1e3, 1e6], [1e-5, 1e-3], [2e-5, 2e-3], [0.0, 1e-4], [0.0, 2e-4])


def test_a_fit_finds_alpha_and_beta_again() -> None:
    sizes = [1e3, 1e4, 1e5, 1e6, 1e7]
    assert fitted(sizes, [1e-5 + 2e-9 * m for m in sizes]) == pytest.approx((1e-5, 2e-9))
    assert fitted(sizes, [2e-9 * m for m in sizes]) == pytest.approx((0, 2e-9), abs=1e-12)
    assert fitted(sizes, [3e-5] * 5) == pytest.approx((3e-5, 0), abs=1e-12)
    assert fitted(sizes, [0.0] * 5) == (0, 0)
    alpha, beta = fitted([1e3, 1e6], [1e-3, 1e-4])  # larger messages that are faster: no line of that kind
    assert alpha >= 0
    assert beta >= 0


def test_a_fit_leaves_out_what_noise_has_hidden() -> None:
    assert fitted([1e3, 1e4, 1e5], [1e-5, FLOOR_S, 1e-5]) == pytest.approx((1e-5, 0), abs=1e-9)


def test_what_noise_has_hidden_is_not_shown_as_0_us() -> None:
    hidden = replace(TABLES, one_way=[FLOOR_S, 1e-3], exchange=[FLOOR_S, 2e-3])
    _, first, second, *_, last = show(hidden).splitlines()
    assert first.split() == ["1000", "-", "-", "-", "-", "-"]
    assert second.split() == ["1000000", "1000.0", "2000.0", "100.0", "200.0", "0.50"]
    assert last == "-: less than the noise; measure more often, with larger iterations"
    assert "-:" not in show(replace(TABLES, reduce=[1e-6, 1e-4], reduce_all=[1e-6, 1e-4]))


class Steady(ThreadCommunicator):
    """Takes 10 ms to begin, and 1 ms for a message: more than what a busy machine adds to either."""

    def _agree(self, collective, numel, dtype, op, root, timeout_s):
        time.sleep(0.01)
        return super()._agree(collective, numel, dtype, op, root, timeout_s)

    def _isend(self, tensor, dst, tag, timeout_s):
        time.sleep(0.001)
        return super()._isend(tensor, dst, tag, timeout_s)


def test_calibration_measures_every_exchange_at_every_size() -> None:
    for tables in spawn_threads(lambda: calibrate(Steady(timeout_s=60), [1024, 65536], iterations=1), 3):
        columns = (tables.nbytes, tables.one_way, tables.exchange, tables.reduce, tables.reduce_all)
        assert all(len(column) == 2 for column in columns)
        assert tables.ranks == 3
        assert 0 < tables.start < 1
        assert min(tables.one_way + tables.exchange) > 0
        assert min(tables.reduce + tables.reduce_all) >= 0
        assert simulate(ring_all_reduce, Run("all_reduce", 3), 2**20, tables.network()).seconds > tables.start


def test_one_rank_has_nothing_to_measure() -> None:
    with pytest.raises(ValueError, match="there is nothing to measure on one rank"):
        calibrate(SerialCommunicator(), [1024])


def test_presets_are_written_and_read_again(tmp_path: Path) -> None:
    write(tmp_path, "mine_2", TABLES)
    with initialize_config_dir(str(tmp_path), version_base="1.3"):
        measured = instantiate(compose("network/mine_2").network)
        flat = instantiate(compose("network/mine_2_flat").network)
    for nbytes in (1e3, 3e5, 1e8):
        assert measured.route(0, 1, nbytes, True) == TABLES.network().route(0, 1, nbytes, True)
    assert flat.route(0, 1, 1).alpha == pytest.approx(TABLES.alpha_beta_gamma()["alpha"], rel=1e-3)
    assert "alpha" in show(TABLES)
    assert json.dumps(asdict(TABLES))


# comm=auto ---------------------------------------------------------------------------------------


def test_auto_chooses_what_the_model_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """A network of 100 us per message: doubling for small tensors, halving for large ones, both before the ring."""
    monkeypatch.setattr(auto, "own_seconds", lambda transport, collective, nbytes: 1.0)
    choices = {"all_reduce": [ring_all_reduce, recursive_doubling_all_reduce, halving_doubling_all_reduce]}

    def job(comm: Communicator) -> list[str]:
        chooser = AutoCommunicator(comm, choices, Flat(1e-4, 1e-9))
        data = torch.arange(5000.0) + comm.rank
        chooser.all_reduce(data)
        assert torch.equal(data, 4 * torch.arange(5000.0) + 6)
        return [chooser.choice("all_reduce", 2**power) for power in (4, 28)] + [chooser.choice("broadcast", 4)]

    names = ["recursive_doubling_all_reduce", "halving_doubling_all_reduce", OWN]
    assert run_threads(job, 4) == [names] * 4


def test_auto_takes_the_transports_own_way_where_that_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto, "own_seconds", lambda transport, collective, nbytes: 1e-9 * nbytes)
    choices = {"all_reduce": [ring_all_reduce]}

    def job(comm: Communicator) -> list[str]:
        chooser = AutoCommunicator(comm, choices, Flat(1e-4, 1e-10))
        return [chooser.choice("all_reduce", 2**power) for power in (10, 26)]

    assert run_threads(job, 3) == [[OWN, "ring_all_reduce"]] * 3


def test_auto_measures_where_no_network_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto, "SIZES", (1024, 16384))

    def job(comm: Communicator) -> list[str]:
        chooser = AutoCommunicator(comm, {"all_reduce": [ring_all_reduce, one_shot_all_reduce]})
        return [chooser.choice("all_reduce", 2**power) for power in range(4, 24)]

    first, *others = run_threads(job, 3)
    assert others == [first, first]


class Slow(ThreadCommunicator):
    """A transport on which every message takes 5 ms."""

    def _isend(self, tensor, dst, tag, timeout_s):
        time.sleep(0.005)
        return super()._isend(tensor, dst, tag, timeout_s)


def test_a_slow_transport_is_measured_at_fewer_sizes_on_all_ranks_alike() -> None:
    """All sizes, each as often as on a fast one, would take 40 s."""

    def job() -> tuple[float, list[str]]:
        comm, started = Slow(), time.monotonic()
        chooser = AutoCommunicator(comm, {"all_reduce": [ring_all_reduce, one_shot_all_reduce]}, budget_s=0.5)
        return time.monotonic() - started, [chooser.choice("all_reduce", 2**power) for power in range(4, 26)]

    results = spawn_threads(job, 3)
    assert max(seconds for seconds, _ in results) < 15
    assert len({tuple(choices) for _, choices in results}) == 1


def test_a_size_is_measured_if_it_is_expected_to_fit() -> None:
    assert fits({}, 2**24, 0.001), "two sizes are measured in any case"
    assert fits({4096: 100.0}, 2**24, 0.001)
    assert fits({4096: 1.0, 2**20: 1.0}, 2**16, 3.1)
    assert not fits({4096: 1.0, 2**20: 1.0}, 2**16, 2.9)
    assert not fits({4096: 1.0, 2**20: 1.0}, 2**22, 5.9), "four times as large"
    assert fits({4096: 1.0, 2**20: 1.0}, 2**22, 6.1)


@pytest.mark.parametrize("num", range(2, 9))
def test_every_size_has_its_turn_and_the_first_two_lie_apart(num: int) -> None:
    sizes = list(range(num))
    assert sorted(in_order(sizes)) == sizes
    assert in_order(sizes)[0] == 0
    assert in_order(sizes)[1] >= num // 2


@pytest.mark.parametrize("budget_s", [0.0, -1.0, math.nan])
def test_a_budget_of_no_time_is_refused(budget_s: float) -> None:
    with pytest.raises(ValueError, match=f"budget_s must be greater than 0 seconds, got {budget_s}"):
        AutoCommunicator(SerialCommunicator(), {"all_reduce": [ring_all_reduce]}, budget_s=budget_s)


@pytest.mark.parametrize("limit_s", [1e-9, 0.01, math.inf])
def test_what_takes_long_is_run_less_often_on_all_ranks_alike(limit_s: float) -> None:
    def job(comm: Communicator) -> int:
        runs = []
        slowest_median(comm, lambda: runs.append(comm.barrier()), 1024, 3, limit_s)
        return len(runs)

    first, *others = run_threads(job, 3)
    assert others == [first, first]
    assert first == 4 if limit_s == 1e-9 else 4 <= first <= 2 + 3 * 21


@pytest.mark.parametrize("collective", ["all_reduce", "all_gather", "reduce_scatter", "all_to_all"])
def test_the_transports_own_way_is_timed(collective: str) -> None:
    assert min(run_threads(lambda comm: own_seconds(comm, collective, 4096), 2)) > 0


def test_auto_is_for_collectives_that_it_can_time() -> None:
    with pytest.raises(ValueError, match=r"auto chooses between schedules of all_reduce, .*, not of barrier"):
        AutoCommunicator(SerialCommunicator(), {"barrier": []})


def only_for_two(rank: int, world_size: int) -> Iterator[Step]:
    yield Send(rank ^ 1, 0), Reduce(rank ^ 1, 0)


def test_auto_leaves_out_what_is_wrong_on_so_many_ranks(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(auto, "own_seconds", lambda transport, collective, nbytes: 1.0)
    choices = {"all_reduce": [num_chunks(1)(only_for_two), ring_all_reduce]}

    def chosen(comm: Communicator) -> str:
        return AutoCommunicator(comm, choices, Flat(1e-4, 1e-9)).choice("all_reduce", 8)

    assert run_threads(chosen, 2) == ["only_for_two"] * 2
    assert not caplog.records
    assert run_threads(chosen, 3) == ["ring_all_reduce"] * 3
    assert "auto leaves out" in caplog.text


def test_auto_takes_rank_0s_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto, "own_seconds", lambda transport, collective, nbytes: 1e3)
    choices = {"all_reduce": [ring_all_reduce, recursive_doubling_all_reduce]}

    def chosen(comm: Communicator) -> str:
        network = Flat(1e-12, 1e-6) if comm.rank == 0 else Flat(1.0, 1e-12)
        return AutoCommunicator(comm, choices, network).choice("all_reduce", 2**16)

    assert run_threads(chosen, 4) == ["ring_all_reduce"] * 4


# The trace of a real run -------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", [ring_all_reduce, two_shot_all_reduce, recursive_doubling_all_reduce])
def test_a_trace_has_the_messages_of_the_schedule_with_real_times(schedule) -> None:
    def job() -> list[Entry]:
        traced = TracedCommunicator(ThreadCommunicator())
        algorithm = AlgorithmCommunicator(traced, {"all_reduce": schedule})
        traced.log.clear()
        algorithm.all_reduce(torch.ones(1200))
        return traced.log

    plan = simulate(schedule, Run("all_reduce", 3), 4800, Flat(1, 0), record=True).messages
    messages = timed(plan, spawn_threads(job, 3))
    assert len(messages) == len(plan)
    assert {message[:4] for message in messages} == {message[:4] for message in plan}
    assert all(0 <= message.begins <= message.ends < 60 for message in messages)
    assert sorted(message.nbytes for message in messages) == sorted(message.nbytes for message in plan)


def test_a_log_that_does_not_fit_is_refused() -> None:
    plan = [Message(0, 1, 0, 0, (0,), (0,), False, 4, 0, 1)]
    send, receive = Entry(True, 1, 4, 0.0, 1.0), Entry(False, 0, 4, 0.5, 2.0)
    assert timed(plan, [[send], [receive]])[0][-3:] == (4, 0.0, 2.0)
    with pytest.raises(ValueError, match="the log of rank 0 has no further message to rank 1"):
        timed(plan, [[], []])
    with pytest.raises(ValueError, match="messages that are not in the plan"):
        timed(plan, [[send, send], [receive]])


# Predictions -------------------------------------------------------------------------------------


def test_a_step_ends_when_the_last_bucket_has_been_reduced() -> None:
    step = Profile([2 * MEGABYTE] * 3, [0.1, 0.2, 0.3], backward=0.3, step=0.4)
    assert step.seconds(1, lambda nbytes: 0.0) == 0.4
    assert step.seconds(1, lambda nbytes: 0.05) == pytest.approx(0.45)  # only the last one is exposed
    assert step.seconds(1, lambda nbytes: 0.2) == pytest.approx(0.1 + 0.6 + 0.1)  # one after the other
    assert step.seconds(100, lambda nbytes: nbytes / MEGABYTE / 10) == pytest.approx(0.1 + 0.6 + 0.1)
    assert step.seconds(100, lambda nbytes: 0.2) == pytest.approx(0.3 + 0.2 + 0.1)  # two buckets: 2 MB, then 4 MB


def test_a_profile_has_the_gradients_in_the_order_of_backward() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(50, 100), torch.nn.ReLU(), torch.nn.Linear(100, 10))
    measured = profile(model, [50], batch_size=4, iterations=3)
    assert list(measured.nbytes) == [40, 4000, 400, 20000]
    assert max(measured.ready[:2]) <= min(measured.ready[2:]) <= measured.backward <= measured.step


def test_errors_and_crossovers_of_rows() -> None:
    def row(nbytes: int, algorithm: str, predicted: float, measured: float) -> dict[str, object]:
        return {"bytes": nbytes, "algorithm": algorithm, "predicted_us": predicted, "measured_us": measured}

    rows = [row(1, "a", 1, 2), row(1, "b", 3, 3), row(4, "a", 8, 4), row(4, "b", 5, 5), row(16, "b", 1, 1)]
    assert geometric_mean_error(rows) == pytest.approx(math.exp(2 * math.log(2) / 5) - 1)
    assert list(fastest(rows, "predicted_us")) == [(1, "a"), (4, "b")]
    assert list(fastest(rows, "measured_us")) == [(1, "a"), (16, "b")]
    steps = [{"world_size": n, "step_ms": ms} for n, ms in ((8, 3), (8, 2), (16, 5))]
    assert recommended(steps) == steps[1:]


def test_bruck_is_chosen_for_small_blocks_on_many_ranks() -> None:
    from backends.schedules.pairwise import pairwise_all_to_all

    def faster(nbytes: int) -> bool:
        both = (
            simulate(s, Run("all_to_all", 32), nbytes, Flat(1e-5, 1e-9)).seconds
            for s in (bruck_all_to_all, pairwise_all_to_all)
        )
        return next(both) < next(both)

    assert faster(32 * 8)
    assert not faster(2**24)


# The commands -------------------------------------------------------------------------------------


@pytest.mark.timeout(300)
def test_predict_as_the_readme_has_it(tmp_path: Path) -> None:
    """Calibrates on the way; small sizes, few ranks."""
    settings = [
        "max_bytes=65536",
        "iterations=1",
        "rounds=1",
        "algorithms=[ring,direct]",
        "world_sizes=[8,16]",
        f"hydra.run.dir={tmp_path}",
    ]
    model = ["model._target_=experiments.tasks.models.cnn", "model.shape=[1,28,28]", "+model.width=4"]
    done = run_ranks(tmp_path, 2, str(ROOT / "experiments" / "predict.py"), "transport=gloo", *settings, *model)
    assert done.returncode == 0, done.stderr
    assert "geometric mean error" in done.stderr
    rows = json.loads((tmp_path / "predict.json").read_text())["rows"]
    assert [row["algorithm"] for row in rows] == ["ring", "direct"]
    steps = json.loads((tmp_path / "predict_step.json").read_text())["rows"]
    assert {row["world_size"] for row in steps} == {8, 16}
    assert all(row["exposed_ms"] >= 0 for row in steps)


@pytest.mark.timeout(300)
def test_a_calibrated_preset_predicts(tmp_path: Path) -> None:
    small = ("transport=gloo", "max_bytes=4096", "iterations=1", f"hydra.run.dir={tmp_path}")
    done = run_ranks(tmp_path, 2, str(ROOT / "experiments" / "calibrate.py"), *small)
    assert done.returncode == 0, done.stderr
    assert "network=gloo_2" in done.stderr
    settings = ("network=gloo_2", "algorithm=ring", "world_size=2", f"hydra.run.dir={tmp_path}/drawn")
    drawn = run_python(tmp_path, str(ROOT / "experiments" / "draw.py"), "--config-dir", str(tmp_path), *settings)
    assert drawn.returncode == 0, drawn.stderr
    assert "network gloo_2" in drawn.stderr


@pytest.mark.timeout(300)
def test_a_real_run_is_drawn(tmp_path: Path) -> None:
    settings = ("algorithm=swing", "nbytes=4096", "warmup=1", f"hydra.run.dir={tmp_path}")
    done = run_ranks(tmp_path, 3, str(ROOT / "experiments" / "timeline.py"), *settings)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "timeline.png").stat().st_size > 10_000
    assert (tmp_path / "timeline.svg").read_text().startswith("<?xml")
