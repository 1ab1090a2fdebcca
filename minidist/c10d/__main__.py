"""Runs a program of torch.distributed on minidist: ``python -m minidist.c10d [--as gloo] script.py args...``.

Under mpirun it sets what ``init_process_group`` reads from the environment. With ``--as gloo`` a program that asks for
gloo gets minidist.
"""

from __future__ import annotations

import argparse
import os
import runpy
import sys

from minidist import launch
from minidist.c10d.registration import register

PORT = "29531"


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
    """Say in torchrun's words what another launcher has said in its own."""
    world = launch.detect()
    values = {
        "RANK": world.rank,
        "WORLD_SIZE": world.world_size,
        "LOCAL_RANK": world.local_rank,
        "LOCAL_WORLD_SIZE": world.local_world_size,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": PORT,
    }
    for name, value in values.items():
        os.environ.setdefault(name, str(value))


if __name__ == "__main__":
    main()
