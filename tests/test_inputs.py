"""The inputs of the conformance suite: few by default, and no two of their values that never come together."""

from __future__ import annotations

import itertools

import pytest

from minidist.communicator import ReduceOp
from minidist.contract import checks
from tests import inputs

FULL = [dtype for dtype in checks.DTYPES if dtype.is_floating_point]


@pytest.fixture(autouse=True)
def _by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(inputs.EVERYTHING, raising=False)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 5, 8])
def test_every_two_inputs_of_a_reduction_come_together(world_size: int) -> None:
    numels = inputs.sizes(world_size)
    cases = list(inputs.reductions(numels))
    assert {(dtype, numel) for dtype, _, numel in cases} == set(itertools.product(checks.DTYPES, numels))
    assert {(op, numel) for _, op, numel in cases} == set(itertools.product(ReduceOp, numels))
    for wanted in FULL:
        assert {op for dtype, op, _ in cases if dtype == wanted} == set(ReduceOp) - set(inputs.BITWISE)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 5, 8])
def test_every_two_inputs_of_a_move_come_together(world_size: int) -> None:
    numels, roots = inputs.sizes(world_size), range(world_size)
    cases = list(inputs.moves(numels, roots))
    for two, all_of_them in (
        ((0, 1), (checks.DTYPES, numels)),
        ((0, 2), (checks.DTYPES, roots)),
        ((1, 2), (numels, roots)),
    ):
        assert {(case[two[0]], case[two[1]]) for case in cases} == set(itertools.product(*all_of_them))


def test_the_slow_set_has_the_product(monkeypatch: pytest.MonkeyPatch) -> None:
    default = list(inputs.moves((1, 2, 3), (0, 1)))
    monkeypatch.setenv(inputs.EVERYTHING, "1")
    everything = set(inputs.moves((1, 2, 3), (0, 1)))
    assert everything == set(itertools.product(checks.DTYPES, (1, 2, 3), (0, 1))) > set(default)
