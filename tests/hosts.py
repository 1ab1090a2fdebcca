"""Hosts on one machine: namespaces with a network, a name, names of others and processes of their own.

::

    with Network(2, mbit_per_s=1000) as network:
        with network.start("tests.host_ranks", "train", "gloo", on=(0, 0, 1, 1)) as ranks:
            ranks.wait_for("step 3", count=4)
            network.set_port(1, "lost")
        print(ranks.output)

A host is a process that waits for the end of its input, the first one of a namespace of processes; whatever else runs
on the host ends with it. Its input ends with the process of the tests, however that ends. A switch is another such
process, with a bridge in its namespace. So nothing is made outside of namespaces, and nothing stays::

    host h0 (10.77.0.1, fd77::1)  eth0 ---- port0  |        |
    host h1 (10.77.0.2, fd77::2)  eth0 ---- port1  | bridge |     each end of a cable lets a limited rate leave

"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Literal, Self

import pytest

from tests import fork_server
from tests.fork_server import Order

Names = Literal["known", "debian", "none"]
"""What /etc/hosts says: the addresses of all; of itself 127.0.1.1, as Debian's installer does; nothing."""
PortState = Literal["up", "down", "lost"]
PORT_STATES: dict[PortState, tuple[str, int]] = {"up": ("up", 3), "down": ("down", 3), "lost": ("up", 0)}
"""State of the device, and of the port of the bridge: a port that is down is seen, one that loses frames is not."""
NAMESPACES = ("net", "uts", "mnt")
MASTER_PORT = 29400
BURST_S = 2e-3
"""What a line may send at once: late timers cost up to 60 % of the rate where it is less."""
QUEUE_S = 50e-3
TOOLS = ("ip", "tc", "bridge", "unshare", "nsenter", "mount", "hostname")


