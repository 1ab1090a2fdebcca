"""Records when something is wrong with them: none of it may hide what happened, or stop who listens."""

from __future__ import annotations

import json
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from backends.processes.inquiry import Inquiry
from backends.serial import SerialCommunicator
from backends.thread import ThreadCommunicator, run_threads, spawn_threads
from minidist.communicator import Communicator
from minidist.contract import records
from minidist.contract.standing import Standing
from minidist.doctor.reading import read
from minidist.errors import CommTimeoutError, ConfigError


def alone(given_up: threading.Event, comm: Communicator) -> str:
    """Return what rank 0 is told when rank 1 does not come, but stays."""
    if comm.rank == 1:
        assert given_up.wait(60)
        return ""
    try:
        with pytest.raises(CommTimeoutError) as error:
            comm.all_reduce(torch.ones(3), timeout_s=0.5)
        with pytest.raises(CommTimeoutError, match="unusable since"):
            comm.all_reduce(torch.ones(3))
    finally:
        given_up.set()
    return str(error.value)


def test_a_step_may_be_a_number_of_numpy() -> None:
    given_up = threading.Event()

    def job(comm: Communicator) -> str:
        comm.recorder.step = np.int64(17)  # type: ignore[assignment]
        return alone(given_up, comm)

    told = run_threads(job, 2, timeout_s=30)[0]
    assert "has not called all_reduce #1" in told


@pytest.mark.parametrize("folder", ["a file", "nul"])
def test_a_record_that_cannot_be_written_hides_no_error(folder: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    where = str(tmp_path / "file" / "beneath") if folder == "a file" else "a\0b"

    given_up = threading.Event()

    def job(comm: Communicator) -> str:
        comm.recorder.folder = where
        return alone(given_up, comm)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "has not called all_reduce #1" in run_threads(job, 2, timeout_s=30)[0]


def test_the_rank_that_raised_has_a_record(tmp_path: Path) -> None:
    def job() -> None:
        comm = ThreadCommunicator(timeout_s=20)
        comm.recorder.folder = str(tmp_path)
        if comm.rank == 0:
            return comm.close()
        with pytest.raises(ValueError, match="boom"), comm:
            raise ValueError("boom")

    spawn_threads(job, 2)
    whole = json.loads((tmp_path / "records-rank1.json").read_text())
    assert whole["why"] == "ValueError: boom"
    (told,) = read(tmp_path / "records-rank1.json")
    assert told.standing.raised.startswith("ValueError: boom at ")


def test_who_cannot_tell_how_far_it_has_come_answers_all_the_same() -> None:
    def broken(channel: int) -> Standing | None:
        raise TypeError("of no use")

    sent = []
    inquiry = Inquiry(1, broken, lambda message, came_from: sent.append(message))
    inquiry.take({"rank": 0, "channel": 0, "asks": True}, 0)
    assert sent[-1] == {"rank": 1, "channel": 0, "standing": None}


def test_threads_that_write_at_once_tear_nothing(tmp_path: Path) -> None:
    comm = SerialCommunicator()
    comm.recorder.folder = str(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        threads = [
            threading.Thread(target=lambda: [records.write("at once", [0]) for _ in range(50)]) for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            for path in tmp_path.glob("*.json"):
                assert json.loads(path.read_text())["why"] == "at once"
    comm.close()
    assert [path.name for path in tmp_path.iterdir()] == ["records-rank0.json"]


def test_a_communicator_that_was_aborted_is_not_asked(tmp_path: Path) -> None:
    def job() -> None:
        comm = ThreadCommunicator(timeout_s=20)
        comm.recorder.folder = str(tmp_path / str(comm.rank))
        comm.abort("not needed")
        records.ask_and_write("SIGUSR1")
        assert comm.recorder.heard == {}

    spawn_threads(job, 2)


def test_a_peer_of_a_group_is_called_as_the_world_calls_it(tmp_path: Path) -> None:
    call = {"number": None, "what": "irecv of 4 float32 from rank 1 with tag 0", "where": "", "state": "waiting"}
    standing = {"rank": 0, "num_started": 0, "calls": [{**call, "seconds": 3.0, "took": None, "peer": 1}]}
    standing |= {"inside": "", "where": "", "step": None, "raised": ""}
    section = {"name": "Group", "ranks": [1, 2], "standing": standing, "heard": []}
    path = tmp_path / "records-rank1.json"
    path.write_text(json.dumps({"format": records.FORMAT, "communicators": [section]}))
    (told,) = read(path)
    assert (told.standing.rank, told.standing.calls[0].peer) == (1, 2)
    assert told.standing.calls[0].what == "irecv of 4 float32 from rank 2 with tag 0"


@pytest.mark.parametrize("data", [b"{" + b'"a": [' * 100_000, b"\x80\x04\x8c\xff\xff\xff\xff\xff\xff\xff\x7f."])
def test_an_odd_file_is_a_sentence(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "odd"
    path.write_bytes(data)
    with pytest.raises(ConfigError, match="is neither a record of minidist"):
        read(path)
