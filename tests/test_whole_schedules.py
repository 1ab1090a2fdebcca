"""Schedules over shared memory, as one compiled call: the same as their messages, and as hard to break."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from backends.shm.script import Take, Wait, scripts
from minidist.collective import Run
from minidist.schedule import Recv, Reduce, Send, Step, num_chunks
from tests.test_shm import run_ranks
from tests.zoo import THEORY, Theory, two_level_theory


@pytest.mark.parametrize(
    "world_size", [2, pytest.param(3, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)]
)
def test_a_whole_schedule_has_the_bits_of_its_messages(world_size: int, tmp_path: Path) -> None:
    output = run_ranks("same_schedules", "compiled", tmp_path, world_size)
    assert output.count("the same") == world_size, output


def test_ranks_that_disagree_on_schedules_are_all_told(tmp_path: Path) -> None:
    output = run_ranks("disagree_on_schedules", "compiled", tmp_path, world_size=3)
    assert output.count("as expected") == 3 * 3, output


def test_a_rank_that_is_killed_in_a_schedule_is_named(tmp_path: Path) -> None:
    output = run_ranks("one_dies_in_a_schedule", "compiled", tmp_path, world_size=3, status=1)
    assert output.count("named rank 1") == 2, output


def test_ctrl_c_ends_a_schedule(tmp_path: Path) -> None:
    assert "interrupted" in run_ranks("interrupted_in_a_schedule", "compiled", tmp_path)


def test_a_schedule_ends_with_its_time(tmp_path: Path) -> None:
    output = run_ranks("no_answer_to_a_schedule", "compiled", tmp_path)
    assert "[rank 0/2] all_reduce: no answer from rank 1 within the timeout of 0.5 s" in output, output


# Scripts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("theory", [*THEORY, two_level_theory(1)], ids=lambda theory: theory.name)
def test_no_algorithm_has_to_run_over_messages(theory: Theory, n: int) -> None:
    run = Run(theory.collective, n, n - 1 if Run(theory.collective, n).collective.is_rooted else 0)
    assert scripts(theory.schedule, run) is not None


@num_chunks(2)
def waits_for_what_is_on_its_way(rank: int, world_size: int) -> Iterator[Step]:
    """Rank 0 goes on with a message on its way, which rank 1 takes last."""
    if rank == 0:
        yield (Send(1, 0),)
        yield (Recv(1, 0),)
        yield (Send(1, 1),)
    else:
        yield (Send(0, 1),)
        yield (Recv(0, 1),)
        yield (Recv(0, 0),)


def nobody_receives(rank: int, world_size: int) -> Iterator[Step]:
    yield (Send(1 - rank, 0),) if rank == 0 else ()


@pytest.mark.parametrize("schedule", [waits_for_what_is_on_its_way, nobody_receives])
def test_what_could_stand_still_runs_over_messages(schedule) -> None:
    assert scripts(schedule, Run("all_reduce", 2)) is None


@num_chunks(1)
def star(rank: int, world_size: int) -> Iterator[Step]:
    if rank == 2:
        yield tuple(Reduce(peer, 0) for peer in (3, 1, 0))
    else:
        yield (Send(2, 0),)


def test_values_are_combined_in_the_order_of_their_ranks() -> None:
    found = scripts(star, Run("all_reduce", 4))
    assert found is not None
    takes = [action for action in found[0][2] if isinstance(action, Take)]
    ranks = [None if take.sent is None else take.sent.place.rank for take in takes]
    assert list(zip(ranks, (take.in_sums for take in takes), strict=True)) == [
        (0, True),
        (1, True),
        (None, False),
        (3, False),
    ]


def test_nobody_leaves_before_what_it_sent_is_taken() -> None:
    found = scripts(star, Run("all_reduce", 4))
    assert found is not None
    for rank in (0, 1, 3):
        last = found[0][rank][-1]
        assert isinstance(last, Wait)
        assert (last.peer, last.goal) == (2, found[1])
