"""Several hosts as they are measured: the model, what measures it, and the choice by it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from backends import auto, host_calibration
from backends.auto import OWN, AutoCommunicator
from backends.calibration import Tables
from backends.clock import LEAST, Clock
from backends.host_calibration import HostTables, between, calibrated, filled, in_turn, inside, measured_hosts
from backends.levels import Placement
from backends.ring import ring_all_reduce
from backends.schedules.direct import two_shot_all_reduce
from backends.thread import ThreadCommunicator, run_threads, spawn_threads
from experiments.calibrate import show, write
from minidist.analysis.measured_hosts import MeasuredHosts, exchanged, fanned
from minidist.analysis.network import Flat
from minidist.analysis.simulate import simulate
from minidist.collective import Run
from minidist.communicator import Communicator
from tests import host_predictions
from tests.hosts import Network

TWO_BY_TWO = [0, 0, 1, 1]
SIZES = [1e3, 1e6]
ALPHA, EACH, BETA = 1e-3, 1e-4, 1e-8


def ideal(hosts: list[int]) -> MeasuredHosts:
    """Lines of ``BETA`` that take ``EACH`` for every message beside; inside of a host everything takes a tenth."""
    return MeasuredHosts(
        hosts,
        start=0.0,
        nbytes=SIZES,
        one_way=[ALPHA + EACH + BETA * m for m in SIZES],
        exchange=[ALPHA + exchanged(hosts) * (EACH + BETA * m) for m in SIZES],
        fan=[ALPHA + fanned(hosts) * (EACH + BETA * m) for m in SIZES],
        reduce=[0.0, 0.0],
        inside=Flat(ALPHA / 10, BETA / 10),
    )


@pytest.mark.parametrize("nbytes", [4e3, 4e5, 4e7])
def test_a_latency_counts_once_and_a_message_each_time(nbytes: float) -> None:
    network = ideal([0, 1, 2, 3])
    chunk = EACH + BETA * nbytes / 4
    ring = simulate(ring_all_reduce, Run("all_reduce", 4), nbytes, network).seconds
    assert ring == pytest.approx(6 * (ALPHA + chunk))
    two_shot = simulate(two_shot_all_reduce, Run("all_reduce", 4), nbytes, network).seconds
    assert two_shot == pytest.approx(2 * (ALPHA + 3 * chunk))


def test_ranks_of_a_host_share_its_card_wherever_they_stand() -> None:
    for hosts in (TWO_BY_TWO, [0, 1, 1, 0]):
        network = ideal(hosts)
        there = hosts.index(1)
        across = network.route(0, there, 1e6)
        assert across.alpha == pytest.approx(ALPHA)
        assert {link.name for link in across.links} == {("card", 0), ("card", 1), ("out", 0), ("in", 1)}
        near = network.route(0, len(hosts) - 1 - hosts[::-1].index(0), 1e6)
        assert near.alpha == pytest.approx(ALPHA / 10)
        assert not {link.name for link in near.links} & {link.name for link in across.links}


def test_a_fan_that_takes_less_than_its_exchange_leaves_no_negative_times() -> None:
    network = MeasuredHosts([0, 1, 2], 0.0, SIZES, [1e-3] * 2, [2e-3] * 2, [1e-3] * 2, [0.0] * 2)
    route = network.route(0, 1, 1e4)
    assert route.alpha == 2e-3
    assert all(link.beta == 0 for link in route.links)
    assert network.route(0, 1, 0).alpha >= 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hosts": [0, 0]}, "hosts must be two or more"),
        ({"nbytes": [1e3]}, "nbytes must be two sizes or more, rising"),
        ({"fan": [1.0]}, "fan must be 2 numbers of seconds"),
        ({"one_way": [1.0, -1.0]}, "one_way must be 2 numbers of seconds, 0 or more"),
        ({"hosts": TWO_BY_TWO}, "inside must be a network, as there are hosts of several ranks, got None"),
    ],
)
def test_tables_that_say_nothing_are_refused(change: dict[str, object], message: str) -> None:
    tables = {name: [1.0, 1.0] for name in ("one_way", "exchange", "fan", "reduce")}
    with pytest.raises(ValueError, match=message):
        MeasuredHosts(**{"hosts": [0, 1], "start": 0.0, "nbytes": SIZES, **tables, **change})  # type: ignore[arg-type]


# Measuring ---------------------------------------------------------------------------------------


def test_every_pattern_sends_what_the_model_counts() -> None:
    for names in ("aabb", "abba", "abc", "aaabb"):
        where = Placement(names, 0)
        hosts = [where.of(rank)[0] for rank in range(len(names))]
        patterns = between(where)
        for name, count in (("exchange", exchanged(hosts)), ("fan", fanned(hosts))):
            pairs = patterns[name](0)
            assert all(hosts[src] != hosts[dst] for src, dst in pairs)
            assert max(sum(hosts[src] == host for src, _ in pairs) for host in set(hosts)) == count
        assert patterns["one_way"](1) == [pair[::-1] for pair in patterns["one_way"](0)]
        for pattern in inside(where).values():
            assert all(hosts[src] == hosts[dst] for src, dst in pattern(0))


def on_two_hosts(comm: Communicator) -> Placement:
    return Placement([f"h{2 * rank // comm.world_size}" for rank in range(comm.world_size)], comm.rank)


def test_hosts_are_measured_alike_on_all_ranks() -> None:
    def job(comm: Communicator) -> HostTables:
        return measured_hosts(comm, on_two_hosts(comm), [4096, 16384, 65536, 2**20], Clock(comm, 1.0))

    first, *others = run_threads(job, 4)
    assert others == [first] * 3
    assert first.hosts == TWO_BY_TWO
    assert first.inside is not None
    assert min(min(column) for column in first.columns()) > 0
    assert simulate(ring_all_reduce, Run("all_reduce", 4), 2**20, first.network()).seconds > first.start
    assert HostTables.median([first] * 3) == first


def test_one_host_is_measured_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    tables = run_threads(lambda comm: calibrated(comm, [1024, 4096], iterations=1, budget_s=1.0), 2)
    assert all(isinstance(one, Tables) for one in tables)
    monkeypatch.setattr(host_calibration, "placement", on_two_hosts)
    tables = run_threads(lambda comm: calibrated(comm, [1024, 4096], iterations=1, budget_s=1.0), 2)
    assert all(isinstance(one, HostTables) and one.inside is None for one in tables)


def test_what_does_not_fit_is_left_out_after_two_sizes() -> None:
    def job() -> tuple[list[bool], int]:
        comm = ThreadCommunicator()
        clock = Clock(comm, 1e-9)
        calls = []

        def prepare() -> Callable[[], object]:
            return lambda: calls.append(comm.barrier())

        return [clock.seconds("barrier", nbytes, prepare) is None for nbytes in (1, 2, 3, 4)], len(calls)

    assert spawn_threads(job, 3) == [([False, False, True, True], 3 * LEAST)] * 3


def test_what_was_left_out_is_extrapolated() -> None:
    assert in_turn([1, 2, 3, 4, 5]) == [1, 3, 4, 5, 2]
    assert filled({1000: 2.0, 3000: 4.0}, [1000, 2000, 3000, 9000]) == pytest.approx([2.0, 3.0, 4.0, 10.0])
    assert filled({1000: 2.0, 3000: 1.0}, [9000])[0] > 0  # noise: the larger one was faster
    assert filled({1000: 2.0, 3000: 1.0, 9000: 4.0}, [1000, 3000, 9000]) == [1.0, 1.0, 4.0]


def test_presets_of_hosts_are_written_and_read_again(tmp_path: Path) -> None:
    near = Tables(2, 0.0, SIZES, [1e-5, 1e-3], [2e-5, 2e-3], [0.0, 0.0], [0.0, 0.0])
    tables = HostTables(TWO_BY_TWO, 1e-4, SIZES, [1e-4, 1e-2], [2e-4, 2e-2], [4e-4, 4e-2], [1e-6, 1e-3], near)
    write(tmp_path, "mine_4", tables)
    with initialize_config_dir(str(tmp_path), version_base="1.3"):
        network = instantiate(compose("network/mine_4").network)
    for src, dst in ((0, 1), (0, 2), (3, 0)):
        assert network.route(src, dst, 3e5) == tables.network().route(src, dst, 3e5)
    assert network.reduction(0, 1e4) == tables.network().reduction(0, 1e4)
    assert network.start == tables.start
    assert "fan_us" in show(tables)
    assert "inside of a host" in show(tables)
    assert json.dumps(tables.model())


# comm=auto ---------------------------------------------------------------------------------------


def choices(comm: Communicator, names: str, own_s: float, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return what auto chooses on these hosts, where the transport's own way takes so long."""
    monkeypatch.setattr(auto, "placement", lambda comm: Placement(names, comm.rank))
    monkeypatch.setattr(Clock, "seconds", lambda self, name, nbytes, prepare: own_s)
    network = ideal([names.index(name) for name in names])
    with AutoCommunicator(comm, {"all_reduce": [ring_all_reduce]}, network) as chooser:
        data = torch.arange(5000.0) + chooser.rank
        chooser.all_reduce(data)
        assert torch.equal(data, 4 * torch.arange(5000.0) + 6)
        return [chooser.choice("all_reduce", 2**power) for power in (12, 24)]


