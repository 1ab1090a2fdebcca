"""Who waits where for whom: in sentences, from how far each rank has come. A pure function of that.

What is looked for, in this order: ranks that call different collectives as their n-th one; ranks that have not called
what others wait for; ranks that wait for a message; ranks that raised, and ranks that do not answer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from minidist.contract.standing import Call, Standing

SHOWN_S = 0.1
"""Waits that are shorter are not worth their number."""


def diagnose(standings: Mapping[int, Standing], everyone: Iterable[int], gone: Iterable[int] = ()) -> list[str]:
    """Return sentences without a full stop; none where nobody waits.

    Args:
        standings: of the ranks that are known, by rank.
        everyone: all ranks.
        gone: those that are not expected to answer.
    """
    silent = sorted(set(everyone) - set(standings) - set(gone))
    return [
        *_raised(standings),
        *(differences(standings) or _behind(standings, silent, gone)),
        *_without_message(standings),
        *_silent(silent, answered=bool(standings)),
    ]


def _raised(standings: Mapping[int, Standing]) -> list[str]:
    return [f"rank {rank} raised {standing.raised}" for rank, standing in standings.items() if standing.raised]


def differences(standings: Mapping[int, Standing]) -> list[str]:
    """Name the first collective that ranks wait in which is not the same on all of them, in one sentence or none."""
    numbers = sorted({call.number for call in _collectives(standings).values() if call.number is not None})
    for number in numbers:
        calls = {rank: call for rank, each in standings.items() if (call := each.called(number)) is not None}
        whats = list(dict.fromkeys(call.what for call in calls.values()))
        if len(whats) > 1:
            said = [_callers(what, {rank: call for rank, call in calls.items() if call.what == what}) for what in whats]
            return [f"{'; '.join(said)}; every rank has to call the same as its collective #{number}"]
    return []


def _callers(what: str, calls: Mapping[int, Call]) -> str:
    verb = "calls" if len(calls) == 1 else "call"
    return f"{ranks(calls)} {verb} {what}{_places(calls.values())}"


def _behind(standings: Mapping[int, Standing], silent: Sequence[int], gone: Iterable[int]) -> list[str]:
    """Name those who have not called what the others wait for."""
    waiting = _collectives(standings)
    if not waiting:
        return []
    number = max(call.number or 0 for call in waiting.values())
    waiting_there = {rank: call for rank, call in waiting.items() if call.number == number}
    first = next(iter(waiting_there.values()))
    long = _since(waiting_there.values())
    place = _places(waiting_there.values())
    wait = f"{ranks(waiting_there)} wait{_s(waiting_there)} for{place}{long}"
    said = [
        f"rank {rank} is {standing.place} and has not called {first.name}, which {wait}"
        for rank, standing in standings.items()
        if standing.num_started < number and rank not in waiting and not standing.raised
    ]
    said += [
        f"rank {rank} waits in {_at(call)}{_since([call])}, {ranks(waiting_there)} in {_at(first)}"
        for rank, call in waiting.items()
        if call.number != number
    ]
    if said:
        return said
    if len(waiting_there) == len(standings) and not silent and not list(gone):
        return [f"all ranks are in {first.name}{place}{long}, and what they send does not come"]
    verb = "is" if len(waiting_there) == 1 else "are"
    return [f"{ranks(waiting_there)} {verb} in {first.name}{place}{long}"]


def _without_message(standings: Mapping[int, Standing]) -> list[str]:
    said = []
    for rank, standing in standings.items():
        call = standing.waits_in
        if call is None or call.number is not None:
            continue
        words = f"rank {rank} waits in {call.what}{_places([call])}{_since([call])}"
        peer = standings.get(-1 if call.peer is None else call.peer)
        if peer is not None and peer.waits_in is None and not peer.raised:
            words += f"; rank {peer.rank} is {peer.place}"
        said.append(words)
    return said


def _silent(silent: Sequence[int], answered: bool) -> list[str]:
    if not silent or not answered:
        return []
    if len(silent) == 1:
        return [f"{ranks(silent)} does not answer: it is stopped, or its host is out of reach"]
    over_0 = ", or rank 0 is, over which the others answer" if 0 in silent else ""
    return [f"{ranks(silent)} do not answer: they are stopped{over_0}, or their hosts are out of reach"]


def _collectives(standings: Mapping[int, Standing]) -> dict[int, Call]:
    """Return the collectives that ranks wait in."""
    found = {rank: standing.waits_in for rank, standing in standings.items()}
    return {rank: call for rank, call in found.items() if call is not None and call.number is not None}


def _at(call: Call) -> str:
    return f"{call.name}{_places([call])}"


def _places(calls: Iterable[Call]) -> str:
    places = list(dict.fromkeys(call.where for call in calls if call.where))
    return f" at {' and '.join(places)}" if places else ""


def _since(calls: Iterable[Call]) -> str:
    seconds = max(call.seconds for call in calls)
    return f" since {seconds:.{0 if seconds >= 10 else 1}f} s" if seconds >= SHOWN_S else ""


def _s(several: Mapping[int, Call]) -> str:
    return "s" if len(several) == 1 else ""


def ranks(numbers: Iterable[int]) -> str:
    """Return what several ranks are called."""
    *most, last = map(str, sorted(numbers))
    return f"ranks {', '.join(most)} and {last}" if most else f"rank {last}"
