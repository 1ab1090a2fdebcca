"""Runs a program of torch.distributed on minidist: ``python -m minidist.c10d [--as gloo] script.py args...``.

Under mpirun it sets what ``init_process_group`` reads from the environment. With ``--as gloo`` a program that asks for
gloo gets minidist.
"""

from __future__ import annotations

import argparse
import os
import pkgutil
import runpy
import sys

from minidist import launch
from minidist.c10d.registration import register

MEET = "backends.processes.rendezvous.meet"
"""How ranks of any launcher find each other; by name, as minidist knows no backend."""


def main() -> None:
    """Set the environment, register, and run the script as if python had."""
    parser = argparse.ArgumentParser(prog="python -m minidist.c10d", description=__doc__)
    parser.add_argument("--as", dest="name", default="minidist", help="the backend's name that the program uses")
    parser.add_argument("-m", dest="module", action="store_true", help="the program is a module")
    parser.add_argument("script", help="the program")
    parser.add_argument("args", nargs=argparse.REMAINDER, help="its arguments")
    given = parser.parse_args()
    set_environment()
    register(given.name)
    sys.argv = [given.script, *given.args]
    if given.module:
        runpy.run_module(given.script, run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = os.path.dirname(os.path.abspath(given.script))
        runpy.run_path(given.script, run_name="__main__")


def set_environment() -> None:
    """Say in torchrun's words what another launcher has said in its own, and lend torch the store of its ranks."""
    world = launch.detect()
    if world.launcher == "torchrun":
        return
    meeting = pkgutil.resolve_name(MEET)()
    values = {
        "RANK": world.rank,
        "WORLD_SIZE": world.world_size,
        "LOCAL_RANK": meeting.world.local_rank,
        "LOCAL_WORLD_SIZE": meeting.world.local_world_size,
        "MASTER_ADDR": meeting.host,
        "MASTER_PORT": meeting.port,
        "TORCHELASTIC_USE_AGENT_STORE": world.world_size > 1,  # it is there already, so no rank has to make it
    }
    os.environ.update({name: str(value) for name, value in values.items()})


if __name__ == "__main__":
    main()
