"""The same steps as torch's own DDP takes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import harness


@pytest.mark.parametrize(
    ("communicator", "world_size"),
    [
        ("backends.torch_dist.GlooCommunicator", 2),
        pytest.param("tests.table.ring_over_gloo", 3, marks=pytest.mark.slow),
        pytest.param("backends.shm.ShmCommunicator", 2, marks=pytest.mark.slow),
    ],
)
def test_same_parameters_as_torch_ddp(communicator: str, world_size: int, tmp_path: Path) -> None:
    arguments, output_file = (communicator, str(tmp_path / "rendezvous")), tmp_path / "output.txt"
    returncode, output = harness.run_forked(
        "tests.against_torch_ddp", *arguments, world_size=world_size, output=output_file, limit_s=100
    )
    assert returncode == 0, output
