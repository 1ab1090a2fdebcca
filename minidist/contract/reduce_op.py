"""How values are combined: a file of its own, as the checks beneath the communicator need it too."""

from enum import Enum


class ReduceOp(Enum):
    """How the values of the ranks are combined. AVG is not for integers; bool has MIN and MAX, complex SUM and AVG."""

    SUM = "sum"
    AVG = "avg"
    MIN = "min"
    MAX = "max"
    PRODUCT = "product"
