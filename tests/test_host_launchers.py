"""The commands of the README's section on several machines, each on two hosts of two ranks."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fork_server import ROOT
from tests.hosts import Network, address

LIMIT_S = 300
TRAIN = ["experiments/mnist.py", "data=digits", "engine.epochs=1"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
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
    mpirun = [str(Path(sys.executable).with_name("mpirun")), "-n", "4"]
    # Two hosts on one machine share memory, which two machines do not, and UCX would find that.
    environment = {**ENVIRONMENT, "UCX_TLS": "tcp,self", "UCX_NET_DEVICES": "eth0"}
    with Network(2, mbit_per_s=1000) as network:
        hosts = ["-hosts", ",".join(f"{address(index)}:2" for index in range(2))]
        launcher = ["-launcher", "ssh", "-launcher-exec", str(entrance(network, tmp_path))]
        in_network = ["nsenter", f"--net=/proc/{network.hosts[0].pid}/ns/net"]
        command = [*in_network, *mpirun, *hosts, *launcher, sys.executable, *TRAIN, f"comm={comm}"]
        output = finish([start(command, environment, tmp_path)])
    assert f"{comm} on 4 ranks" in output or f"{comm}/gloo on 4 ranks" in output
    assert re.search(r"Test accuracy: [78]\d", output), output
    assert "unexpected tag-receive" not in output, "messages were left that nobody received"


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
