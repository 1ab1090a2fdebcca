"""What a program of torch.distributed is told on minidist when a rank is gone, late or stopped, and how soon."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.c10d_worlds import run_program

TIMEOUT = "CommTimeoutError CommError RuntimeError TimeoutError"
"""The last two are what programs catch that know nothing of minidist."""
SOON_S = 30.0
"""Half of the timeout of the process group, which is not what ends a wait here."""


@pytest.fixture(params=["shm", "ring/gloo"])
def spec(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def is_soon(*seconds: str) -> bool:
    return all(float(one) < SOON_S for one in seconds)


def test_a_killed_peer_is_named_by_stock_backward(spec: str, tmp_path: Path) -> None:
    (kinds, message, *seconds), nothing = run_program("faults.killed", spec, 2, tmp_path)
    assert "RuntimeError" in kinds
    assert "PeerLostError: [rank 0/2] all_reduce: rank 1 is gone: its process ended" in message
    assert is_soon(*seconds)
    assert nothing is None


def test_a_timeout_is_told_by_stock_backward(spec: str, tmp_path: Path) -> None:
    (kinds, message, *seconds), _ = run_program("faults.late", spec, 2, tmp_path)
    assert "RuntimeError" in kinds
    assert "CommTimeoutError: [rank 0/2] all_reduce: no answer" in message
    assert is_soon(*seconds)


def test_an_operation_that_is_given_up_goes_on(spec: str, tmp_path: Path) -> None:
    (kinds, message, seconds, late_sum), (sum_of_1,) = run_program("faults.late_for_one_operation", spec, 2, tmp_path)
    assert kinds.startswith(TIMEOUT)
    assert message == "wait: not finished within 2 s; the operation goes on"
    assert is_soon(seconds)
    assert late_sum == sum_of_1 == [2.0] * 3


def test_a_group_has_a_timeout_of_its_own(spec: str, tmp_path: Path) -> None:
    (*failures, sum_of_0), (sum_of_1,) = run_program("faults.late_for_one_group", spec, 2, tmp_path)
    for (kinds, message, seconds), timeout_s in zip(failures, (3, 2), strict=True):
        assert kinds.startswith(TIMEOUT)
        assert message.startswith("[rank 0/2] all_reduce: no answer")
        assert f"within the timeout of {timeout_s} s" in message
        assert is_soon(seconds)
    assert sum_of_0 == sum_of_1 == [2.0] * 3


def test_a_monitored_barrier_names_who_is_missing(spec: str, tmp_path: Path) -> None:
    ranks = run_program("faults.missing", spec, 4, tmp_path)
    assert [failures.pop() for failures in ranks] == [[4.0] * 3] * 4
    for first, everyone in ranks[:2]:
        assert first[0].startswith(TIMEOUT)
        assert first[1].endswith("Rank 2 failed to pass monitoredBarrier in 2000 ms")
        assert everyone[1].endswith("Ranks 2, 3 failed to pass monitoredBarrier in 2000 ms")
        assert is_soon(first[2], everyone[2])
    assert ranks[2:] == [[], []]


def test_an_abort_is_told_to_all_who_wait(spec: str, tmp_path: Path) -> None:
    (under_way, later), of_the_other = run_program("faults.aborted", spec, 2, tmp_path)
    assert under_way[:2] == [
        "CommClosedError CommError RuntimeError Exception BaseException object",
        "[rank 0/2] irecv: it was aborted: the process group was aborted",
    ]
    assert "it was aborted: the process group was aborted" in later[1]
    assert of_the_other[0].startswith("PeerLostError CommError RuntimeError")
    assert ": rank 0 is gone: the process group was aborted; rank 1 calls broadcast of " in of_the_other[1]
    assert is_soon(under_way[2], later[2], of_the_other[2])


def test_a_rank_outside_of_a_split_is_told_so(spec: str, tmp_path: Path) -> None:
    *members, message = run_program("groups.split_without_the_last", spec, 3, tmp_path)
    assert members == [[1.0], [1.0]]
    assert message.startswith("[rank 2/3] split_group: this rank is in none of the groups")
