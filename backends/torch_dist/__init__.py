"""The process groups of torch.distributed."""

from backends.torch_dist.gloo import GlooCommunicator
from backends.torch_dist.nccl import NcclCommunicator

__all__ = ["GlooCommunicator", "NcclCommunicator"]
