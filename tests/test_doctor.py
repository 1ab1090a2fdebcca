"""What ranks write down of what they recorded, and what the doctor says of it; of torch's own dumps too."""

from __future__ import annotations

import json
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from backends.serial import SerialCommunicator
from backends.thread import run_threads
from minidist.communicator import Communicator
from minidist.contract.records import RecordsOnSignal, write
from minidist.contract.standing import DONE, WAITING
from minidist.doctor.group import Group, grouped
from minidist.doctor.reading import files_in, read
from minidist.errors import CommError, CommTimeoutError, ConfigError
from minidist.training.stop import StopSignal
from tests.harness import ROOT, run_forked

LIMIT_S = 60.0


def groups_of(folder: Path) -> list[Group]:
    return grouped([told for path in files_in([str(folder)]) for told in read(path)])


def hang(folder: Path, writes: tuple[int, ...] = (0, 1, 2)) -> None:
    """Let rank 1 not come, and write what the ranks of ``writes`` have recorded."""
    given_up = [threading.Event() for _ in range(3)]

    def job(comm: Communicator) -> None:
        comm.recorder.folder = str(folder) if comm.rank in writes else ""
        comm.all_reduce(torch.ones(3))
        if comm.rank == 1:
            comm.recorder.step = 17
            assert all(given_up[rank].wait(LIMIT_S) for rank in (0, 2))
            write("the test asks", [1])
            return
        with pytest.raises(CommTimeoutError):
            comm.all_reduce(torch.ones(4), timeout_s=0.5)
        given_up[comm.rank].set()

    run_threads(job, 3, timeout_s=LIMIT_S)


def test_each_rank_writes_a_file_and_the_doctor_says_who_is_missing(tmp_path: Path) -> None:
    hang(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"records-rank{rank}.json" for rank in range(3)]
    whole = json.loads((tmp_path / "records-rank0.json").read_text())
    assert "CommTimeoutError" not in whole["why"]
    assert "[rank 0/3] all_reduce: no answer from rank " in whole["why"]
    (group,) = groups_of(tmp_path)
    assert (group.name, group.ranks, [*group.standings]) == ("ThreadCommunicator", (0, 1, 2), [0, 1, 2])
    (sentence,) = group.diagnosis()
    assert re.search(
        r"rank 1 is in step 17 \(tests/test_doctor.py:\d+\) and has not called all_reduce #2, which", sentence
    )
    assert [call.state for call in group.standings[1].calls] == [DONE]


def test_one_file_tells_what_the_others_had_said(tmp_path: Path) -> None:
    hang(tmp_path, writes=(2,))
    (group,) = groups_of(tmp_path)
    assert sorted(group.standings) == [0, 1, 2]
    assert "has not called all_reduce #2, which ranks 0 and 2 wait for" in group.diagnosis()[0]


def test_a_rank_without_a_file_is_named(tmp_path: Path) -> None:
    hang(tmp_path)
    (tmp_path / "records-rank1.json").unlink()
    for rank in (0, 2):
        path = tmp_path / f"records-rank{rank}.json"
        whole = json.loads(path.read_text())
        whole["communicators"][0]["heard"] = []
        path.write_text(json.dumps(whole))
    (group,) = groups_of(tmp_path)
    assert group.diagnosis()[-1] == "there is no record of rank 1: it may have been killed"


def test_parts_of_the_ranks_are_called_as_in_the_world(tmp_path: Path) -> None:
    def job(comm: Communicator) -> None:
        comm.recorder.folder = str(tmp_path)
        part = comm.split(0 if comm.rank > 0 else 1)
        assert part is not None
        part.barrier()
        comm.barrier()
        write("the test asks", [comm.rank])
        comm.barrier()

    run_threads(job, 3, timeout_s=LIMIT_S)
    parts = {group.ranks: group for group in groups_of(tmp_path) if group.ranks != (0, 1, 2)}
    assert {*parts} == {(0,), (1, 2)}
    assert [*parts[1, 2].standings] == [1, 2]


