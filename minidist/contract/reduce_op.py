"""How values are combined: a file of its own, as the checks beneath the communicator need it too."""

from enum import Enum


class ReduceOp(Enum):
    """How the values of the ranks are combined.

    AVG is not for integers and bool; BAND, BOR and BXOR, bit by bit, are for nothing else. Complex numbers have SUM and
    AVG. Of bool, SUM and MAX say whether any is true, PRODUCT and MIN whether all are.
    """

    SUM = "sum"
    AVG = "avg"
    MIN = "min"
    MAX = "max"
    PRODUCT = "product"
    BAND = "band"
    BOR = "bor"
    BXOR = "bxor"

    __hash__ = object.__hash__  # its own, as members are compared; Enum's, that of the name, takes longer than a check
