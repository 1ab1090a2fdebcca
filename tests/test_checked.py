"""Checked communicators: each mistake is named with its lines on every rank, and what is right is not refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hydra import compose, initialize_config_dir

from backends.checked import CheckedCommunicator, described, difference
from backends.ring import RingCommunicator
from backends.thread import ThreadCommunicator, spawn_threads
from experiments.running.build import communicator
from minidist import config
from minidist.communicator import Communicator, ReduceOp, Work
from minidist.ddp import DistributedDataParallel
from minidist.errors import CommTimeoutError, MismatchError
from minidist.gradients.buckets import Bucket
from tests import checked_ranks
from tests.c10d_programs import mismatches, sharded_mismatches
from tests.c10d_worlds import run_program
from tests.checked_ranks import MISTAKES, at
from tests.harness import ROOT, command, run_command, run_forked

SUM = "all_reduce of float32 [3] with op SUM"
CALLS = {
    "shape": ("all_reduce of float32 [2, 2] with op SUM", SUM),
    "dtype": ("all_reduce of int32 [3] with op SUM", SUM),
    "op": ("all_reduce of float32 [3] with op AVG", SUM),
    "root": ("broadcast of float32 [3] with root 1", "broadcast of float32 [3] with root 0"),
    "collective": ("barrier", SUM),
}
"""What rank 1 calls, and what the others call."""


def assert_named(said: dict[str, str]) -> None:
    """Expect each mistake of rank 1 among three to be told as it was."""
    lines = {
        name: (f"{of_1} at {at(f'{name}: rank 1')}", f"{of_others} at {at(f'{name}: others')}")
        for name, (of_1, of_others) in CALLS.items()
    }
    first, second = at("order: first"), at("order: second")
    lines["order"] = (f"{SUM} at {second} and then at {first}", f"{SUM} at {first} and then at {second}")
    assert said.keys() == lines.keys() == MISTAKES.keys()
    for name, (of_1, of_others) in lines.items():
        assert said[name].startswith("MismatchError [rank ")
        whole = said[name].replace(f"{ROOT}/", "")
        assert f": rank 1 calls {of_1}; ranks 0 and 2 call {of_others}; ".replace(f"{ROOT}/", "") in whole


def test_each_mistake_is_named_over_threads() -> None:
    for said in spawn_threads(lambda: checked_ranks.told(ThreadCommunicator(timeout_s=20)), 3):
        assert_named(said)


@pytest.mark.parametrize("spec", ["gloo", "ring/gloo", "shm"])
def test_each_mistake_is_named_over_processes(spec: str, tmp_path: Path) -> None:
    returncode, output = run_forked(
        "tests.checked_ranks", spec, world_size=3, output=tmp_path / "output.txt", limit_s=100
    )
    assert returncode == 0, output
    _assert_all_named(output)


@pytest.mark.slow
def test_each_mistake_is_named_over_mpi(tmp_path: Path) -> None:
    start = command("mpirun", 3, "-m", "tests.checked_ranks", "mpi")
    returncode, output = run_command(start, tmp_path / "output.txt", 100)
    assert returncode == 0, output
    _assert_all_named(output)


def _assert_all_named(output: str) -> None:
    said = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    assert len(said) == 3, output
    for one in said:
        assert_named(one)


def test_the_first_call_that_differs_is_found_among_many() -> None:
    def job() -> str:
        with CheckedCommunicator(ThreadCommunicator(timeout_s=20), every=4) as comm:
            for number in range(7):
                comm.all_reduce(torch.ones(3), ReduceOp.MAX if comm.rank == 1 and number == 5 else ReduceOp.SUM)
            with pytest.raises(MismatchError) as caught:
                comm.barrier()
            return str(caught.value)

    for message in spawn_threads(job, 2):
        assert re.search(r": rank 1 calls .* MAX at .*; rank 0 calls .* SUM at .*\(collective 6 of", message)


def _turns(comm: Communicator) -> None:
    """Each rank in turn calls from a line of its own: all that ranks call from different lines is right."""
    for turn in range(2 * comm.world_size):
        if turn % comm.world_size == comm.rank:
            comm.all_reduce(torch.ones(3))
        else:
            comm.all_reduce(torch.zeros(1, 3))


def _barriers(comm: Communicator) -> None:
    """Ranks take turns in two functions, that have a barrier each."""

    def work() -> None:
        comm.barrier()

    def wait() -> None:
        comm.barrier()

    for turn in range(comm.world_size):
        work() if turn == comm.rank else wait()


def _roots(comm: Communicator) -> None:
    """Each rank sends in one function, and receives in another."""

    def give() -> None:
        comm.broadcast(torch.ones(3), comm.rank)

    def take(src: int) -> None:
        comm.broadcast(torch.ones(3), src)

    for src in range(comm.world_size):
        give() if src == comm.rank else take(src)


def _jobs(comm: Communicator) -> None:
    """A job in another thread runs beside calls of this one."""
    work = comm.in_order(lambda: [comm.barrier(), comm.all_reduce(torch.ones(3))], async_op=True)  # type: ignore[arg-type,return-value]
    comm.all_gather_object("x" * comm.rank)
    work.wait()


def _nothing(comm: Communicator) -> None:
    comm.all_reduce(torch.ones(0))
    comm.all_reduce(torch.ones(1))


def _objects(comm: Communicator) -> None:
    assert comm.broadcast_object({"rank": comm.rank}, 1) == {"rank": 1}
    group = comm.split(comm.rank % 2)
    assert isinstance(group, CheckedCommunicator)
    group.all_reduce(torch.ones(comm.rank % 2 + 1))


@pytest.mark.parametrize("right", [_turns, _barriers, _roots, _jobs, _nothing, _objects])
@pytest.mark.parametrize("every", [1, 2])
def test_what_is_right_is_not_refused(right: Callable[[Communicator], None], every: int) -> None:
    def job() -> None:
        with CheckedCommunicator(RingCommunicator(ThreadCommunicator(timeout_s=20)), every) as comm:
            for _ in range(2):
                right(comm)

    spawn_threads(job, 3)


def test_turns_in_two_functions_are_right_where_it_is_said() -> None:
    def job() -> None:
        with CheckedCommunicator(ThreadCommunicator(timeout_s=20), swaps=False) as comm:
            checked_ranks.order(comm)
            comm.barrier()

    spawn_threads(job, 2)


def test_a_timeout_tells_once_what_the_rank_has_called() -> None:
    def job() -> str:
        with ThreadCommunicator(timeout_s=20) as transport:
            comm = CheckedCommunicator(transport)
            message = ""
            if comm.rank != 1:
                with pytest.raises(CommTimeoutError) as caught:
                    comm.barrier(timeout_s=0.2)
                message = str(caught.value)
            transport.send(torch.ones(1), 1) if transport.rank == 0 else None
            transport.recv(torch.ones(1), 0) if transport.rank == 1 else None
            return message

    said = spawn_threads(job, 2)[0]
    assert re.search(r"has not called barrier #\d+, which rank 0 waits for at \S*test_checked.py:\d+ since", said), said
    assert " calls " not in said


def test_a_job_in_another_thread_is_placed_where_it_was_given() -> None:
    def job() -> str:
        with CheckedCommunicator(ThreadCommunicator(timeout_s=20)) as comm:
            root = comm.rank
            work = comm.in_order(lambda: None, async_op=True)
            work = comm.broadcast(torch.ones(1), root, async_op=True)
            with pytest.raises(MismatchError) as caught:
                work.wait()
            return str(caught.value)

    assert all(message.count("test_checked.py:") == 2 for message in spawn_threads(job, 2))


def test_the_minority_comes_first_and_lines_do_not_make_one() -> None:
    said = difference(["a", "b", "a", "a"], ["at x:1", "at x:2", "at x:3", "at x:1"], 7)
    assert said.startswith("rank 1 calls b at x:2; ranks 0 and 3 call a at x:1, rank 2 calls a at x:3; every rank ")
    assert difference(["a", "b"], ["", ""], 1).startswith("rank 1 calls b; rank 0 calls a;")


def test_calls_that_differ_in_shape_alone_are_the_same() -> None:
    one, other = (described("broadcast", (torch.ones(shape), 0), None) for shape in ((2, 3), (6,)))
    assert one.word == other.word != described("broadcast", (torch.ones(6), 1), None).word


@pytest.mark.parametrize(("checked", "every"), [("true", 1), ("16", 16), ("false", None)])
def test_any_communicator_is_checked_where_its_settings_say_so(checked: str, every: int | None) -> None:
    config.register()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("config", overrides=["comm=ring", "comm/transport=thread", f"comm.checked={checked}"])
    config.check(cfg)

    def job() -> tuple[type[Communicator], int | None]:
        with communicator(cfg.comm) as comm:
            return type(comm), comm.every if isinstance(comm, CheckedCommunicator) else None

    assert spawn_threads(job, 2) == [(RingCommunicator if every is None else CheckedCommunicator, every)] * 2


def test_every_has_to_be_a_number_of_collectives() -> None:
    with pytest.raises(ValueError, match="every must be at least 1 collective, got 0"):
        CheckedCommunicator(ThreadCommunicator(), every=0)


def test_what_meets_the_gradients_of_a_bucket_is_told_of_which_layers_they_are() -> None:
    def job() -> str:
        with CheckedCommunicator(ThreadCommunicator(timeout_s=20)) as comm:
            model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
            ddp = DistributedDataParallel(model, comm, bucket_cap_mb=20 / 2**20)
            ddp(torch.ones(2, 4)).sum().backward()
            assert comm.purpose == ""
            loss = ddp(torch.ones(2, 4)).sum()
            with pytest.raises(MismatchError) as caught:
                comm.all_reduce(torch.ones(3)) if comm.rank == 1 else loss.backward()
            return str(caught.value)

    here = r"at .*test_checked.py:\d+;"
    of_0 = r"all_reduce of float32 \[8\] with op SUM for bucket 0 of DDP \(1.bias..1.weight\)"
    for message in spawn_threads(job, 2):
        assert re.search(rf": rank 1 calls {re.escape(SUM)} {here} rank 0 calls {of_0} {here} every", message), message


def test_a_hook_that_raises_leaves_no_word_of_its_bucket_behind() -> None:
    def fail(bucket: Bucket, comm: Communicator) -> Work:
        raise ArithmeticError("on purpose")

    with ThreadCommunicator() as comm:
        ddp = DistributedDataParallel(torch.nn.Linear(4, 3), comm, hook=fail)
        with pytest.raises(ArithmeticError, match="on purpose"):
            ddp(torch.ones(2, 4)).sum().backward()
        assert comm.purpose == ""


IN_STOCK = {
    "shape": ("broadcast of float32 [12] with root 0 <shape>", "broadcast of float32 [11] with root 0 <shape>"),
    "dtype": ("all_reduce of int64 [1] with op SUM <dtype>", "all_reduce of float32 [1] with op SUM <dtype>"),
    "op": ("all_reduce of float32 [3] with op MAX <op>", "all_reduce of float32 [3] with op SUM <op>"),
    "order": ("all_reduce of float32 [10] with op SUM <order>", "all_reduce of float32 [1] with op SUM <order>"),
    "collective": ("barrier <collective: rank 1>", f"{SUM} <collective: rank 0>"),
}
"""What rank 1 calls, and rank 0, with the marks of their lines."""
IN_SHARDED = {
    "shape": ("all_gather of float32 [15] <shape>", "all_gather of float32 [10] <shape>"),
    "dtype": ("all_gather of bfloat16 [10] <dtype>", "all_gather of float32 [10] <dtype>"),
    "op": ("reduce_scatter of float32 [10] with op SUM <op>", "reduce_scatter of float32 [10] with op AVG <op>"),
    "order": (
        "all_gather of float32 [10] <order: second> and then <order: first>",
        "all_gather of float32 [10] <order: first> and then <order: second>",
    ),
    "collective": (
        "reduce_scatter of float32 [10] with op AVG <collective: rank 1>",
        "all_reduce of float32 [] with op SUM <collective: rank 0>",
    ),
}
"""The same of a model that FSDP2 shards."""


@pytest.mark.parametrize(
    ("program", "calls", "alone"),
    [
        (mismatches, IN_STOCK, "all_reduce"),
        pytest.param(sharded_mismatches, IN_SHARDED, "all_gather", marks=pytest.mark.slow),
    ],
    ids=["ddp", "fsdp2"],
)
def test_the_six_mistakes_are_named_in_stock_programs(
    program: ModuleType, calls: dict[str, tuple[str, str]], alone: str, tmp_path: Path
) -> None:
    def with_lines(text: str) -> str:
        text = re.sub("<(.*?)>", lambda mark: f"at {at(mark[1], str(program.__file__))}", text)
        return text.replace(f"{ROOT}/", "")

    ranks = run_program(f"{program.__name__.rpartition('.')[2]}.all_six", "checked/gloo", 2, tmp_path)
    for said in ranks:
        for name, (of_1, of_0) in calls.items():
            assert said[name].startswith("MismatchError: [rank ")
            named = with_lines(f": rank 1 calls {of_1}; rank 0 calls {of_0}; ")
            assert named in said[name].replace(f"{ROOT}/", ""), said[name]
    missed = with_lines("<missing rank>")
    assert re.search(
        rf"CommTimeoutError: .*; rank 1 is at \S*mismatches.py:\d+ and has not called {alone} #\d+, "
        rf"which rank 0 waits for {re.escape(missed)} since",
        ranks[0]["missing_rank"].replace(f"{ROOT}/", ""),
    ), ranks[0]["missing_rank"]


def test_a_mistake_in_a_stock_program_is_named_with_its_line(tmp_path: Path) -> None:
    """Rank 1 goes on to the backward pass of torch's DDP."""
    here = r"at \S*tests/c10d_programs/faults.py:"
    for message, line_of_0, line_of_1 in run_program("faults.different_calls", "checked/gloo", 2, tmp_path):
        of_1 = rf"rank 1 calls all_reduce of float32 \[\d+\] with op SUM {here}{line_of_1}; "
        assert re.search(rf"{of_1}rank 0 calls {re.escape(SUM)} {here}{line_of_0}; ", message), message
