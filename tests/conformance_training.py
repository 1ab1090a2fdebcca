"""What training must come to on every communicator; the checks themselves are in training_checks.py."""

from __future__ import annotations

from collections.abc import Callable

from minidist.communicator import Communicator
from tests import training_checks
from tests.inputs import needs


def _equals_one_process(name: str) -> Callable[[Communicator], None]:
    @needs(once=True)
    def check(comm: Communicator) -> None:
        for num_micro in (1, 2):  # without and with accumulation
            training_checks.check_equals_one_process(comm, name, num_micro)

    return check


globals().update({f"check_training_{name}": _equals_one_process(name) for name in training_checks.CASES})


@needs(once=True)
def check_training_bit_for_bit(comm: Communicator) -> None:
    if comm.world_size <= 2:  # more ranks can be added up in more than one order
        training_checks.check_equals_one_process_bit_for_bit(comm)


def check_training_backward_passes_add_up(comm: Communicator) -> None:
    training_checks.check_backward_passes_add_up(comm)


def check_training_buckets_start_in_order(comm: Communicator) -> None:
    training_checks.check_buckets_start_in_order(comm)


@needs(once=True)
def check_training_join(comm: Communicator) -> None:
    training_checks.check_join(comm, "mlp")
