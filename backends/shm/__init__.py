"""Shared memory between the ranks of one host."""

from backends.shm.communicator import ShmCommunicator

__all__ = ["ShmCommunicator"]
