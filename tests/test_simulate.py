"""The clock shows what the closed formulas show where these exist; networks are refused where they mean nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from backends.ring import ring_all_gather, ring_all_reduce, ring_reduce_scatter
from backends.schedules import binomial, bruck, dissemination, doubling, pairwise, swing
from backends.two_level import two_level_all_reduce
from minidist.analysis.network import FatTree, Flat, Hosts, Measured, Network, Slow, Torus
from minidist.analysis.simulate import MAX_WORLD_SIZE, simulate
from minidist.collective import Run
from minidist.errors import ScheduleError
from minidist.schedule import Recv, Schedule, Send, Step, alike
from tests.zoo import THEORY, Theory

CONF = Path(__file__).parent.parent / "conf"
A, B, G = 2.0**-16, 2.0**-30, 2.0**-32  # powers of two, and sizes too: sums of them are exact
M = 2**26
FLAT = Flat(A, B, G)

FORMULAS: dict[str, tuple[Schedule, str, Callable[[int], float]]] = {
    "ring": (
        ring_all_reduce,
        "all_reduce",
        lambda n: 2 * (n - 1) * (A + M / n * B) + (n - 1) * M / n * G,
    ),
    "ring reduce-scatter": (ring_reduce_scatter, "reduce_scatter", lambda n: (n - 1) * (A + M / n * (B + G))),
    "ring all-gather": (ring_all_gather, "all_gather", lambda n: (n - 1) * (A + M / n * B)),
    "pairwise": (pairwise.pairwise_all_to_all, "all_to_all", lambda n: (n - 1) * (A + M / n * B)),
    "bruck all-gather": (
        bruck.bruck_all_gather,
        "all_gather",
        lambda n: math.ceil(math.log2(n)) * A + (n - 1) / n * M * B,
    ),
    "binomial": (
        binomial.binomial_all_reduce,
        "all_reduce",
        lambda n: math.ceil(math.log2(n)) * (2 * (A + M * B) + M * G),
    ),
}
POWERS: dict[str, tuple[Schedule, Callable[[int], float]]] = {
    "recursive doubling": (doubling.recursive_doubling_all_reduce, lambda n: math.log2(n) * (A + M * (B + G))),
    **{
        schedule.__name__: (
            schedule,
            lambda n: 2 * math.log2(n) * A + 2 * (n - 1) / n * M * B + (n - 1) / n * M * G,
        )
        for schedule in (doubling.halving_doubling_all_reduce, swing.swing_all_reduce)
    },
}


@pytest.mark.parametrize("n", [1, 2, 4, 8, 16, 32])
@pytest.mark.parametrize("name", [*FORMULAS, *POWERS])
def test_flat_networks_take_exactly_what_the_formulas_say(name: str, n: int) -> None:
    schedule, collective, formula = (
        FORMULAS[name] if name in FORMULAS else (POWERS[name][0], "all_reduce", POWERS[name][1])
    )
    assert simulate(schedule, Run(collective, n), M, FLAT).seconds == formula(n)


@pytest.mark.parametrize("n", [3, 5, 6, 7, 12, 33])
@pytest.mark.parametrize("name", [name for name in FORMULAS if name != "binomial"])
def test_formulas_hold_for_other_numbers_of_ranks(name: str, n: int) -> None:
    schedule, collective, formula = FORMULAS[name]
    assert simulate(schedule, Run(collective, n), M, FLAT).seconds == pytest.approx(formula(n), rel=1e-12)


@pytest.mark.parametrize("n", [2, 3, 4, 7, 8])
@pytest.mark.parametrize("theory", THEORY, ids=lambda theory: theory.name)
@pytest.mark.parametrize(
    "network", [FLAT, Slow(FLAT, 3, 1), Slow(FLAT, 5, 0, 1)], ids=["flat", "slow rank", "slow link"]
)
def test_all_ranks_at_once_take_the_same_time_as_one_by_one(network: Network, theory: Theory, n: int) -> None:
    fast = simulate(theory.schedule, Run(theory.collective, n), M, network)
    slow = simulate(theory.schedule, Run(theory.collective, n), M, network, record=True)
    assert fast.ends == pytest.approx(slow.ends, rel=1e-12)
    assert fast.num_messages == slow.num_messages == len(slow.messages) == theory.messages(n)


@pytest.mark.parametrize("record", [False, True])
def test_ranks_start_at_times_of_their_own(record: bool) -> None:
    """On two ranks an all-gather is an exchange: it begins with the later one, whichever that is."""
    run = Run("all_gather", 2)
    for starts in ([0.0, 5.0], [5.0, 0.0]):
        assert simulate(ring_all_gather, run, M, FLAT, record, starts).ends == [5 + A + M / 2 * B] * 2
    late = simulate(ring_all_reduce, Run("all_reduce", 4), M, FLAT, record, [3.0] * 4).ends
    assert late == pytest.approx([3 + simulate(ring_all_reduce, Run("all_reduce", 4), M, FLAT).seconds] * 4)
    with pytest.raises(ValueError, match="starts must have a time for each of the 2 ranks, got 1"):
        simulate(ring_all_gather, run, M, FLAT, record, [0.0])


def test_messages_are_recorded_with_their_times() -> None:
    first, *_, last = simulate(ring_all_reduce, Run("all_reduce", 3), 3 * 2**20, FLAT, record=True).messages
    assert (first.src, first.dst, first.begins, first.ends) == (0, 1, 0.0, A + 2**20 * B)
    assert (first.sent, first.received, first.reduces, first.nbytes) == ((2,), (2,), True, 2**20)
    assert (last.src_step, last.dst_step, last.reduces) == (3, 3, False)
    assert last.ends == pytest.approx(4 * (A + 2**20 * B) + 2 * 2**20 * G)


# Networks ----------------------------------------------------------------------------------------


def shift(rank: int, world_size: int, by: int = 1) -> Iterator[Step]:
    """Everybody sends chunk 0 to the rank ``by`` further on."""
    yield Send((rank + by) % world_size, rank), Recv((rank - by) % world_size, (rank - by) % world_size)


def seconds(network: Network, world_size: int, by: int = 1, nbytes: float = M) -> float:
    return simulate(
        partial(shift, by=by), Run("all_gather", world_size), nbytes * world_size, network, record=True
    ).seconds


def test_half_duplex_sends_and_receives_one_after_the_other() -> None:
    assert seconds(Flat(A, B), 2) == A + M * B
    assert seconds(Flat(A, B, duplex="half"), 2) == A + 2 * M * B


def test_ranks_of_a_host_share_its_card() -> None:
    network = Hosts(4, Flat(A / 2, B / 8), Flat(A, B))
    assert simulate(partial(shift, by=1), Run("all_gather", 4), 4 * M, network).seconds == A / 2 + M * B / 8
    assert seconds(network, 8, by=4) == A + 4 * M * B  # four messages through one card
    assert seconds(network, 8, by=1) == A + M * B  # one of each host goes out


def test_every_host_has_links_of_its_own_inside() -> None:
    tables = ([1e3, 1e6], [1e-5, 1e-3], [2e-5, 2e-3], [0, 0], [0, 0])
    one = Hosts(2, Measured(2, 1e-3, *tables), FLAT)
    assert seconds(one, 2) == seconds(Measured(2, 1e-3, *tables), 2)
    pairs = simulate(doubling.recursive_doubling_all_reduce, Run("all_reduce", 2), M, one).seconds
    assert simulate(_in_pairs, Run("all_gather", 8), 8 * M, one, record=True).seconds == pytest.approx(pairs)
    assert seconds(Hosts(2, Torus(1, 2, A, B), FLAT), 4) > 0
    assert Slow(one, 2, 0).start == one.start == 1e-3


def _in_pairs(rank: int, world_size: int) -> Iterator[Step]:
    yield Send(rank ^ 1, rank), Recv(rank ^ 1, rank ^ 1)


def test_two_levels_beat_a_ring_where_cards_are_shared_by_fewer_messages() -> None:
    network = Hosts(4, Flat(1e-6, 1e-12), Flat(1e-5, 1e-9))
    ring = simulate(ring_all_reduce, Run("all_reduce", 16), 2**16, network).seconds
    assert (
        simulate(partial(two_level_all_reduce, ranks_per_host=4), Run("all_reduce", 16), 2**16, network).seconds
        < 0.5 * ring
    )


@pytest.mark.parametrize("oversubscription", [1, 2, 4])
def test_an_oversubscribed_core_is_slower_by_that_factor(oversubscription: int) -> None:
    network = FatTree(4, oversubscription, A, B, hop=A)
    assert seconds(network, 8, by=4) == 2 * A + oversubscription * M * B
    assert seconds(FatTree(8, oversubscription, A, B, hop=A), 8, by=4) == A + M * B


def test_messages_on_a_ring_of_links_share_those_between_their_ends() -> None:
    network = Torus(1, 8, A, B, hop=A / 4)
    assert seconds(network, 8, by=1) == A + M * B
    assert seconds(network, 8, by=3) == A + 2 * A / 4 + 3 * M * B  # each link carries three
    assert seconds(network, 8, by=7) == A + M * B  # the other way around


def test_a_torus_has_links_in_both_directions() -> None:
    network = Torus(4, 4, A, B)
    assert seconds(network, 16, by=4) == A + M * B  # a row down
    assert len(network.route(0, 15, M).links) == 2  # one back, one up: around the edges
    assert len({link.name for dst in (1, 3, 4, 12) for link in network.route(0, dst, M).links}) == 4


def test_swing_crosses_fewer_links_than_halving_on_a_torus() -> None:
    network = Torus(1, 16, 0.0, B)
    halving = simulate(doubling.halving_doubling_all_reduce, Run("all_reduce", 16), M, network).seconds
    assert simulate(swing.swing_all_reduce, Run("all_reduce", 16), M, network).seconds < halving


def test_a_slow_rank_holds_up_a_ring() -> None:
    assert (
        simulate(ring_all_reduce, Run("all_reduce", 4), M, Slow(FLAT, 4, 2)).seconds
        > 3.5 * simulate(ring_all_reduce, Run("all_reduce", 4), M, FLAT).seconds
    )


def test_a_measured_host_gives_back_what_was_measured() -> None:
    sizes = [1e3, 1e6, 1e7]
    network = Measured(2, 1e-4, sizes, [1e-5, 2e-4, 2e-3], [2e-5, 3e-4, 3e-3], [0, 1e-4, 1e-3], [0, 2e-4, 2e-3])
    assert seconds(network, 2, nbytes=1e6) == pytest.approx(1e-4 + 3e-4)
    assert seconds(network, 2, nbytes=4e6) == pytest.approx(1e-4 + 3e-4 + 2.7e-3 / 3)
    assert seconds(network, 2, nbytes=2e7) == pytest.approx(1e-4 + 3e-3 + 2.7e-3 / 9 * 10)
    assert seconds(network, 4, nbytes=1e6) == pytest.approx(1e-4 + 4 * 3e-4 / 2)  # four messages through the host
    done = simulate(binomial.binomial_reduce, Run("reduce", 2), 1e6, network)
    assert done.seconds == pytest.approx(1e-4 + 2e-4 + 1e-4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Flat(-1, B), "alpha must be a number of seconds, 0 or more, got -1"),
        (lambda: Flat(A, math.nan), "beta must be a number of seconds, 0 or more, got nan"),
        (lambda: Flat(A, B, math.inf), "gamma must be .* got inf"),
        (lambda: Flat(A, None), "beta must be .* got None"),
        (lambda: Flat(A, "1e-9"), "beta must be .* got '1e-9'"),
        (lambda: Flat(A, B, duplex="both"), "duplex must be full or half, got 'both'"),
        (lambda: Hosts(0, FLAT, FLAT), "ranks_per_host must be a whole number of at least 1, got 0"),
        (lambda: FatTree(4, 0.5, A, B), "oversubscription must be at least 1, got 0.5"),
        (lambda: Torus(2, 2.5, A, B), "columns must be a whole number of at least 1, got 2.5"),
        (lambda: Torus(1, 4, A, B).route(0, 4, M), "a torus of 1 x 4 has no rank 4"),
        (lambda: Slow(FLAT, 0.5, 1), "factor must be at least 1, got 0.5"),
        (
            lambda: Measured(2, 0, [1, 2], [1, 2], [1], [1, 2], [1, 2]),
            "exchange must have a value for each of the 2 sizes",
        ),
        (lambda: Measured(2, 0, [2, 1], [1, 2], [1, 2], [1, 2], [1, 2]), "nbytes must be two sizes or more, rising"),
        (lambda: Measured(2, 0, [1, 2], [1, -2], [1, 2], [1, 2], [1, 2]), r"one_way\[1\] must be .* got -2"),
    ],
)
def test_networks_that_mean_nothing_are_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("name", sorted(path.stem for path in (CONF / "network").glob("*.yaml")))
def test_presets_are_networks(name: str) -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        network = instantiate(compose(f"network/{name}").network)
    assert 0 < simulate(ring_all_reduce, Run("all_reduce", 16), 2**20, network).seconds < 1
    assert (CONF / "network" / f"{name}.yaml").read_text().startswith("# ")


# What cannot be run ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("world_size", "nbytes", "message"),
    [
        (0, 1, f"world_size must be 1 to {MAX_WORLD_SIZE}, got 0"),
        (1_000_000, 1, f"world_size must be 1 to {MAX_WORLD_SIZE}, got 1000000"),
        (2, -1, "nbytes must be 0 or more, got -1"),
    ],
)
def test_wrong_questions_are_refused(world_size: int, nbytes: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        simulate(ring_all_reduce, Run("all_reduce", world_size), nbytes, FLAT)


def _out_of_range(rank: int, world_size: int) -> Iterator[Step]:
    yield Send((rank + 1) % world_size, rank + 100), Recv((rank - 1) % world_size, rank + 200)


def test_chunks_are_checked_for_all_ranks_at_once() -> None:
    with pytest.raises(ScheduleError, match="rank 0, step 0: it sends chunk 100 to rank 1, but the chunks are 0 to 3"):
        simulate(_out_of_range, Run("all_reduce", 4), M, FLAT)


def test_a_deadlock_is_named() -> None:
    def waits(rank: int, world_size: int) -> Iterator[Step]:
        yield (Recv((rank + 1) % world_size, 0),)

    with pytest.raises(ScheduleError, match="deadlock: rank 0 in step 0"):
        simulate(waits, Run("all_reduce", 3), M, FLAT)


def test_a_schedule_that_never_ends_is_refused() -> None:
    def endless(rank: int, world_size: int) -> Iterator[Step]:
        while True:
            yield Send((rank + 1) % world_size, rank), Recv((rank - 1) % world_size, (rank - 1) % world_size)

    with pytest.raises(ScheduleError, match="more than 100000 steps; does it end"):
        simulate(endless, Run("all_reduce", 2), M, FLAT)


def test_barriers_are_simulated() -> None:
    assert simulate(dissemination.dissemination_barrier, Run("barrier", 8), 0, Flat(A, B)).seconds == 3 * (A + B)


@alike
def _compares(rank: int, world_size: int) -> Iterator[Step]:
    if rank > 0:  # which an array of ranks cannot answer
        yield Send((rank + 1) % world_size, 0), Recv((rank - 1) % world_size, 0)


@alike
def _sends_twice(rank: int, world_size: int) -> Iterator[Step]:
    yield Send((rank + 1) % world_size, 0), Send((rank - 1) % world_size, 0)


@alike
def _sends_elsewhere(rank: int, world_size: int) -> Iterator[Step]:
    yield Send((rank + 1) % world_size, rank), Recv((rank + 1) % world_size, rank)


@alike
def _sends_what_is_not_there(rank: int, world_size: int) -> Iterator[Step]:
    yield Send((rank + 1) % world_size, rank + 1), Recv((rank - 1) % world_size, rank)


@alike
def _sends_others(rank: int, world_size: int) -> Iterator[Step]:
    yield Send((rank + 1) % world_size, rank), Recv((rank - 1) % world_size, rank)


@alike
def _sends_half_of_itself(rank: int, world_size: int) -> Iterator[Step]:
    yield Send((rank + 1) % world_size, rank / 2), Recv((rank - 1) % world_size, rank / 2)  # type: ignore[arg-type]


@alike
def _forgets_to_go_around(rank: int, world_size: int) -> Iterator[Step]:
    yield Send(rank + 1, rank), Recv(rank - 1, rank)


@alike
def _sends_to_one(rank: int, world_size: int) -> Iterator[Step]:
    yield Send(1, rank), Recv(0, rank)


@alike
def _not_a_step(rank: int, world_size: int) -> Iterator[Step]:
    yield Send((rank + 1) % world_size, rank)  # type: ignore[misc]


@alike
def _sends_nothing(rank: int, world_size: int) -> Iterator[Step]:
    yield Send((rank + 1) % world_size, []), Recv((rank - 1) % world_size, [])


@alike
def _half_a_step(rank: int, world_size: int) -> Iterator[Step]:
    yield Send((rank + 1) % world_size, rank), None  # type: ignore[misc]


@pytest.mark.parametrize(
    ("schedule", "kind", "message"),
    [
        (_sends_half_of_itself, ScheduleError, "step 0: the chunks are 0 to 3, got 0.0 on rank 0"),
        (_forgets_to_go_around, ScheduleError, "step 0: the ranks are 0 to 3, got 4 on rank 3"),
        (_sends_to_one, ScheduleError, "step 0: a rank sends to one that does not receive from it"),
        (_not_a_step, ScheduleError, "step 0: where all ranks step alike, each sends one message and receives one"),
        (_sends_nothing, ScheduleError, "step 0: ranks send other chunks than the ones that are expected, or none"),
        (_half_a_step, ScheduleError, "step 0: where all ranks step alike, each sends one message and receives one"),
        (_compares, ValueError, "truth value of an array"),
        (_sends_twice, ScheduleError, "step 0: where all ranks step alike, each sends one message and receives one"),
        (_sends_elsewhere, ScheduleError, "step 0: a rank sends to one that does not receive from it"),
        (_sends_what_is_not_there, ScheduleError, "step 0: the chunks are 0 to 3"),
        (_sends_others, ScheduleError, "step 0: ranks send other chunks than the ones that are expected"),
    ],
)
def test_a_schedule_that_is_not_what_it_says_is_no_slow_one(
    schedule: Schedule, kind: type[Exception], message: str
) -> None:
    """Its mistake is seen; it once made the simulator go through the ranks one by one, without a word."""
    with pytest.raises(kind, match=message):
        simulate(schedule, Run("all_reduce", 4), M, FLAT)


def test_a_ring_of_a_thousand_ranks_is_one_array() -> None:
    assert simulate(ring_all_reduce, Run("all_reduce", 1024), M, FLAT).num_messages == 1024 * 2 * 1023