def test_where_it_cannot_write_the_error_is_still_the_news(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with SerialCommunicator() as comm:
        comm.recorder.folder = str(tmp_path / "file")
        with pytest.warns(UserWarning, match=r"\[rank 0\] cannot write .*file/records-rank0.json"):
            assert write("the test asks", [0]) == []


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("records-rank0.json", b"{}", "its format is None"),
        ("records-rank0.json", b"{", "Expecting property name"),
        ("trace_rank0", b"hello", "no pickle"),
        ("trace_rank0", pickle.dumps([1]), "no entries in it"),
        ("trace_rank0", pickle.dumps(os.getcwd), "it is a pickle that calls posix.getcwd, and so no dump"),
        ("trace", pickle.dumps({"entries": [], "pg_config": {}}), "its name does not end in the number of its rank"),
    ],
)
def test_what_it_cannot_read_is_named(name: str, data: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=rf"^{re.escape(str(path))}: is neither .*: {re.escape(message)}"):
        read(path)


def test_the_command(tmp_path: Path) -> None:
    hang(tmp_path)
    for given, code, expected in (
        (tmp_path, 0, "has not called all_reduce #2, which ranks 0 and 2 wait for"),
        (tmp_path / "nowhere", 2, "doctor: .*nowhere: cannot be read: No such file"),
    ):
        command = [sys.executable, "-m", "minidist.doctor", str(given)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, cwd=ROOT, check=False)
        assert done.returncode == code
        assert re.search(expected, done.stdout + done.stderr), done
        assert "Traceback" not in done.stderr


def test_dumps_of_torch(tmp_path: Path) -> None:
    """Made by torch itself: rank 0 waits in three, of which rank 1 has called none."""
    returncode, output = run_forked(
        "tests.flight_recorder_ranks",
        str(tmp_path),
        world_size=2,
        output=tmp_path / "output.txt",
        limit_s=LIMIT_S,
        environment={"TORCH_FR_BUFFER_SIZE": "100"},
    )
    assert returncode == 0, output
    (group,) = grouped([told for rank in range(2) for told in read(tmp_path / f"trace_rank{rank}")])
    assert group.ranks == (0, 1)
    waits_in = group.standings[0].waits_in
    assert waits_in is not None
    assert (waits_in.state, waits_in.what.partition(" ")[0]) == (WAITING, "broadcast")
    assert re.search(r"flight_recorder_ranks.py:\d+$", waits_in.where)
    (sentence,) = group.diagnosis()
    assert "rank 1 is in no code of the user and has not called broadcast #2, which rank 0 waits for" in sentence
    assert any("all_reduce of 5 float" in line for line in group.table(10))


# Signals ---------------------------------------------------------------------------------------


def test_a_signal_has_records_written_and_then_does_what_it_did(tmp_path: Path) -> None:
    came: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda signum, frame: came.append(signum))
    try:
        with SerialCommunicator() as comm, RecordsOnSignal():
            comm.recorder.folder = str(tmp_path)
            os.kill(os.getpid(), signal.SIGTERM)
            wait_for(tmp_path / "records-rank0.json")
        assert came == [signal.SIGTERM]
        os.kill(os.getpid(), signal.SIGTERM)
        assert came == [signal.SIGTERM] * 2
    finally:
        signal.signal(signal.SIGTERM, before)


def wait_for(path: Path) -> None:
    seen = threading.Event()
    for _ in range(int(LIMIT_S / 0.01)):
        if path.exists():
            return
        seen.wait(0.01)
    raise AssertionError(f"{path} does not come")


def test_sigusr1_ends_nothing_and_a_fork_writes_nothing(tmp_path: Path) -> None:
    with SerialCommunicator() as comm, RecordsOnSignal():
        comm.recorder.folder = str(tmp_path)
        pid = os.fork()
        if pid == 0:
            os.kill(os.getpid(), signal.SIGUSR1)
            os._exit(7)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
        assert not list(tmp_path.iterdir())
        os.kill(os.getpid(), signal.SIGUSR1)
        wait_for(tmp_path / "records-rank0.json")


def test_a_stop_of_training_has_records_written(tmp_path: Path) -> None:
    stop = StopSignal()
    with SerialCommunicator() as comm, stop:
        comm.recorder.folder = str(tmp_path)
        os.kill(os.getpid(), signal.SIGTERM)
        wait_for(tmp_path / "records-rank0.json")
    assert stop.received


def test_the_environment_says_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINIDIST_RECORDS", str(tmp_path / "new"))

    def job(comm: Communicator) -> None:
        if comm.rank == 0:
            with pytest.raises(CommError):
                comm.recv(torch.ones(3), 1, timeout_s=0.2)

    run_threads(job, 2, timeout_s=LIMIT_S)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["records-rank0.json"]
