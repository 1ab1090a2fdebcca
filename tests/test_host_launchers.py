"""The commands of the README's section on several machines, each on two hosts of two ranks."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.fork_server import ROOT
from tests.hosts import Network, address
from tests.lost_hosts import LIMIT_S as LOST_WITHIN_S
from tests.lost_hosts import RAISED

LIMIT_S = 300
TRAIN = ["experiments/mnist.py", "data=digits", "engine.epochs=1"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
# Two hosts on one machine share memory, which two machines do not, and UCX would find that.
OVER_TCP = {**ENVIRONMENT, "UCX_TLS": "tcp,self", "UCX_NET_DEVICES": "eth0"}
pytestmark = [pytest.mark.slow, pytest.mark.timeout(LIMIT_S + 60)]


def finish(processes: list[subprocess.Popen[str]]) -> str:
    """Wait for the launchers; return what they wrote, if all went well."""
    try:
        output = "".join(process.communicate(timeout=LIMIT_S)[0] for process in processes)
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * len(processes), output
    return output


def start(command: list[str], environment: dict[str, str], directory: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*command, f"hydra.run.dir={directory}/${{run_id:}}"],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_torchrun_on_each_host(tmp_path: Path) -> None:
    torchrun = ["-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=2"]
    meeting = ["--rdzv-backend=c10d", "--rdzv-endpoint=h0:29400"]
    with Network(2, mbit_per_s=1000) as network:
        commands = [
            host.command(sys.executable, *torchrun, *meeting, *TRAIN, "comm=hierarchical") for host in network.hosts
        ]
        output = finish([start(command, ENVIRONMENT, tmp_path) for command in commands])
    assert "hierarchical/gloo on 4 ranks" in output
    assert re.search(r"Test accuracy: [78]\d", output), output


@pytest.mark.parametrize("comm", ["mpi", "hierarchical"])
def test_mpirun_on_the_first_host(comm: str, tmp_path: Path) -> None:
    with Network(2, mbit_per_s=1000) as network:
        command = mpirun(network, tmp_path, *TRAIN, f"comm={comm}")
        output = finish([start(command, OVER_TCP, tmp_path)])
    assert f"{comm} on 4 ranks" in output or f"{comm}/gloo on 4 ranks" in output
    assert re.search(r"Test accuracy: [78]\d", output), output
    assert "unexpected tag-receive" not in output, "messages were left that nobody received"


def test_a_host_that_vanishes_is_named_where_mpi_notices_nothing(tmp_path: Path) -> None:
    """What the ranks of that host say vanishes as well, and mpirun ends with the ranks of its own host."""
    output = tmp_path / "output.txt"
    with Network(2, mbit_per_s=200) as network, output.open("w") as file:
        command = mpirun(network, tmp_path, "-m", "tests.host_ranks", "lose", "mpi", str(2**20))
        with subprocess.Popen(command, cwd=ROOT, env=OVER_TCP, stdout=file, stderr=subprocess.STDOUT) as process:
            try:
                while output.read_text().count("reduces") < 4:
                    assert process.poll() is None, output.read_text()
                    time.sleep(0.05)
                cut_at = time.time()
                network.set_port(1, "lost")
                process.wait(60)
            finally:
                process.kill()
    raised = RAISED.findall(output.read_text())
    assert sorted(rank for rank, *_ in raised) == ["0", "1"], output.read_text()
    assert all(host == "h1" and float(at) - cut_at < LOST_WITHIN_S for _, at, _, host in raised), output.read_text()


def mpirun(network: Network, directory: Path, *arguments: str) -> list[str]:
    """Return what runs a Python program on two ranks of each host."""
    hosts = ["-hosts", ",".join(f"{address(index)}:2" for index in range(2))]
    launcher = ["-launcher", "ssh", "-launcher-exec", str(entrance(network, directory))]
    in_network = ["nsenter", f"--net=/proc/{network.hosts[0].pid}/ns/net"]
    launched = [str(Path(sys.executable).with_name("mpirun")), "-n", "4", *hosts, *launcher]
    return [*in_network, *launched, sys.executable, *arguments]


def entrance(network: Network, directory: Path) -> Path:
    """Return what mpirun takes for ssh: it runs a command on a host that is given by its address."""
    cases = [
        f'{address(index)}) exec {shlex.join(host.command("sh", "-c"))} "$*" ;;'
        for index, host in enumerate(network.hosts)
    ]
    lines = ["#!/bin/sh", 'while [ "${1#-}" != "$1" ]; do shift; done', "host=$1", "shift", "case $host in", *cases]
    script = directory / "enter"
    script.write_text("\n".join([*lines, "esac"]) + "\n")
    script.chmod(0o755)
    return script
