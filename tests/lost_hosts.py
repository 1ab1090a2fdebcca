"""A host goes out of reach while ranks communicate: all of them raise within LIMIT_S, and name it.

As a program it does so again and again, each time at another moment: ``python -m tests.lost_hosts ring lost 50``.
"""

from __future__ import annotations

import random
import re
import sys
import time
from typing import cast

from tests.hosts import Network, PortState

TWO_BY_TWO = (0, 0, 1, 1)
LIMIT_S = 10.0
RAISED = re.compile(r"rank (\d): raised at ([\d.]+), peers .(\d).*the connection to it was lost \(host (h\d)\)")


def lose_a_host(kind: str, how: PortState, after_s: float = 0.0) -> float:
    """Take the port of a host of two away while four ranks reduce; return how long the last rank took to raise.

    Args:
        kind: of communicator, see `tests.host_ranks`.
        how: what becomes of the port.
        after_s: how long the ranks reduce before.

    Raises:
        AssertionError: a rank did not raise in time, named a rank of its own host, or did not end well.
    """
    with (
        Network(2, mbit_per_s=200) as network,
        network.start("tests.host_ranks", "lose", kind, str(2**20), on=TWO_BY_TWO) as ranks,
    ):
        ranks.wait_for("reduces", count=4)
        time.sleep(after_s)
        cut_at = time.time()
        network.set_port(1, how)
        output = ranks.end(30)
    raised = RAISED.findall(output)
    assert len(raised) == 4, output
    for rank, _, peer, host in raised:
        assert int(rank) // 2 != int(peer) // 2, output
        assert host == f"h{int(peer) // 2}", output
    took = max(float(at) for _, at, _, _ in raised) - cut_at
    assert took < LIMIT_S, output
    assert ranks.status == 0, output
    assert output.count("closed") == 4, output
    return took


def main(kind: str, how: str, count: str) -> None:
    """Print what went wrong, and how often it went well and how fast."""
    moments = random.Random(f"{kind} {how}")
    took = list[float]()
    for number in range(int(count)):
        try:
            took.append(lose_a_host(kind, cast(PortState, how), moments.uniform(0, 1)))
        except AssertionError as error:
            print(f"run {number}: {error}", flush=True)
        well = f"{min(took):.1f} to {max(took):.1f} s" if took else "-"
        print(f"{kind}, {how}: {len(took)} of {number + 1} runs went well, in {well}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
