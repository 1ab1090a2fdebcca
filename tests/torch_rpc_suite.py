"""Runs torch's own tests of DDP beneath distributed autograd, of its wheel: ``python -m tests.torch_rpc_suite [gloo]``.

They ask for gloo: unless told to leave it native, minidist has that name. As in tests/torch_suite.py, the processes
are forks, and the tests unchanged.
"""

from __future__ import annotations

import sys
import time
import unittest
from typing import Any

import torch.multiprocessing
from torch.testing._internal.common_distributed import MultiProcessTestCase
from torch.testing._internal.distributed import ddp_under_dist_autograd_test
from torch.testing._internal.distributed.rpc.tensorpipe_rpc_agent_test_fixture import TensorPipeRpcAgentTestFixture

from minidist.c10d import register
from tests.torch_suite import last_words, run

KINDS: tuple[Any, ...] = (
    ddp_under_dist_autograd_test.DdpUnderDistAutogradTest,
    ddp_under_dist_autograd_test.DdpComparisonTest,
)


class Forked(MultiProcessTestCase):
    """What starts the ranks of a test."""

    def setUp(self) -> None:
        super().setUp()
        self._start_processes(torch.multiprocessing.get_context("fork").Process)


def main() -> None:
    """Run all of them, and print what came of each."""
    if sys.argv[1:] != ["gloo"]:
        register("gloo")
    for kind in KINDS:
        case: Any = type(kind.__name__, (kind, TensorPipeRpcAgentTestFixture, Forked), {})
        for name in unittest.TestLoader().getTestCaseNames(case):
            started = time.perf_counter()
            status, why = run(case, name)
            print(f"{status:7} {time.perf_counter() - started:6.2f} s  {name}  {last_words(why)}", flush=True)


if __name__ == "__main__":
    main()
