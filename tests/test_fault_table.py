"""Cells of the table of faults: each ends on every rank in time, and names what it should; see `tests.fault_table`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fault_ranks import FAULTS
from tests.fault_table import COMMS, LIMIT_S, NOT_THERE, suffer

BY_DEFAULT = {("thread", "order"), ("shm", "kill"), ("gloo", "sizes"), ("ring", "raise"), ("thread", "full disk")}
BY_DEFAULT |= {("shm", "two threads"), ("mpi", "missing rank")}
CELLS = [
    pytest.param(comm, fault, marks=[] if (comm, fault) in BY_DEFAULT else pytest.mark.slow)
    for comm in COMMS
    for fault in FAULTS
    if fault not in NOT_THERE.get(comm, {})
]


@pytest.mark.parametrize(("comm", "fault"), CELLS)
def test_a_fault_ends_in_time_and_is_named(comm: str, fault: str, tmp_path: Path) -> None:
    cell = suffer(comm, fault, tmp_path)
    said = "\n".join(f"rank {rank}: {each}" for rank, each in cell.said.items())
    assert cell.ended_s is not None, said
    assert cell.ended_s < LIMIT_S, f"{cell.ended_s:.1f} s\n{said}"
    assert cell.is_well, f"{cell}\n{said}"
