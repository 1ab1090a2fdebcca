"""One rank of a world of Gloo in which test_methods.py puts methods to their checks."""

from __future__ import annotations

import sys
from pathlib import Path

from backends.torch_dist import GlooCommunicator
from tests import method_checks
from tests.method_checks import METHODS


def main(directory: Path) -> None:
    with GlooCommunicator(timeout_s=60) as comm:
        for name, make in METHODS.items():
            method_checks.check_shown_model(comm, make)
            method_checks.check_resume(comm, make, directory / name)
        for name in ("diloco", "streaming_diloco"):
            method_checks.check_equals_one_process(comm, METHODS[name])
        method_checks.check_gossip_conserves_the_sum(comm, method_checks.exponential)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
