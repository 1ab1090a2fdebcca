"""Options of the test suite."""

from __future__ import annotations

import os
import pkgutil

import pytest

from tests.inputs import DEVICE, EVERYTHING


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("minidist")
    group.addoption("--slow", action="store_true", help="run the slow tests too, and all inputs of all")
    group.addoption("--comm", metavar="PATH", help="conformance of this communicator (dotted path) and no other")
    group.addoption(
        "--comm-launcher",
        choices=("torchrun", "mpirun", "thread", "none"),
        default="torchrun",
        help="what starts the ranks of --comm",
    )
    group.addoption(
        "--comm-lacks",
        action="append",
        default=[],
        metavar="PART=REASON",
        help="skip the checks with PART in their names, for this reason; can be repeated",
    )
    group.addoption("--comm-device", default="cpu", help="the device of the tensors of the conformance suite")
    group.addoption("--world-sizes", metavar="1,2,...", help="numbers of ranks of the conformance suite")


def pytest_configure(config: pytest.Config) -> None:
    if path := config.getoption("--comm"):
        try:
            pkgutil.resolve_name(path)
        except (ImportError, AttributeError, ValueError) as error:
            message = f"--comm={path} cannot be imported ({error}); set PYTHONPATH to where it lies"
            raise pytest.UsageError(message) from error
    os.environ[DEVICE] = config.getoption("--comm-device")  # for the ranks, which are processes
    if config.getoption("--slow"):
        os.environ[EVERYTHING] = "1"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is slow; a skip is for what this machine or a communicator lacks."""
    if not config.getoption("--slow"):
        config.hook.pytest_deselected(items=[item for item in items if "slow" in item.keywords])
        items[:] = [item for item in items if "slow" not in item.keywords]
