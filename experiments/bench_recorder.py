"""What it costs to record an operation: ``python experiments/bench_recorder.py``.

On one rank, where an operation does nothing else, by the fastest of many short runs, as the machine may be busy.
"""

from __future__ import annotations

import timeit
from collections.abc import Callable

import torch

from backends.serial import SerialCommunicator
from minidist.contract.recorder import Recorder
from minidist.contract.reduce_op import ReduceOp

NUMBER, REPEAT = 500, 100


def ns_of(action: Callable[[], object]) -> float:
    """Return what a call takes at best, in nanoseconds."""
    return min(timeit.repeat(action, number=NUMBER, repeat=REPEAT)) / NUMBER * 1e9


def main() -> None:
    """Print the figures."""
    torch.set_num_threads(1)
    recorder, tensor, args = Recorder(0, 1), torch.ones(256), (ReduceOp.SUM,)
    tensors = (tensor,)

    def noted() -> None:
        recorder.note("all_reduce", tensors, args)

    def nothing() -> None:
        pass

    bare = ns_of(nothing)
    print(f"a note                    {ns_of(noted) - bare:6.0f} ns")
    with SerialCommunicator() as comm:
        print(f"an all_reduce of 1 rank   {ns_of(lambda: comm.all_reduce(tensor)) - bare:6.0f} ns, with its note")


if __name__ == "__main__":
    main()
