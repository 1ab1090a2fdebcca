"""More than one host: training over networks of namespaces, and what happens when a part of one is gone."""

from __future__ import annotations

import itertools
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.fork_server import ROOT
from tests.hosts import Names, Network, PortState, address, address6, has_ipv6
from tests.lost_hosts import TWO_BY_TWO, lose_a_host

KINDS = ("gloo", "ring", "two_level", "hierarchical")
LOSE = ("tests.host_ranks", "lose")
TRAIN = ("tests.host_ranks", "train")
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


@pytest.mark.parametrize("kind", KINDS)
def test_training_equals_that_of_one_process(kind: str) -> None:
    with (
        Network(2, mbit_per_s=1000) as network,
        network.start(*TRAIN, kind, on=TWO_BY_TWO) as ranks,
    ):
        output = ranks.end()
    assert ranks.status == 0, output
    assert output.count("trained") == 4


@pytest.mark.parametrize(
    ("names", "master"),
    [("debian", "h0"), ("debian", None), ("none", None), ("known", "h0"), ("known", address6(0))],
)
def test_hosts_meet_whatever_they_know_of_names(names: Names, master: str | None) -> None:
    with Network(2, names=names) as network, network.start(*TRAIN, "gloo", on=TWO_BY_TWO, master=master) as ranks:
        output = ranks.end(30)
    assert ranks.status == 0, output
    assert output.count("trained") == 4


@pytest.mark.parametrize(
    "kind", ["gloo", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("ring", "two_level", "hierarchical"))]
)
def test_hosts_that_have_only_ipv6_train_split_and_close(kind: str) -> None:
    if not has_ipv6():
        pytest.skip("this kernel has no IPv6")
    with Network(2) as network:
        for index, host in enumerate(network.hosts):
            host.run(f"ip address del {address(index)}/24 dev eth0")
        with network.start(*TRAIN, kind, on=TWO_BY_TWO, master=address6(0)) as ranks:
            output = ranks.end(60)
    assert ranks.status == 0, output
    assert output.count("trained") == 4


def test_the_interface_that_the_user_names_is_used() -> None:
    with Network(2) as network:
        for index, host in enumerate(network.hosts):
            host.run("ip link add other type bridge")
            host.run(f"ip address add 10.99.0.{index + 1}/32 dev other")
            host.run("ip link set other up")
            host.run(f"ip route add 10.99.0.{2 - index}/32 via {address(1 - index)}")
        with network.start(*LOSE, "gloo", "1", on=TWO_BY_TWO, environment={"GLOO_SOCKET_IFNAME": "other"}) as ranks:
            ranks.wait_for("reduces", count=4)
            peers = network.hosts[1].run("ss -tnH state established dst 10.99.0.1")
        assert peers.count("10.99.0.1:") >= 4, peers
        with network.start(*TRAIN, "gloo", on=TWO_BY_TWO, environment={"GLOO_SOCKET_IFNAME": "eth7"}) as ranks:
            output = ranks.end(30)
    assert (
        "GLOO_SOCKET_IFNAME is 'eth7', but host h" in output
    )  # the first rank that ends may end those that start late
    assert "connected" not in output


@pytest.mark.parametrize(
    ("kind", "how"),
    [
        *(("gloo", "lost"), ("hierarchical", "down")),
        *(
            pytest.param(kind, how, marks=pytest.mark.slow)
            for kind, how in itertools.product((*KINDS, "auto"), ("lost", "down"))
            if (kind, how) not in (("gloo", "lost"), ("hierarchical", "down"))
        ),
    ],
)
def test_a_host_that_vanishes_is_named_by_all(kind: str, how: PortState) -> None:
    lose_a_host(kind, how)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["lost", "down"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_outage_of_three_seconds_is_survived(kind: str, how: PortState) -> None:
    with Network(2) as network, network.start("tests.host_ranks", "outlast", kind, "12", on=TWO_BY_TWO) as ranks:
        ranks.wait_for("reduces", count=4)
        network.set_port(1, how)
        time.sleep(3)
        network.set_port(1, "up")
        output = ranks.end(60)
    assert ranks.status == 0, output
    assert output.count("outlasted") == 4


def test_two_levels_take_ranks_in_any_order() -> None:
    with Network(2) as network, network.start(*TRAIN, "two_level", on=(0, 1, 1, 0)) as ranks:
        output = ranks.end(30)
    assert ranks.status == 0, output
    assert output.count("trained") == 4


MIXED = [(0, 0, 1, 2), (0, 0, 0, 1), (0, 0, 0, 0, 1, 1, 2, 2)]


@pytest.mark.parametrize(
    "on", [MIXED[2], (0, 1, 0), *(pytest.param(on, marks=pytest.mark.slow) for on in (*MIXED[:2], (0, 1, 1, 0)))]
)
def test_a_hierarchy_takes_any_mix_of_hosts(on: tuple[int, ...]) -> None:
    with Network(3) as network, network.start(*TRAIN, "hierarchical", on=on) as ranks:
        output = ranks.end(60)
    assert ranks.status == 0, output
    assert output.count("trained") == len(on)


@pytest.mark.parametrize("on", MIXED)
def test_two_levels_refuse_hosts_of_several_sizes_on_all_ranks(on: tuple[int, ...]) -> None:
    with Network(3) as network, network.start(*TRAIN, "two_level", on=on) as ranks:
        output = ranks.end(30)
    sizes = ", ".join(str(on.count(host)) for host in sorted(set(on)))
    sentence = f"ValueError: two_level needs as many ranks on every host, but they have {sizes}"
    assert output.count(sentence) == len(on), output
