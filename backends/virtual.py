"""Ranks of one process whose time is virtual: real models, data and bytes, on a network that nobody has to own.

::

    comm=virtual network=ethernet_10g launch.nproc=64

Computing takes a rank what its thread computes, measured while few others do, or what it is set to. A collective moves
its tensors at once, in memory, and takes what `minidist.analysis.simulate` says for its schedule, its bytes and the
times at which the ranks begin it. What runs in the background takes its rank no time until it is waited for: so buckets
overlap with backward as they do elsewhere, one after the other.

What is moved does not depend on the network, so one run can be timed on several: `VirtualClock.times`.

The model is one of time, and leaves this out:

- Operations of two communicators at once, as of a split and its parent, do not slow each other down, nor does a message
  a collective. Messages queue for the ports of their two ranks alone, not for links that others share.
- What is computed in the background, such as the packing of an operation that is made of several, is given a core.
- A receive from any rank gets what really came first.

Results are those of `backends.thread`, bit for bit; random numbers that ranks draw are those of one process, as there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from backends.algorithm import schedule_at
from backends.schedules import DEFAULTS
from backends.thread import ThreadCommunicator
from backends.virtual_time.clock import Pace, VirtualClock
from backends.virtual_time.costs import Costs
from backends.virtual_time.meeting import Meeting
from backends.virtual_time.rank import Place, VirtualRank
from backends.virtual_time.turn import Turns
from minidist.analysis.network import Network
from minidist.schedule import Schedule


class VirtualCommunicator(VirtualRank):
    """One rank per thread, in virtual time; see `Wrapper` and `backends.thread`.

    ``traffic`` counts virtual seconds, and the messages that the schedules would have sent. A collective of other sizes
    or kinds on some rank raises MismatchError on all.

    Args:
        network: the model; or several by name, of which the first one's is the time of ``clock`` and ``traffic``.
        schedules: by collective, what it is timed and counted as: a schedule, or its dotted path; None, and what is not
            there, is the default one.
        step_s, spread, slow_ranks, slow_factor, seed: how long ranks compute, see `Pace`.
        num_at_once: how many ranks compute at the same time.
        timeout_s: in real seconds.

    Raises:
        ValueError: there is no network, or it has too few places; or a setting is out of range.
    """

    launcher: ClassVar[str] = "thread"

    def __init__(
        self,
        network: Network | Mapping[str, Network] | None,
        schedules: Mapping[str, Schedule | str | None] | None = None,
        step_s: float | None = None,
        spread: float = 0.0,
        slow_ranks: Sequence[int] = (),
        slow_factor: float = 2.0,
        seed: int = 0,
        num_at_once: int = 1,
        timeout_s: float = 300.0,
    ) -> None:
        if not network:
            raise ValueError("virtual needs the model of a network; choose one with network=<name>")
        if num_at_once < 1:
            raise ValueError(f"num_at_once must be at least 1, got {num_at_once}")
        pace = Pace(step_s, spread, tuple(slow_ranks), slow_factor, seed)
        networks = [network] if isinstance(network, Network) else list(network.values())
        chosen = {name: schedule_at(name, given) for name, given in (schedules or {}).items() if given is not None}
        line = ThreadCommunicator(timeout_s)
        pace.ensure_ranks(line.world_size)
        costs = Costs({**DEFAULTS, **chosen}, networks, range(line.world_size))
        meeting, turns = line.shared(lambda: (Meeting(costs, line.world_size, line.board.changed), Turns(num_at_once)))
        clock = VirtualClock(pace, line.rank, len(networks))
        super().__init__(line, Place(line, range(line.world_size), meeting, clock, turns))
        turns.take()

    @classmethod
    def check_available(cls) -> None:
        ThreadCommunicator.check_available()

    def _close(self) -> None:
        super()._close()
        self.place.turns.end()
