"""The bridge to torch.distributed: any communicator as its backend, and any of its process groups as a communicator.

::

    torch.distributed.init_process_group("minidist")                           # in any script, once this is installed
    torch.distributed.init_process_group("minidist", pg_options="ring/shm")   # or MINIDIST_COMM=ring/shm
    comm = minidist.c10d.from_process_group()                                  # in a program that runs on gloo or nccl
"""

from minidist.c10d.backend import MinidistBackend
from minidist.c10d.group import from_process_group
from minidist.c10d.registration import register

__all__ = ["MinidistBackend", "from_process_group", "register"]
