"""More than one host: training over networks of namespaces, and what happens when a part of one is gone."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.fork_server import ROOT
from tests.hosts import Network

TWO_BY_TWO = (0, 0, 1, 1)
HOLD = """
import time
from tests.hosts import Network
network = Network(2)
ranks = network.start("tests.host_ranks", "wait", on=(0, 1))
ranks.wait_for("waits", count=2)
print(*(place.pid for place in (*network.hosts, network.switch)), flush=True)
time.sleep(100)
"""


def namespaces_of(pid: int | str) -> set[str]:
    """Return the namespaces of a process and of its children."""
    spaces = Path("/proc", str(pid), "ns")
    return {str((spaces / name).readlink()) for name in ("net", "uts", "mnt", "pid_for_children")}


def namespaces_in_use() -> set[str]:
    """Return the namespaces of all processes that live."""
    used = set()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            used |= namespaces_of(process.name)
        except OSError:  # it has ended since
            continue
    return used


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left_of_hosts_however_a_test_ends(how: signal.Signals) -> None:
    with Network(1):  # skips where there can be none
        pass
    devices = Path("/proc/net/dev").read_text().count(":")
    with subprocess.Popen([sys.executable, "-c", HOLD], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        spaces = set[str]().union(*(namespaces_of(pid) for pid in process.stdout.readline().split()))
        spaces -= namespaces_of("self")
        assert len(spaces) == 12
        assert spaces <= namespaces_in_use()
        assert Path("/proc/net/dev").read_text().count(":") == devices
        process.send_signal(how)
        process.stdout.read()
    until = time.monotonic() + 20
    while spaces & namespaces_in_use():
        assert time.monotonic() < until, "processes of hosts outlive those who made them"
        time.sleep(0.01)


@pytest.mark.parametrize("kind", ["gloo", "ring", "two_level"])
def test_training_equals_that_of_one_process(kind: str) -> None:
    with (
        Network(2, mbit_per_s=1000) as network,
        network.start("tests.host_ranks", "train", kind, on=TWO_BY_TWO) as ranks,
    ):
        output = ranks.end()
    assert ranks.status == 0, output
    assert output.count("trained") == 4
