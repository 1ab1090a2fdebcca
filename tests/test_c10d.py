"""Stock programs of torch.distributed on minidist: each is run unchanged, and compared with native Gloo."""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.c10d_worlds import run_program
from tests.harness import ROOT, command, run_command

World = Callable[..., list[Any]]
HELLO = """
import sys
import torch
import torch.distributed as dist

assert "minidist" in sys.modules if len(sys.argv) > 2 else "minidist" not in sys.modules
dist.init_process_group(sys.argv[1])
tensor = torch.ones(3)
dist.all_reduce(tensor)
name = type(dist.group.WORLD._get_backend(torch.device("cpu"))).__name__
sys.stdout.write(f"sum {tensor.tolist()} {name}\\n")
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Return what runs a program on a communicator, or on native Gloo, once; see `run_program`."""

    @functools.cache
    def run(program: str, spec: str, world_size: int = 2) -> list[Any]:
        return run_program(program, spec, world_size, tmp_path_factory.mktemp("world"))

    return run


def same(ours: list[list[Tensor]], theirs: list[list[Tensor]]) -> bool:
    """Whether all ranks have the same bits."""
    pairs = [(a, b) for mine, other in zip(ours, theirs, strict=True) for a, b in zip(mine, other, strict=True)]
    return bool(pairs) and all(torch.equal(a, b) for a, b in pairs)


SPECS = ["shm", *(pytest.param(spec, marks=pytest.mark.slow) for spec in ("ring/gloo", "checked/gloo"))]
OF_2_RANKS = [
    "training.zero_redundancy",
    "training.power_sgd",
    "training.half_precision",
    "training.uneven",
    "training.checkpoint",
    "parallel.fsdp1",
    "parallel.fsdp2",
    "parallel.tensor_parallel",
    "parallel.redistributed",
    "parallel.pipeline",
    "functional.functional",
    "functional.compiled",
]
OF_4_RANKS = [
    "parallel.hybrid",
    "groups.subsets",
    "groups.by_members",
    "groups.split",
    "groups.interleaved",
]


@pytest.mark.parametrize("spec", ["shm", "ring/gloo"])
def test_stock_ddp_trains_as_over_gloo(world: World, spec: str) -> None:
    assert same(world("training.stock_ddp", spec), world("training.stock_ddp", "torch"))


def test_stock_ddp_over_a_ring_trains_as_our_own_over_it(world: World) -> None:
    assert same(world("training.stock_ddp", "ring/gloo"), world("training.own_ddp", "ring/gloo"))


@pytest.mark.slow
def test_stock_ddp_over_a_ring_of_4_trains_as_our_own_over_it(world: World) -> None:
    """Not on 3 ranks, where torch multiplies by a third and we divide by 3."""
    assert same(world("training.stock_ddp", "ring/gloo", 4), world("training.own_ddp", "ring/gloo", 4))


def test_our_own_ddp_trains_inside_of_a_program_that_runs_on_gloo(world: World) -> None:
    assert same(world("training.borrowed_ddp", "torch"), world("training.stock_ddp", "torch"))


def test_a_borrowed_group_can_be_destroyed(world: World) -> None:
    """What borrows it must not keep its threads, which would meet the end of the interpreter."""
    for threads, said in world("training.borrowed_and_destroyed", "torch"):
        assert threads == []
        assert "its process group was destroyed; call from_process_group on a new one" in said


def test_a_borrowed_group_has_the_bitwise_operations(world: World) -> None:
    for found in world("training.borrowed_bitwise", "torch"):
        assert [each.tolist() for each in found[:3]] == [[12, 5, 0], [12, 5, 7], [0, 0, 7]]
        assert [each.tolist() for each in found[3:]] == [
            [True, False, False],
            [True, True, False],
            [False, True, False],
        ]


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("program", OF_2_RANKS)
def test_a_stock_program_computes_as_over_gloo(world: World, program: str, spec: str) -> None:
    assert same(world(program, spec), world(program, "torch"))


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("program", OF_4_RANKS)
def test_a_stock_program_of_4_ranks_computes_as_over_gloo(world: World, program: str, spec: str) -> None:
    assert same(world(program, spec, 4), world(program, "torch", 4))


def test_a_receive_without_src_takes_what_comes(world: World) -> None:
    assert same(world("messages.from_any", "ring/shm", 3), world("messages.from_any", "torch", 3))


