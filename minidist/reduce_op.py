"""How values are combined: a file of its own, as the checks beneath the communicator need it too."""

from enum import Enum


class ReduceOp(Enum):
    """How the values of the ranks are combined. AVG needs floating point; bool only MIN and MAX."""

    SUM = "sum"
    AVG = "avg"
    MIN = "min"
    MAX = "max"
    PRODUCT = "product"