def test_two_levels_are_among_the_choices_where_hosts_have_several_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    two = run_threads(lambda comm: choices(comm, "abab", 9.0, monkeypatch), 4)
    assert two == [["two_level_all_reduce"] * 2] * 4
    one = run_threads(lambda comm: choices(comm, "abcd", 9.0, monkeypatch), 4)
    assert one == [["ring_all_reduce"] * 2] * 4
    own = run_threads(lambda comm: choices(comm, "abab", 1e-9, monkeypatch), 4)
    assert own == [[OWN] * 2] * 4


# On hosts ----------------------------------------------------------------------------------------


def test_auto_on_hosts_chooses_alike_and_trains() -> None:
    with Network(2) as network, network.start("tests.host_ranks", "choose", on=(0, 0, 1, 1)) as ranks:
        output = ranks.end(60)
    assert ranks.status == 0, output
    chosen = [line.split("chooses")[1] for line in output.splitlines() if "chooses" in line]
    assert chosen == [chosen[0]] * 4, output
    assert output.count("trained") == 4


@pytest.mark.slow
def test_auto_starts_within_its_budget_on_a_slow_line() -> None:
    """It took 127 s; half of what is left over is for a machine whose cores are shared by eight ranks."""
    on = (0, 0, 1, 1, 2, 2, 3, 3)
    with Network(4, mbit_per_s=200) as network, network.start("tests.host_ranks", "choose", on=on) as ranks:
        output = ranks.end(120)
    assert ranks.status == 0, output
    starts = [float(line.split("started in ")[1].split()[0]) for line in output.splitlines() if "started in" in line]
    assert len(starts) == 8, output
    assert max(starts) < 10, output


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_predictions_are_near_the_clock_on_hosts() -> None:
    world = host_predictions.WORLDS["small"]
    tables, clock = host_predictions.on_hosts(world, "small")
    model = host_predictions.predicted(world, tables)
    assert host_predictions.error(model, clock) < 0.5, host_predictions.shown(model, clock)