def test_a_receive_without_src_is_refused_by_a_sentence_where_none_can(world: World) -> None:
    for answer in world("messages.from_any_where_none_can", "ring/gloo"):
        assert "irecv: src is None, but RingCommunicator cannot receive from any source; name the rank" in answer


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("spec", ["shm", "ring/gloo"])
@pytest.mark.parametrize(("program", "world_size"), [("functional.inductor", 2), ("parallel.transformer", 4)])
def test_a_long_program_computes_as_over_gloo(world: World, program: str, world_size: int, spec: str) -> None:
    assert same(world(program, spec, world_size), world(program, "torch", world_size))


@pytest.mark.parametrize(
    ("launcher", "arguments", "environment"),
    [
        pytest.param("torchrun", ["{script}", "minidist"], {}, marks=pytest.mark.slow),  # a page's command does it too
        ("torchrun", ["-m", "minidist.c10d", "--as", "gloo", "{script}", "gloo", "x"], {}),
        ("mpirun", ["-m", "minidist.c10d", "{script}", "minidist", "x"], {"MINIDIST_COMM": "ring/mpi"}),
    ],
    ids=["entry-point", "as-gloo", "mpirun"],
)
def test_a_script_runs_on_it(tmp_path: Path, launcher: str, arguments: list[str], environment: dict[str, str]) -> None:
    script = tmp_path / "script.py"
    script.write_text(HELLO)
    started = command(launcher, 2, *(argument.format(script=script) for argument in arguments))
    environment = {"PYTHONPATH": str(ROOT), **environment}
    returncode, output = run_command(started, tmp_path / "output.txt", 100, environment)
    assert returncode == 0, output
    assert output.count("sum [2.0, 2.0, 2.0] MinidistBackend") == 2, output


def test_a_broken_minidist_does_not_break_torch(tmp_path: Path) -> None:
    (tmp_path / "minidist").mkdir()
    (tmp_path / "minidist" / "__init__.py").write_text("raise ImportError('broken')")
    code = "import torch, torch.distributed, sys; assert 'minidist' not in sys.modules"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, cwd=tmp_path, timeout=60)


PASSES = "all_gather,all_reduce,all_to_all,barrier,broadcast,gather,reduce,scatter,new_subgroups,send_recv_nccl,batch"
LEFT_OUT = {
    "test_irecv": "is_completed",
    "test_isend": "is_completed",
    "test_isend_autograd_profiler": "is_completed",
    "test_isend_torch_profiler": "is_completed",
    "test_send_recv_any_source": "dist.recv asks the C++ half for the source",
    "test_send_recv_any_source_autograd_profiler": "dist.recv asks the C++ half for the source",
    "test_send_recv_any_source_torch_profiler": "dist.recv asks the C++ half for the source",
    "test_ddp_logging_data_cpu": "the logged name is custom",
}
"""What passes over native Gloo and not here, with the reason."""


def _suite(tmp_path: Path, limit_s: float, *options: str) -> dict[str, str]:
    """Return what came of torch's tests, by their names."""
    arguments = [sys.executable, "-m", "tests.torch_suite", *options]
    returncode, output = run_command(arguments, tmp_path / "output.txt", limit_s)
    assert returncode == 0, output[-8000:]
    lines = [line.split() for line in output.splitlines() if line.startswith(("passed ", "failed "))]
    return {words[3]: words[0] for words in lines}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_torch_own_tests_of_collectives_pass(tmp_path: Path) -> None:
    found = _suite(tmp_path, 850, "--comm", "shm", "-k", PASSES)
    assert {name for name, status in found.items() if status == "failed"} == set()
    assert len(found) >= 40


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("spec", ["shm", "ring/gloo"])
def test_all_of_torch_own_tests_pass_that_pass_over_gloo(tmp_path: Path, spec: str) -> None:
    found = _suite(tmp_path, 1400, "--as", "gloo", "--comm", spec)
    assert {name for name, status in found.items() if status == "failed"} <= LEFT_OUT.keys()


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("spec", ["shm", "ring/gloo"])
def test_torch_own_tests_of_ddp_beneath_distributed_autograd_pass(tmp_path: Path, spec: str) -> None:
    arguments = [sys.executable, "-m", "tests.torch_rpc_suite"]
    returncode, output = run_command(arguments, tmp_path / "output.txt", 280, {"MINIDIST_COMM": spec})
    assert returncode == 0, output[-8000:]
    assert len(re.findall("^passed ", output, re.MULTILINE)) == 8, output[-8000:]
    assert not re.search("^failed ", output, re.MULTILINE), output[-8000:]
