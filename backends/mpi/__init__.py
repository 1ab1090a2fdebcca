"""MPI through mpi4py."""

from backends.mpi.communicator import MpiCommunicator

__all__ = ["MpiCommunicator"]
