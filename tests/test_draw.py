"""Drawn schedules: that every message is there, that the page tells what the prover knows, and where curves cross."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from backends.ring import ring_all_gather, ring_all_reduce
from backends.schedules.binomial import binomial_broadcast
from backends.schedules.bruck import bruck_all_to_all
from backends.schedules.dissemination import dissemination_barrier
from backends.schedules.doubling import halving_doubling_all_reduce, recursive_doubling_all_reduce
from experiments.draw import check, costs, curves, describe, picture
from experiments.drawing.algorithms import schedule_of
from experiments.drawing.curves import Curves, over_ranks, over_sizes
from experiments.drawing.diagrams import (
    chunk_colours,
    draw_curves,
    draw_timeline,
    spell_bytes,
    spell_chunks,
    spell_ranks,
)
from experiments.drawing.page import Frame, frames, write_page
from experiments.running.build import build
from experiments.running.tables import multiplied
from minidist import config
from minidist.analysis.network import Flat, Torus
from minidist.analysis.simulate import Message, Timeline, simulate
from minidist.collective import COLLECTIVES, Run
from minidist.errors import ConfigError
from minidist.schedule import Schedule
from tests.test_commands import ROOT
from tests.zoo import ALGORITHMS, collectives, make

ALPHA, BETA, GAMMA = 1e-5, 1e-9, 1e-10
Job = Callable[[DictConfig, Path], None]
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture
def hydra() -> Iterator[None]:
    config.register()
    config.register_resolvers(run_id=lambda: "a_run", rank=lambda: 0)
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        yield
    HydraConfig.instance().cfg = None


def recorded(schedule: Schedule, world_size: int, collective: str = "all_reduce", root: int = 0) -> Timeline:
    return simulate(schedule, Run(collective, world_size, root), 4096, Flat(ALPHA, BETA, GAMMA), record=True)


def shown(schedule: Schedule, world_size: int, collective: str = "all_reduce", root: int = 0) -> list[Frame]:
    run = Run(collective, world_size, root)
    return frames(schedule, run, recorded(schedule, world_size, collective, root).messages)


def holdings(frames_: list[Frame], number: int) -> dict[tuple[int, int], list[tuple[int, int]]]:
    """What each (rank, chunk) holds after a frame."""
    return {(change.rank, change.chunk): change.holds for frame in frames_[: number + 1] for change in frame.changes}


def complete(frames_: list[Frame]) -> set[tuple[int, int]]:
    last = {(change.rank, change.chunk): change.complete for frame in frames_ for change in frame.changes}
    return {place for place, is_complete in last.items() if is_complete}


def data_of(page: Path) -> Any:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page.read_text(encoding="utf-8"))
    assert found is not None
    return json.loads(found[1])


@pytest.mark.parametrize(
    ("schedule", "collective", "arrows"),
    [
        (ring_all_reduce, "all_reduce", 2 * 3 * 4),
        (halving_doubling_all_reduce, "all_reduce", 2 * 2 * 4),
        (binomial_broadcast, "broadcast", 3),
    ],
)
def test_every_message_is_an_arrow(tmp_path: Path, schedule: Schedule, collective: str, arrows: int) -> None:
    timeline = recorded(schedule, 4, collective)
    draw_timeline(tmp_path / "schedule", "a title", 4, timeline.messages, timeline.ends)
    tree = ElementTree.parse(tmp_path / "schedule.svg")
    assert len([group for group in tree.iter(f"{SVG}g") if group.get("id") == "message"]) == arrows
    assert (tmp_path / "schedule.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("messages", [[], [Message(0, 1, 0, 0, range(3), range(3), True, 8.0, 0.0, 0.0)]])
def test_nothing_and_no_time_can_be_drawn(tmp_path: Path, messages: list[Message]) -> None:
    draw_timeline(tmp_path / "schedule", "a title", 2, messages)
    ElementTree.parse(tmp_path / "schedule.svg")


def test_there_are_no_fractions_of_ranks() -> None:
    assert [spell_ranks(count) for count in (2, 11.3, 7.9999999999, 2048.7)] == [
        "2 ranks",
        "11 ranks",
        "8 ranks",
        "2048 ranks",
    ]


def test_chunks_are_spelled_shortly() -> None:
    def spelled(sent: Any, received: Any) -> str:
        return spell_chunks(Message(0, 1, 0, 0, sent, received, False, 1.0, 0.0, 1.0))

    assert spelled((3,), (3,)) == "3"
    assert spelled(range(2, 6), [2, 3, 4, 5]) == "2-5"
    assert spelled([0, 2], [0, 2]) == "0,2"
    assert spelled((1,), (5,)) == "1→5"
    assert spelled([0, 2, 4, 6, 8], [0, 2, 4, 6, 8]) == "5 chunks"
    assert [spell_bytes(size) for size in (0, 512, 1024, 1536, 2**20, 1023 * 2**20)] == [
        *("0 B", "512 B", "1 KiB", "1.5 KiB", "1 MiB", "1023 MiB")
    ]


@pytest.mark.parametrize("count", [1, 10, 20, 64])
def test_every_chunk_has_its_own_colour(count: int) -> None:
    colours = chunk_colours(count)
    assert len(set(colours)) == count
    assert all(re.fullmatch("#[0-9a-f]{6}", colour) for colour in colours)


def test_a_ring_is_shown_in_the_steps_of_its_ranks() -> None:
    ring = shown(ring_all_reduce, 4)
    assert len(ring) == 1 + 6
    assert not ring[0].messages
    for number, frame in enumerate(ring[1:]):
        assert len(frame.messages) == 4
        assert {(message.src_step, message.dst_step) for message in frame.messages} == {(number, number)}


def test_a_ring_all_reduce_starts_alone_and_ends_complete() -> None:
    ring = shown(ring_all_reduce, 4)
    everywhere = {(rank, chunk) for rank in range(4) for chunk in range(4)}
    assert holdings(ring, 0) == {(rank, chunk): [(rank, chunk)] for rank, chunk in everywhere}
    assert holdings(ring, 2)[1, 3] == [(0, 3), (1, 3)], "rank 0 sends chunk 3 first"
    assert holdings(ring, 2)[2, 3] == [(0, 3), (1, 3), (2, 3)]
    assert holdings(ring, 6) == {(rank, chunk): [(other, chunk) for other in range(4)] for rank, chunk in everywhere}
    assert complete(ring) == everywhere
    assert complete(ring[:4]) == {(rank, rank) for rank in range(4)}, "the reduce-scatter half"


def test_a_tree_is_shown_in_the_order_in_which_the_tensor_travels() -> None:
    tree = shown(binomial_broadcast, 6, "broadcast", root=2)
    travels = [{(message.src, message.dst) for message in frame.messages} for frame in tree]
    assert travels == [set(), {(2, 3)}, {(2, 4), (3, 5)}, {(2, 0), (3, 1)}]
    assert complete(tree[:1]) == {(2, 0)}
    assert complete(tree) == {(rank, 0) for rank in range(6)}


def test_only_what_is_promised_is_complete() -> None:
    assert complete(shown(ring_all_gather, 3, "all_gather")) == {
        (rank, chunk) for rank in range(3) for chunk in range(3)
    }
    all_to_all = shown(bruck_all_to_all, 5, "all_to_all")
    assert complete(all_to_all) == {(rank, chunk) for rank in range(5) for chunk in range(5, 10)}
    assert holdings(all_to_all, len(all_to_all))[0, 9] == [(4, 0)]
    barrier = shown(dissemination_barrier, 5, "barrier")
    assert holdings(barrier, 2)[0, 1] == [(rank, 0) for rank in (0, 2, 3, 4)]
    assert complete(barrier) == {(rank, 1) for rank in range(5)}


def test_the_page_holds_every_step_and_loads_nothing(tmp_path: Path) -> None:
    ring, page = shown(ring_all_reduce, 4), tmp_path / "schedule.html"
    write_page(page, "a <title> & more", Run("all_reduce", 4), ring)
    text, data = page.read_text(encoding="utf-8"), data_of(page)
    assert [len(frame["messages"]) for frame in data["frames"]] == [0, 4, 4, 4, 4, 4, 4]
    assert [len(frame["changes"]) for frame in data["frames"]] == [16, 4, 4, 4, 4, 4, 4]
    assert data["frames"][1]["messages"][0].items() >= {"label": "3", "reduces": True, "src": 0, "dst": 1}.items()
    assert data["rows"] == [0, 1, 2, 3]
    assert set(re.findall(r"https?://[^\"'\s]*", text)) == {"http://www.w3.org/2000/svg"}
    assert not re.search(r"<link|<script src|@import|url\(|<img", text)
    assert "a &lt;title&gt; &amp; more" in text
    assert "{{" not in text


@pytest.mark.parametrize(
    ("name", "collective"), [(name, one) for name in ALGORITHMS if name != "auto" for one in collectives(name)]
)
def test_every_algorithm_can_be_shown(name: str, collective: str) -> None:
    schedule = make(f"{name}/serial").schedules[collective]
    assert complete(shown(schedule, 6, collective, root=1 if COLLECTIVES[collective].is_rooted else 0))


@pytest.mark.usefixtures("hydra")
def test_an_algorithm_takes_its_settings() -> None:
    schedule = schedule_of("two_level", "all_reduce", 6, ["comm.ranks_per_host=3"])
    assert {message.dst for message in recorded(schedule, 6).messages if message.src == 0} == {1, 3}


@pytest.mark.usefixtures("hydra")
@pytest.mark.parametrize(
    ("name", "collective", "overrides", "message"),
    [
        ("rong", "all_reduce", [], "algorithm must be one of auto, binomial, .*, got rong"),
        ("gloo", "all_reduce", [], "algorithm=gloo is a transport and has no schedules of its own; choose ring"),
        (
            "ring",
            "broadcast",
            [],
            "algorithm=ring has no schedule for broadcast; it has all_reduce, reduce_scatter, all",
        ),
        ("two_level", "all_reduce", ["comm.ranks_per_host=4"], "ranks_per_host must divide the 6 ranks, got 4"),
    ],
)
def test_what_has_no_schedule_is_refused(name: str, collective: str, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        schedule_of(name, collective, 6, overrides)


def test_sizes_cross_where_the_formulas_do() -> None:
    algorithms = {"doubling": lambda n: recursive_doubling_all_reduce, "halving": lambda n: halving_doubling_all_reduce}
    by_size = over_sizes(algorithms, 16, list(multiplied(256, 2**20, 2)), Flat(ALPHA, BETA), "all_reduce", 0)
    (crossover,) = by_size.crossovers()
    # 4 alpha + 4 M beta = 8 alpha + 2 (15/16) M beta
    exact = 4 * ALPHA / ((4 - 2 * 15 / 16) * BETA)
    assert crossover.x == pytest.approx(exact, rel=0.03)
    assert crossover.seconds == pytest.approx(4 * ALPHA + 4 * exact * BETA, rel=0.03)
    assert (crossover.before, crossover.after) == ("doubling", "halving")
    assert describe(by_size, spell_bytes)[0].startswith(
        f"doubling is the fastest up to {spell_bytes(crossover.x)}, halving"
    )


def test_ranks_cross_where_the_formulas_do() -> None:
    nbytes, counts = 2**18, [2, 4, 8, 16, 32, 64]
    algorithms = {"ring": lambda n: ring_all_reduce, "doubling": lambda n: recursive_doubling_all_reduce}
    by_ranks = over_ranks(algorithms, counts, nbytes, Flat(ALPHA, BETA), "all_reduce", 0)
    ring = {n: 2 * (n - 1) * ALPHA + 2 * (n - 1) / n * nbytes * BETA for n in counts}
    doubling = {n: math.log2(n) * (ALPHA + nbytes * BETA) for n in counts}
    into, out = by_ranks.crossovers()
    assert (into.before, into.after, out.after) == ("doubling", "ring", "doubling")
    assert [n for n in counts if ring[n] < doubling[n]] == [n for n in counts if into.x < n < out.x] == [4, 8, 16, 32]


def test_lines_that_meet_on_a_sample_cross_there_and_equal_lines_never() -> None:
    meeting = Curves([1, 10, 100], {"a": [1.0, 10.0, 100.0], "b": [5.0, 10.0, 20.0]})
    (crossover,) = meeting.crossovers()
    assert (crossover.x, crossover.seconds) == (pytest.approx(10), pytest.approx(10))
    equal = Curves([1, 2, 4], {"a": [1.0, 2.0, 4.0], "b": [1.0, 2.0 * (1 - 1e-15), 4.0]})
    assert equal.crossovers() == []
    assert describe(equal, spell_bytes) == ["a is the fastest everywhere"]


def test_what_is_equal_at_the_start_is_the_one_that_stays_ahead() -> None:
    both = Curves([2, 4, 8], {"a": [1.0, 2.0, 4.0], "b": [1.0, 1.5, 2.0]})
    assert (both.crossovers(), both.fastest()) == ([], "b")


def test_curves_are_drawn(tmp_path: Path) -> None:
    waves = Curves([2, 4, 8, 16], {"a": [1.0, 2.0, 4.0, 8.0], "b": [3.0, 3.0, 3.0, 9.0]})
    assert len(waves.crossovers()) == 2
    draw_curves(tmp_path / "curves", "a title", ("left", "right"), waves, waves)
    ElementTree.parse(tmp_path / "curves.svg")
    assert (tmp_path / "curves.png").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"collective": "all_recuce"}, "collective must be one of all_reduce, .*, got all_recuce"),
        ({"world_size": 0}, "world_size must be a whole number of at least 1, got 0"),
        ({"world_size": "four"}, "world_size must be a whole number of at least 1, got four"),
        ({"world_size": 65}, r"world_size must be at most 64 for a picture .*, got 65; set curves=\[...\]"),
        ({"nbytes": -1}, "nbytes must be a whole number of at least 0, got -1"),
        ({"root": 4}, "root must be a rank from 0 to 3, got 4"),
        ({"curves": ["ring"]}, r"curves must be two or more different algorithms, got \[ring\]"),
        ({"curves": "ring"}, "curves must be a list of algorithms, got ring"),
        ({"comm_overrides": "ring"}, "comm_overrides must be a list of overrides, got ring"),
        ({"curves": ["ring", "swing"], "max_bytes": 300}, "max_bytes must be at least twice min_bytes = 256, got 300"),
        ({"curves": ["ring", "swing"], "max_world_size": 65537}, "max_world_size must be 2 to 65536 for curves, got"),
    ],
)
def test_settings_that_mean_nothing_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check(settings(**changes))


def test_what_can_be_drawn_is_accepted() -> None:
    check(settings())
    check(settings(world_size=64))
    check(settings(world_size=128, curves=["ring", "swing"]))


def settings(**changes: object) -> DictConfig:
    cfg = OmegaConf.load(ROOT / "conf" / "draw.yaml")
    assert isinstance(cfg, DictConfig)
    return DictConfig({**{key: value for key, value in cfg.items() if key not in ("defaults", "hydra")}, **changes})


@pytest.mark.usefixtures("hydra")
@pytest.mark.parametrize(
    ("job", "overrides", "names", "said"),
    [
        (
            picture,
            ["algorithm=swing"],
            ["schedule.html", "schedule.png", "schedule.svg"],
            "swing: all_reduce on 4 ranks",
        ),
        (costs, ["curves=[ring,recursive_doubling]", "max_world_size=8"], ["curves.png", "curves.svg"], "the fastest"),
    ],
)
def test_jobs_write_what_they_say(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], job: Job, overrides: list[str], names: list[str], said: str
) -> None:
    cfg = compose("draw", overrides=overrides, return_hydra_config=True)
    HydraConfig.instance().set_config(cfg)
    job(cfg, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    output = capsys.readouterr().out
    assert said in output
    assert f"written: {tmp_path}" in output


@pytest.mark.usefixtures("hydra")
def test_ranks_that_a_network_does_not_have_are_refused() -> None:
    cfg = compose("draw", overrides=["curves=[ring,swing]"], return_hydra_config=True)
    HydraConfig.instance().set_config(cfg)
    with pytest.raises(
        ConfigError, match=r"network=flat: a torus of 2 x 4 has no rank .*; change world_size, max_world"
    ):
        curves(cfg, Torus(2, 4, ALPHA, BETA))


@pytest.mark.usefixtures("hydra")
@pytest.mark.parametrize("name", [path.stem for path in (ROOT / "conf" / "network").glob("*.yaml")])
def test_every_network_carries_messages(name: str) -> None:
    network = build(compose("draw", overrides=[f"network={name}"]).network, "network")
    assert simulate(ring_all_reduce, Run("all_reduce", 4), 4096, network).seconds > 0
