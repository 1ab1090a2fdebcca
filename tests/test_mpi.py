"""What only MPI can get wrong: who initialises it, who finalises it, and what its ranks tell each other."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.harness import command, run_command

HEAD = """
import os, sys, time
import torch
from minidist.errors import BackendUnavailableError, MismatchError, PeerLostError
from backends.mpi import MpiCommunicator
from backends.mpi.process import notices
"""
IMPORTS = {
    "minidist first": HEAD,
    "mpi4py first": "from mpi4py import MPI\n" + HEAD,
    "mpi4py first, by hand": "import mpi4py\nmpi4py.rc.initialize = False\nfrom mpi4py import MPI\n"
    "MPI.Init_thread(MPI.THREAD_MULTIPLE)\n" + HEAD,
}


def run_program(text: str, tmp_path: Path) -> tuple[int | None, str]:
    """Run a program on two ranks."""
    (tmp_path / "program.py").write_text(text)
    mpirun = command("mpirun", 2, str(tmp_path / "program.py"))
    return run_command(mpirun, tmp_path / "output.txt", 60, {"PYTHONPATH": str(Path(__file__).parent.parent)})


RAISES = """
comm = MpiCommunicator(timeout_s=50)
comm.barrier()
if comm.rank == 1:
    raise KeyError("no such thing")
started = time.monotonic()
try:
    comm.all_reduce(torch.ones(4))
except PeerLostError as error:
    print("noticed" if time.monotonic() - started < 15 else "late", error, flush=True)
"""


@pytest.mark.parametrize(
    "imports", ["minidist first", "mpi4py first", pytest.param("mpi4py first, by hand", marks=pytest.mark.slow)]
)
def test_a_rank_that_raises_is_noticed_whoever_initialised_mpi(imports: str, tmp_path: Path) -> None:
    returncode, output = run_program(IMPORTS[imports] + RAISES, tmp_path)
    assert "noticed [rank 0/2] all_reduce: rank 1 is gone: it ended without closing its communicator" in output
    assert returncode not in (0, None), output


WORKS = """
with MpiCommunicator(timeout_s=50) as comm:
    data = torch.ones(3)
    comm.all_reduce(data)
    sys.stdout.write(f"sum {data.sum().item()}\\n")
"""


@pytest.mark.parametrize(
    ("imports", "end"),
    [
        ("minidist first", "comm = MpiCommunicator()"),
        pytest.param("mpi4py first", "", marks=pytest.mark.slow),
        pytest.param("mpi4py first", "MPI.Finalize()", marks=pytest.mark.slow),
        ("mpi4py first, by hand", "MPI.Finalize()"),
    ],
)
def test_mpi_is_finalised_once_whoever_initialised_it(imports: str, end: str, tmp_path: Path) -> None:
    if end.startswith("MPI"):
        end = f"from mpi4py import MPI\n{end}\nprint('finalised')"
    returncode, output = run_program(IMPORTS[imports] + WORKS + end, tmp_path)
    assert returncode == 0, output
    assert output.count("sum 6.0") == 2
    assert "rror" not in output


def test_mpi_without_threads_is_refused(tmp_path: Path) -> None:
    head = "import mpi4py\nmpi4py.rc.thread_level = 'funneled'\nfrom mpi4py import MPI\n" + HEAD
    returncode, output = run_program(
        head + "try:\n    MpiCommunicator()\nexcept BackendUnavailableError as error:\n    print(error)\n", tmp_path
    )
    assert returncode == 0, output
    assert output.count("leave mpi4py.rc.thread_level at 'multiple'") == 2


FORKS = """
comm = MpiCommunicator(timeout_s=20)
comm.barrier()
child = os.fork()
if child == 0:
    sys.exit(7)  # runs what was registered for the end of the process
sys.stdout.write(f"child {os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}\\n")
comm.barrier()
comm.close()
"""


def test_a_forked_child_says_no_farewell(tmp_path: Path) -> None:
    returncode, output = run_program(HEAD + FORKS, tmp_path)
    assert returncode == 0, output
    assert output.count("child 7") == 2


LEAVES = """
with MpiCommunicator(timeout_s=20) as first:
    first.barrier()
    for _ in range(20):
        with MpiCommunicator(timeout_s=20) as comm:
            comm.barrier()
    first.barrier()
    first._notices.needed(first._key, None, 1, 0)  # hears what is still on its way
    first.barrier()
    sys.stdout.write(f"known {len(notices()._news)}\\n")
"""


def test_nothing_is_kept_of_communicators_that_are_closed(tmp_path: Path) -> None:
    returncode, output = run_program(HEAD + LEAVES, tmp_path)
    assert returncode == 0, output
    assert output.count("known 1\n") == 2, output


NAMED = """
from pathlib import Path
with MpiCommunicator(timeout_s=50) as comm:
    comm.barrier()
    mapped = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "/dev/shm/" in line}
    print(f"named: {[name for name in mapped if Path(name).is_file()]}", flush=True)
"""


def test_no_name_in_shared_memory_is_left_to_ranks_that_may_be_killed(tmp_path: Path) -> None:
    returncode, output = run_program(HEAD + NAMED, tmp_path)
    assert returncode == 0, output
    assert output.count("named: []") == 2, output
