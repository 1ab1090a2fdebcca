"""Gradients in fewer bytes: hooks that compress a bucket, and the error feedback that makes up for it."""

from minidist.compression.compressor import Compressor
from minidist.compression.feedback import ErrorFeedback
from minidist.compression.formats import Float8, Format, Int8, Sign
from minidist.compression.low_rank import PowerSGD
from minidist.compression.quantized import Quantized
from minidist.compression.sparse import RandomK, TopK

__all__ = [
    "Compressor",
    "ErrorFeedback",
    "Float8",
    "Format",
    "Int8",
    "PowerSGD",
    "Quantized",
    "RandomK",
    "Sign",
    "TopK",
]