class Place:
    """A process that holds namespaces: a host, or the switch."""

    def __init__(self, name: str, known_hosts: str = "") -> None:
        script = [
            f"hostname {name}",
            "ip link set lo up",
            "echo reno > /proc/sys/net/ipv4/tcp_congestion_control",  # others are not in every kernel's namespaces
            "mount -t tmpfs hosts /mnt",
            f"printf '{known_hosts}' > /mnt/hosts",
            "mount --bind /mnt/hosts /etc/hosts",
            "umount -l /mnt",
            "echo ready",
            "exec cat > /dev/null",
        ]
        self.name = name
        options = ["--net", "--uts", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child"]
        self._process = subprocess.Popen(
            ["unshare", *options, "sh", "-ec", "\n".join(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        if self._process.stdout.readline() != "ready\n":
            raise OSError(self._process.communicate()[1].strip())

    @property
    def pid(self) -> int:
        """A process in its namespaces, whose children are in that of its processes too."""
        return self._process.pid

    def run(self, command: str) -> str:
        """Run a command in its network, on the files of this machine; return what it writes."""
        done = subprocess.run(["nsenter", f"--net=/proc/{self.pid}/ns/net", *command.split()], capture_output=True)
        if done.returncode != 0:
            raise OSError(f"{command}: {done.stderr.decode().strip()}")
        return done.stdout.decode()

    def end(self) -> None:
        """End it and all of its processes; their connections end as those of killed processes do."""
        self._process.kill()
        self._process.communicate()

    def command(self, *arguments: str) -> list[str]:
        """Return what runs a command as a process of it, in the directory of whoever runs it."""
        spaces = [f"--{name.replace('mnt', 'mount')}=/proc/{self.pid}/ns/{name}" for name in NAMESPACES]
        return ["nsenter", *spaces, f"--pid=/proc/{self.pid}/ns/pid_for_children", "--wd=.", *arguments]


class Network:
    """Hosts that a switch joins.

    Args:
        num_hosts: how many.
        mbit_per_s: of each line, in both directions; None for as fast as it goes.
        names: what the hosts know of each other's names.

    Attributes:
        hosts, switch: what it consists of.
    """

    def __init__(self, num_hosts: int, mbit_per_s: float | None = None, names: Names = "known") -> None:
        if reason := why_unavailable():
            pytest.skip(reason)
        self._num_worlds = 0
        self.hosts: list[Place] = []
        self.switch: Place | None = None
        try:
            self._build(num_hosts, mbit_per_s, names)
        except BaseException:
            self.close()
            raise

    def _build(self, num_hosts: int, mbit_per_s: float | None, names: Names) -> None:
        self.switch = Place("switch")
        self.switch.run("ip link add bridge type bridge")
        self.switch.run("ip link set bridge up")
        for index in range(num_hosts):
            self.hosts.append(Place(f"h{index}", "\n".join(known_hosts(index, num_hosts, names))))
            self._plug_in(index, mbit_per_s)

    def _plug_in(self, index: int, mbit_per_s: float | None) -> None:
        host, switch, port = self.hosts[index], self.switch, f"port{index}"
        assert switch is not None
        switch.run(f"ip link add {port} type veth peer name eth0 netns {host.pid}")
        switch.run(f"ip link set {port} master bridge")
        switch.run(f"ip link set {port} up")
        host.run(f"ip address add {address(index)}/24 dev eth0")
        if has_ipv6():
            host.run(f"ip address add {address6(index)}/64 dev eth0 nodad")
        host.run("ip link set eth0 up")
        if mbit_per_s is not None:
            host.run(shaping("eth0", mbit_per_s))
            switch.run(shaping(port, mbit_per_s))

    def set_port(self, host: int, state: PortState) -> None:
        """Change the port of a host at the switch: ``down`` as when a cable is pulled, ``lost`` drops all frames."""
        assert self.switch is not None
        device, bridge = PORT_STATES[state]
        self.switch.run(f"ip link set port{host} {device}")
        if device == "up":
            self.switch.run(f"bridge link set dev port{host} state {bridge}")

    def start(
        self,
        program: str,
        *arguments: str,
        on: Sequence[int],
        environment: Mapping[str, str] | None = None,
        master: str | None = None,
        directory: Path = fork_server.ROOT,
    ) -> Ranks:
        """Start ``python -m`` on ranks, forks that have torch loaded.

        Args:
            program: a module, or the path of a script.
            arguments: what follows on the command line.
            on: the host of each rank.
            environment: for all of them.
            master: what they call the host of rank 0; None for its address.
            directory: where they run.
        """
        self._num_worlds += 1
        port = MASTER_PORT + self._num_worlds
        variables = [
            {**placed(rank, on, address(on[0]) if master is None else master, port), **(environment or {})}
            for rank in range(len(on))
        ]
        output = tempfile.TemporaryFile()  # noqa: SIM115  # the ranks' end closes it; it has no name that could be left
        order = Order(
            program,
            arguments,
            len(on),
            str(directory),
            f"/proc/{os.getpid()}/fd/{output.fileno()}",
            {**os.environ, "OMP_NUM_THREADS": "1"},
            [self.hosts[host].pid for host in on],
            variables,
        )
        return Ranks(order, output)

    def close(self) -> None:
        """End all that was started on the hosts, and the hosts."""
        for place in (*self.hosts, self.switch):
            if place is not None:
                place.end()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()


class Ranks:
    """Ranks on hosts, from their start to their end.

    Attributes:
        status: 0 if all ended well; None while they run, and if they had to be ended.
    """

    def __init__(self, order: Order, output: IO[bytes]) -> None:
        self._output = output
        self._running = fork_server.server().start(order)
        self.status: int | None = None

    @property
    def output(self) -> str:
        """What they have written so far."""
        nbytes = os.fstat(self._output.fileno()).st_size
        return os.pread(self._output.fileno(), nbytes, 0).decode(errors="replace")

    def wait_for(self, text: str, count: int = 1, limit_s: float = 60.0) -> None:
        """Wait until they have written ``text`` so many times."""
        until = time.monotonic() + limit_s
        while self.output.count(text) < count:
            assert time.monotonic() < until, f"{text!r} did not come {count} times in {limit_s} s:\n{self.output}"
            assert not self.has_ended(), f"they ended before {text!r} came {count} times:\n{self.output}"
            time.sleep(0.01)

    def has_ended(self) -> bool:
        """Whether all of them have."""
        return self._running.has_ended(0)

    def end(self, limit_s: float = 60.0) -> str:
        """Wait for their end, and return what they wrote."""
        self.status = self._running.finish(limit_s)
        return self.output

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._running.finish(0)
        self._output.close()


def address(host: int) -> str:
    """Return the address of a host."""
    return f"10.77.0.{host + 1}"


def address6(host: int) -> str:
    """Return the address of a host in IPv6."""
    return f"fd77::{host + 1}"


def known_hosts(index: int, num_hosts: int, names: Names) -> Iterator[str]:
    """Yield what /etc/hosts of a host says."""
    yield "127.0.0.1 localhost"
    if names == "none":
        return
    for other in range(num_hosts):
        own = names == "debian" and other == index
        yield f"{'127.0.1.1' if own else address(other)} h{other}"


def shaping(device: str, mbit_per_s: float) -> str:
    """Return the command that lets only so much leave a device."""
    burst = max(int(mbit_per_s * 1e6 / 8 * BURST_S), 2**14)
    return f"tc qdisc add dev {device} root tbf rate {mbit_per_s:g}mbit burst {burst} latency {QUEUE_S * 1e3:g}ms"


def placed(rank: int, on: Sequence[int], master: str, port: int) -> dict[str, str]:
    """Return what torchrun sets on the ranks of several hosts and somebody here reads."""
    here = [other for other, host in enumerate(on) if host == on[rank]]
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(here.index(rank)),
        "WORLD_SIZE": str(len(on)),
        "LOCAL_WORLD_SIZE": str(len(here)),
        "MASTER_ADDR": master,
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "hosts",
        "TORCHELASTIC_RESTART_COUNT": "0",
    }


@functools.cache
def has_ipv6() -> bool:
    """Whether this kernel has IPv6."""
    return Path("/proc/sys/net/ipv6").exists()


@functools.cache
def why_unavailable() -> str:
    """Return why there can be no hosts here; nothing where there can."""
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        return f"hosts need {', '.join(missing)}: apt-get install iproute2 util-linux"
    try:
        switch = Place("switch")
    except OSError as error:
        return f"hosts need root and namespaces: {error}"
    try:
        switch.run("ip link add bridge type bridge")
        switch.run("ip link add port0 type veth peer name eth0")
        switch.run(shaping("port0", 1000))
    except OSError as error:
        return f"hosts need a kernel with bridges, veth and tbf: {error}"
    finally:
        switch.end()
    return ""
