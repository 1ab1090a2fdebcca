"""Who waits where for whom, of ranks that are written down."""

from __future__ import annotations

import json

import pytest

from minidist.contract.diagnosis import diagnose
from minidist.contract.standing import DONE, FAILED, QUEUED, WAITING, Call, Standing

SUM = "all_reduce of 256 float32 with op SUM"


def waits(rank: int, number: int = 352, what: str = SUM, seconds: float = 12.0, state: str = WAITING) -> Standing:
    done = Call(number - 1, SUM, "train.py:40", DONE, 13.0, 0.1)
    return Standing(rank, number, (done, Call(number, what, "train.py:50", state, seconds)), "backward", "train.py:50")


def away(rank: int, number: int = 351) -> Standing:
    done = Call(number, SUM, "train.py:40", DONE, 13.0, 0.1)
    return Standing(rank, number, (done,), "backward", "train.py:41", step=17)


def said(*standings: Standing, world_size: int | None = None, gone: tuple[int, ...] = ()) -> list[str]:
    return diagnose({one.rank: one for one in standings}, range(world_size or len(standings)), gone)


def test_a_rank_that_has_not_called() -> None:
    assert said(waits(0), waits(1), away(2), waits(3, seconds=11.0)) == [
        "rank 2 is in backward of step 17 (train.py:41) and has not called all_reduce #352, which ranks 0, 1 and 3 "
        "wait for at train.py:50 since 12 s"
    ]


def test_ranks_that_waited_in_vain_are_no_other_ones() -> None:
    assert said(waits(0, state=FAILED), away(1)) == said(waits(0), away(1))


def test_several_ranks_are_missing_and_one_waits_elsewhere() -> None:
    assert said(waits(0), away(1), away(2, 340), waits(3, 350, "broadcast of 2 int64 with root 0", 0.04)) == [
        "rank 1 is in backward of step 17 (train.py:41) and has not called all_reduce #352, which rank 0 waits for at "
        "train.py:50 since 12 s",
        "rank 2 is in backward of step 17 (train.py:41) and has not called all_reduce #352, which rank 0 waits for at "
        "train.py:50 since 12 s",
        "rank 3 waits in broadcast #350 at train.py:50, rank 0 in all_reduce #352 at train.py:50",
    ]


@pytest.mark.parametrize("what", ["barrier", "all_reduce of 255 float32 with op SUM", SUM.replace("32 w", "64 w")])
def test_calls_that_differ(what: str) -> None:
    assert said(waits(0), waits(1, what=what), waits(2)) == [
        f"ranks 0 and 2 call {SUM} at train.py:50; rank 1 calls {what} at train.py:50; every rank has to call the same "
        "as its collective #352"
    ]


def test_a_call_that_differs_may_be_over() -> None:
    """As that of the root of a broadcast, which waits for nobody."""
    root = Call(352, "broadcast of 2 int64 with root 0", "train.py:9", DONE, 13.0, 0.1)
    ahead = Standing(0, 353, (root, Call(353, SUM, "train.py:10", WAITING, 12.0)))
    assert said(ahead, waits(1)) == [
        f"rank 0 calls broadcast of 2 int64 with root 0 at train.py:9; rank 1 calls {SUM} at train.py:50; every rank "
        "has to call the same as its collective #352"
    ]


def test_all_are_there() -> None:
    assert said(waits(0), waits(1)) == [
        "all ranks are in all_reduce #352 at train.py:50 since 12 s, and what they send does not come"
    ]


def test_a_rank_that_does_not_answer() -> None:
    assert said(waits(0), waits(2), world_size=3) == [
        "ranks 0 and 2 are in all_reduce #352 at train.py:50 since 12 s",
        "rank 1 does not answer: it is stopped, or its host is out of reach",
    ]


def test_rank_0_does_not_answer_and_so_nobody_does() -> None:
    assert said(waits(1), world_size=3)[1:] == [
        "ranks 0 and 2 do not answer: they are stopped, or rank 0 is, over which the others answer, or their hosts are "
        "out of reach"
    ]


def test_a_rank_that_is_gone_need_not_answer() -> None:
    assert said(waits(0), world_size=2, gone=(1,)) == ["rank 0 is in all_reduce #352 at train.py:50 since 12 s"]


def test_a_rank_that_raised() -> None:
    raised = Standing(1, 351, raised="ValueError: boom at train.py:41")
    assert said(waits(0), raised) == [
        "rank 1 raised ValueError: boom at train.py:41",
        "rank 0 is in all_reduce #352 at train.py:50 since 12 s",
    ]


def test_a_rank_that_waits_for_a_message() -> None:
    call = Call(None, "irecv of 10 float32 from rank 1 with tag 7", "train.py:20", WAITING, 5.0, peer=1)
    assert said(Standing(0, 351, (call,)), away(1)) == [
        "rank 0 waits in irecv of 10 float32 from rank 1 with tag 7 at train.py:20 since 5.0 s; rank 1 is in backward "
        "of step 17 (train.py:41)"
    ]


def test_nobody_waits() -> None:
    assert said(away(0), away(1)) == []
    assert said() == []


def test_a_call_that_is_queued_is_not_waited_in() -> None:
    queued = Standing(1, 351, (Call(None, SUM, "train.py:50", QUEUED, 1.0),), "", "train.py:60")
    assert said(waits(0), queued) == [
        "rank 1 is at train.py:60 and has not called all_reduce #352, which rank 0 waits for at train.py:50 since 12 s"
    ]


def test_a_standing_is_the_same_after_its_way_in_json() -> None:
    for standing in (waits(0), away(1), Standing(2, raised="ValueError: boom")):
        assert Standing.of_json(json.loads(json.dumps(standing.as_json()))) == standing
