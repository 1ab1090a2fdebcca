"""Methods that exchange more rarely than in every step: what they come to, and that wrong ones are caught."""

from __future__ import annotations

from pathlib import Path

import pytest

from backends.thread import run_threads
from minidist.methods import LocalSGD
from tests import method_checks
from tests.method_checks import METHODS, Make

each_method = pytest.mark.parametrize("name", METHODS)
IDENTICAL = {"local_sgd": [3, 6, 9], "post_local_sgd": [1, 2, 3, 4, 7, 10]}
EVERY_STEP: dict[str, Make] = {
    "local_sgd": lambda: LocalSGD(1),
    "post_local_sgd": lambda: LocalSGD(1, local_after=2),
}


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("name", EVERY_STEP)
def test_a_period_of_one_is_data_parallel_training(name: str, world_size: int) -> None:
    run_threads(lambda comm: method_checks.check_equals_ddp(comm, EVERY_STEP[name]), world_size, timeout_s=30)


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("name", IDENTICAL)
def test_replicas_are_identical_when_they_should_be(name: str, world_size: int) -> None:
    run_threads(
        lambda comm: method_checks.check_replicas_identical(comm, METHODS[name], IDENTICAL[name]), world_size, 30
    )


@pytest.mark.parametrize("world_size", [1, 3])
@each_method
def test_the_shown_model_is_one(name: str, world_size: int) -> None:
    run_threads(lambda comm: method_checks.check_shown_model(comm, METHODS[name]), world_size, timeout_s=30)


@pytest.mark.parametrize("world_size", [1, 3])
@each_method
def test_a_resume_goes_on_to_the_same_bits(name: str, world_size: int, tmp_path: Path) -> None:
    run_threads(lambda comm: method_checks.check_resume(comm, METHODS[name], tmp_path), world_size, timeout_s=60)
