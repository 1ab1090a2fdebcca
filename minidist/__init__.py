"""Data-parallel training over a communicator that the user picks, swaps, writes and measures."""

from minidist.analysis import network
from minidist.communicator import Communicator, ReduceOp, Traffic, Work
from minidist.gradients import hooks
from minidist.sharded import ShardedOptimizer

__all__ = ["Communicator", "ReduceOp", "ShardedOptimizer", "Traffic", "Work", "hooks", "network"]
