"""What replicas exchange and when: gradients in every step, or less, more rarely."""

from minidist.methods.diloco import DiLoCo, SparseLoCo
from minidist.methods.gossip import Gossip
from minidist.methods.local_sgd import LocalSGD
from minidist.methods.method import EveryStep, Method
from minidist.methods.streaming import StreamingDiLoCo

__all__ = ["DiLoCo", "EveryStep", "Gossip", "LocalSGD", "Method", "SparseLoCo", "StreamingDiLoCo"]
