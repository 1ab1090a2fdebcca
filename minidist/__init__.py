"""Data-parallel training over a communicator that the user picks, swaps, writes and measures."""

from minidist.communicator import Communicator, ReduceOp, Traffic, Work

__all__ = ["Communicator", "ReduceOp", "Traffic", "Work"]
