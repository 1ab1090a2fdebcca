"""The steps of the bridge on threads: every reduction and dtype of torch, and blocks of any size."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ReduceOp

from backends.thread import ThreadCommunicator, run_threads
from minidist.c10d import moves
from minidist.c10d.choice import made
from minidist.c10d.reductions import Reduction
from minidist.communicator import Communicator
from minidist.contract.place import Place
from minidist.errors import ConfigError

WORLD_SIZE = 3
INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16)
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2)
FOLDS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "SUM": torch.add,
    "MIN": torch.minimum,
    "MAX": torch.maximum,
    "PRODUCT": torch.mul,
    "BAND": torch.bitwise_and,
    "BOR": torch.bitwise_or,
    "BXOR": torch.bitwise_xor,
}


def given(rank: int, dtype: torch.dtype) -> Tensor:
    """Small whole numbers, which every dtype has; their sums and products too."""
    return ((torch.arange(6) * 5 + rank * 3) % 4 + 1).to(torch.int64).to(dtype)


def expected(op: str, dtype: torch.dtype) -> Tensor:
    wide = torch.int64 if dtype in INTEGERS else torch.float64
    return functools.reduce(FOLDS[op], [given(rank, dtype).to(wide) for rank in range(WORLD_SIZE)]).to(dtype)


@pytest.mark.parametrize("dtype", INTEGERS + FLOATS, ids=str)
def test_reductions(dtype: torch.dtype) -> None:
    ops = FOLDS if dtype in INTEGERS and dtype != torch.uint16 else list(FOLDS)[:4]

    def job(comm: ThreadCommunicator) -> None:
        for op in ops:
            wanted = expected(op, dtype)
            reduction = Reduction(comm, ReduceOp(getattr(ReduceOp, op)), dtype)
            tensor = given(comm.rank, dtype)
            reduction.all_reduce(tensor)
            assert torch.equal(tensor.double(), wanted.double()), op
            tensor = given(comm.rank, dtype)
            reduction.reduce(tensor, 1)
            assert torch.equal(tensor.double(), (wanted if comm.rank == 1 else given(comm.rank, dtype)).double()), op
            output = tensor.new_empty(2)
            reduction.reduce_scatter(output, given(comm.rank, dtype))
            assert torch.equal(output.double(), wanted.double().view(3, 2)[comm.rank]), op

    run_threads(job, WORLD_SIZE, 20)


def test_bool_is_any_or_all() -> None:
    def job(comm: ThreadCommunicator) -> None:
        for op, wanted in (
            ("SUM", [False, True, True]),
            ("PRODUCT", [False, False, True]),
            ("BXOR", [False, True, True]),
        ):
            tensor = torch.tensor([False, comm.rank == 1, True])
            Reduction(comm, ReduceOp(getattr(ReduceOp, op)), torch.bool).all_reduce(tensor)
            assert tensor.tolist() == wanted

    run_threads(job, WORLD_SIZE, 20)


def test_average_and_factor() -> None:
    def job(comm: ThreadCommunicator) -> None:
        tensor = torch.tensor([comm.rank + 2, -comm.rank - 2])
        Reduction(comm, ReduceOp(ReduceOp.AVG), torch.int64).all_reduce(tensor)
        assert tensor.tolist() == [3, -3]
        halves = torch.tensor([comm.rank + 2.0])
        Reduction(comm, dist._make_nccl_premul_sum(0.5), torch.float32).all_reduce(halves)
        assert halves.item() == 4.5

    run_threads(job, WORLD_SIZE, 20)


def test_what_is_not_defined_is_said() -> None:
    comm: Communicator = ThreadCommunicator()
    with pytest.raises(TypeError, match=r"op AVG is not defined for bool"):
        Reduction(comm, ReduceOp(ReduceOp.AVG), torch.bool).all_reduce(torch.ones(1, dtype=torch.bool))


@pytest.mark.parametrize("dtype", [torch.float32, torch.int16, torch.float8_e5m2], ids=str)
def test_blocks_of_any_size(dtype: torch.dtype) -> None:
    def job(comm: ThreadCommunicator) -> None:
        rank, n = comm.rank, comm.world_size
        outputs = [torch.zeros(other + 1).to(dtype) for other in range(n)]
        moves.all_gather(comm, outputs, torch.full((rank + 1,), float(rank + 1)).to(dtype), None)
        assert [output.float().tolist() for output in outputs] == [[1.0], [2.0] * 2, [3.0] * 3]
        sizes = list(range(n))  # none for rank 0
        output = torch.zeros(rank * n, 2).to(dtype)
        input = torch.full((sum(sizes), 2), float(rank + 1)).to(dtype)
        output_sizes, input_sizes = moves.elements(comm, output, [rank] * n), moves.elements(comm, input, sizes)
        comm.all_to_all(output, input, output_sizes=output_sizes, input_sizes=input_sizes)
        assert output.float()[:, 0].tolist() == [float(other + 1) for other in range(n) for _ in range(rank)]

    run_threads(job, WORLD_SIZE, 20)


def test_steps_of_one_operation_stay_together() -> None:
    """Also where another one is behind it, on some ranks sooner than on others."""

    def job(comm: ThreadCommunicator) -> None:
        first, second = torch.ones(2), torch.ones(3)

        def steps() -> None:
            comm.all_reduce(first)
            comm.all_reduce(first)

        work = comm.in_order(steps, async_op=True)
        other = comm.all_reduce(second, async_op=True)
        called: list[Any] = []
        work.on_done(lambda: called.append(comm.all_reduce(torch.ones(1))))
        for pending in (work, other):
            pending.wait()
        comm.barrier()
        assert first.tolist() == [9.0, 9.0]
        assert second.tolist() == [3.0, 3.0, 3.0]

    run_threads(job, WORLD_SIZE, 20)


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ("nonsense", "there is no communicator nonsense; choose one of auto, "),
        ("shm/gloo", "shm takes no transport"),
        ("no_package.Comm", "no_package.Comm cannot be imported"),
        ("serial", "cannot join ranks that torch.distributed has started"),
        (lambda place: None, "has to make a Communicator"),
        (lambda place: ThreadCommunicator(), "rank 0 of 2 of the process group was given ThreadCommunicator"),
    ],
    ids=["name", "transport", "path", "no-place", "factory", "other-ranks"],
)
def test_a_choice_that_does_not_fit_is_refused(choice: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        made(choice, Place(0, 2, dist.HashStore(), "127.0.0.1", 2, 2), 10.0)
