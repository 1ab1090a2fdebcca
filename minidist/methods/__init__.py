"""What replicas exchange and when: gradients in every step, or less, more rarely."""

from minidist.methods.local_sgd import LocalSGD
from minidist.methods.method import EveryStep, Method

__all__ = ["EveryStep", "LocalSGD", "Method"]
