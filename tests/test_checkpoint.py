"""Checkpoint files: whole or absent, the newest whole one is used, and what does not fit is refused everywhere."""

import json
import math
import random
import re
import signal
import subprocess
import sys
from collections import Counter, OrderedDict, defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch

from backends.serial import SerialCommunicator
from backends.thread import run_threads
from minidist.errors import CheckpointError
from minidist.training.checkpoint import Checkpoints, State
from minidist.training.seed import derived_seed, random_state, restore_random_state, seed_everything

WORLDS = [1, 2, 3]
SIGNATURE = {"weight": "float32[3]"}


def state(step, rank=0, numel=3):
    shared = {"weight": torch.full((numel,), float(step)), "nested": {"betas": (0.9, 0.999), "none": None}}
    return State(step, SIGNATURE, shared, {"rank": rank, "random": random_state()})


def on_every_rank(job, world_size):
    """Run ``job(comm)`` on threads and return the message of the CheckpointError that each of them raised."""

    def caught(comm):
        with pytest.raises(CheckpointError) as error:
            job(comm)
        return str(error.value)

    return run_threads(caught, world_size, timeout_s=20)


def names(directory):
    return sorted(path.name for path in Path(directory).iterdir())


@pytest.mark.parametrize("world_size", WORLDS)
def test_every_rank_gets_back_what_is_shared_and_what_is_its_own(tmp_path, world_size):
    def job(comm):
        checkpoints = Checkpoints(tmp_path / "new" / "deep", comm)
        assert checkpoints.load(SIGNATURE) is None
        checkpoints.save(state(7, comm.rank))
        return checkpoints.load(SIGNATURE)

    for rank, loaded in enumerate(run_threads(job, world_size, timeout_s=20)):
        assert (loaded.step, loaded.local["rank"]) == (7, rank)
        assert torch.equal(loaded.shared["weight"], torch.full((3,), 7.0))
        assert loaded.shared["nested"] == {"betas": (0.9, 0.999), "none": None}


def test_file_loads_with_weights_only(tmp_path):
    path = Checkpoints(tmp_path, SerialCommunicator()).save(state(7))
    assert path == tmp_path / "step_00000007.pt"
    assert torch.load(path, weights_only=True)["step"] == 7


def test_the_last_few_files_stay(tmp_path):
    checkpoints = Checkpoints(tmp_path, SerialCommunicator(), keep=2)
    for step in (5, 10, 100, 95):
        checkpoints.save(state(step))
    assert names(tmp_path) == ["step_00000010.pt", "step_00000095.pt", "step_00000100.pt"]
    assert checkpoints.load(SIGNATURE).step == 100


def damage_cut(data):
    return data[: len(data) // 2]


def damage_empty(data):
    return b""


def damage_last_byte(data):
    return data[:-1]


def damage_flip(data):
    place = data.index(b"\x00\x00\x40\x40")  # a 3.0 in the weight
    return data[:place] + b"\x01" + data[place + 1 :]


@pytest.mark.parametrize("damage", [damage_cut, damage_empty, damage_last_byte, damage_flip])
def test_damaged_file_is_passed_over_with_a_warning(tmp_path, damage):
    checkpoints = Checkpoints(tmp_path, SerialCommunicator())
    checkpoints.save(state(2))
    path = checkpoints.save(state(3))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.warns(UserWarning, match=r"step_00000003\.pt is damaged or cut short; using the one before it"):
        assert checkpoints.load(SIGNATURE).step == 2
    checkpoints.save(state(2))
    assert names(tmp_path) == ["step_00000002.pt", "step_00000003.pt"]


def test_any_flipped_byte_is_noticed_or_harmless(tmp_path):
    checkpoints = Checkpoints(tmp_path, SerialCommunicator())
    path = checkpoints.save(state(3))
    data, noticed = path.read_bytes(), 0
    for place in random.Random(0).sample(range(len(data)), 200):
        path.write_bytes(data[:place] + bytes([data[place] ^ 0x55]) + data[place + 1 :])
        try:
            assert torch.equal(checkpoints.load(SIGNATURE).shared["weight"], torch.full((3,), 3.0))
        except CheckpointError:
            noticed += 1
    assert noticed > 50


@pytest.mark.parametrize("world_size", WORLDS)
def test_training_never_begins_again_where_all_checkpoints_are_damaged(tmp_path, world_size):
    for step in (2, 3):
        (tmp_path / f"step_{step:08d}.pt").write_bytes(b"half")
    with pytest.warns(UserWarning, match=r"step_00000003\.pt is damaged or cut short; using the one before it"):
        messages = on_every_rank(lambda comm: Checkpoints(tmp_path, comm).load(SIGNATURE), world_size)
    for message in messages:
        assert "step_00000002.pt is damaged or cut short, and there is no whole checkpoint" in message
        assert "(2 damaged); bring one back, or move them away to begin again" in message


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"lr": np.float64(0.1)}, r"Unsupported global: GLOBAL numpy._core.multiarray.scalar"),
        ({"path": Path("there")}, r"Unsupported global: GLOBAL pathlib"),
        ({"weight": torch.zeros(3)}, "is no checkpoint of minidist: it has no "),
        ([1, 2], "cannot be loaded: "),
    ],
    ids=["numpy", "object", "weights", "list"],
)
def test_whole_file_that_cannot_be_loaded_is_not_called_damaged(tmp_path, content, reason):
    """Nor is it passed over: what it holds may be days of training."""
    checkpoints = Checkpoints(tmp_path, SerialCommunicator())
    checkpoints.save(state(2))
    torch.save(content, tmp_path / "step_00000003.pt")
    for message in on_every_rank(lambda comm: Checkpoints(tmp_path, comm).load(SIGNATURE), 2):
        assert "step_00000003.pt is " in message
        assert "damaged" not in message
        assert re.search(reason, message)


# What can be stored -----------------------------------------------------------------------------


NUMPY_VALUES = [
    *(
        np.array([1.1, 0, 3.7]).astype(dtype)[0]
        for dtype in ("f2", "f4", "f8", "g", ">f8", "c16", "i1", "u4", "i8", "?")
    ),
    np.float64("nan"),
    np.str_("word"),
    np.datetime64("2026-01-02T03:04"),
    np.arange(6.0, dtype=np.float32).reshape(2, 3),
    np.arange(6).reshape(2, 3).T,
    np.zeros((2, 0), np.int16),
    np.array(3.0),
]


@pytest.mark.parametrize("value", NUMPY_VALUES, ids=lambda value: f"{type(value).__name__}-{value.dtype}")
def test_values_of_numpy_come_back_as_they_were(tmp_path, value):
    checkpoints = Checkpoints(tmp_path, SerialCommunicator())
    shared = {"lr": value, "groups": [{"betas": (value, 0.999)}], "state": OrderedDict(x=value)}
    path = checkpoints.save(State(3, SIGNATURE, shared, {"mine": value}))
    loaded = checkpoints.load(SIGNATURE)
    group = loaded.shared["groups"][0]
    assert type(group["betas"]) is tuple
    assert type(loaded.shared["state"]) is OrderedDict
    for got in (loaded.shared["lr"], group["betas"][0], loaded.shared["state"]["x"], loaded.local["mine"]):
        assert type(got) is type(value)
        assert (got.dtype, got.shape, got.tobytes()) == (value.dtype, value.shape, value.tobytes())
    assert torch.load(path, weights_only=True)["step"] == 3
    assert shared["lr"] is value


def test_what_torch_reads_back_comes_back_as_it_was(tmp_path):
    weights = torch.nn.BatchNorm1d(2).state_dict()
    shared = {
        "weights": weights,
        "milestones": Counter({np.int64(30): 2, 80: 1}),
        "set": {1, 2},
        "dtype": [torch.bfloat16, torch.device("cpu"), torch.Size([2]), None, True, 2**70, 1j, b"x", math.inf],
        3: ((), [], {}),
    }
    checkpoints = Checkpoints(tmp_path, SerialCommunicator())
    checkpoints.save(State(3, SIGNATURE, shared, {}))
    loaded = checkpoints.load(SIGNATURE).shared
    assert {key: loaded[key] for key in loaded if key != "weights"} == {
        key: shared[key] for key in shared if key != "weights"
    }
    assert loaded["milestones"][30] == 2
    assert loaded["weights"]._metadata == weights._metadata


class Custom:
    """Something that a user's scheduler keeps."""


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (lambda step: 1.0, "a function, which could not be read back"),
        (Custom(), f"a {Custom.__module__}.Custom, which could not be read back"),
        (np.cos, r"a numpy.ufunc, which could not be read back"),
        (defaultdict(int), "a collections.defaultdict, which could not be read back"),
        (np.array([None]), "a numpy.ndarray, of dtype object"),
        (np.zeros(2, [("a", int)])[0], "a numpy.void, of dtype"),
    ],
    ids=["lambda", "object", "ufunc", "defaultdict", "objects", "record"],
)
@pytest.mark.parametrize("world_size", WORLDS)
def test_what_could_not_be_read_back_is_refused_by_name_before_anything_is_written(tmp_path, value, kind, world_size):
    def save(comm, shared, local):
        Checkpoints(tmp_path, comm).save(State(3, SIGNATURE, shared, local))

    shared = {"optimizer": {"param_groups": [{"lr": 0.1}, {"lr": value}]}}
    for message in on_every_rank(lambda comm: save(comm, shared, {}), world_size):
        assert f"on rank 0, optimizer.param_groups.1.lr is {kind}" in message
    last = world_size - 1
    for message in on_every_rank(lambda comm: save(comm, {}, {"own": value if comm.rank == last else 1}), world_size):
        assert f"on rank {last}, own is {kind}" in message
    assert names(tmp_path) == []


def test_left_over_temporary_is_no_checkpoint_and_goes(tmp_path):
    (tmp_path / "step_00000009.tmp").write_bytes(b"half")
    assert Checkpoints(tmp_path, SerialCommunicator()).load(SIGNATURE) is None
    assert names(tmp_path) == []


@pytest.mark.parametrize("world_size", WORLDS)
def test_directory_that_cannot_be_written(tmp_path, world_size):
    (tmp_path / "file").touch()
    for message in on_every_rank(lambda comm: Checkpoints(tmp_path / "file" / "below", comm), world_size):
        assert "cannot be written (Not a directory); choose another one" in message


@pytest.mark.parametrize("world_size", WORLDS)
def test_failed_write_raises_everywhere_and_leaves_the_older_one(tmp_path, world_size):
    run_threads(lambda comm: Checkpoints(tmp_path, comm).save(state(3)), world_size, timeout_s=20)
    (tmp_path / "step_00000004.pt").mkdir()  # stands in the way of the rename
    for message in on_every_rank(lambda comm: Checkpoints(tmp_path, comm).save(state(4)), world_size):
        assert "step_00000004.pt cannot be written" in message
    assert names(tmp_path) == ["step_00000003.pt", "step_00000004.pt"]


FULL_DISK = """
import resource, sys
sys.path[:0] = [{root!r}]
from backends.thread import run_threads
from minidist.training.checkpoint import Checkpoints
from tests.test_checkpoint import SIGNATURE, on_every_rank, state
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
messages = on_every_rank(lambda comm: Checkpoints({directory!r}, comm).save(state(4, comm.rank, 10**6)), 2)
assert all("File too large" in message and "free space" in message for message in messages), messages
loaded = run_threads(lambda comm: Checkpoints({directory!r}, comm).load(SIGNATURE), 2)
assert [state.step for state in loaded] == [3, 3]
"""


def test_full_disk(tmp_path):
    run_threads(lambda comm: Checkpoints(tmp_path, comm).save(state(3)), 2, timeout_s=20)
    root = str(Path(__file__).parent.parent)
    script = FULL_DISK.format(root=root, limit=2**20, directory=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    assert names(tmp_path) == ["step_00000003.pt"]


@pytest.mark.parametrize("world_size", WORLDS)
def test_checkpoint_of_another_training(tmp_path, world_size):
    run_threads(lambda comm: Checkpoints(tmp_path, comm).save(state(3)), world_size, timeout_s=20)
    other = {"weight": "float32[4]"}
    for message in on_every_rank(lambda comm: Checkpoints(tmp_path, comm).load(other), world_size):
        assert "weight is float32[3] there and float32[4] here" in message
    for message in on_every_rank(lambda comm: Checkpoints(tmp_path, comm).load({}), world_size):
        assert "weight is float32[3] there and missing here" in message


def test_checkpoint_of_another_world_size(tmp_path):
    run_threads(lambda comm: Checkpoints(tmp_path, comm).save(state(3)), 2, timeout_s=20)
    for message in on_every_rank(lambda comm: Checkpoints(tmp_path, comm).load(SIGNATURE), 3):
        assert "is of 2 ranks, this run has 3; start as many ranks as before" in message


@pytest.mark.parametrize("options", [{"every_steps": -1}, {"keep": 0}])
def test_wrong_arguments(tmp_path, options):
    with pytest.raises(ValueError, match="every_steps must be at least 0 and keep at least 1"):
        Checkpoints(tmp_path, SerialCommunicator(), **options)


def draw():
    return random.random(), np.random.rand(), np.random.randn(), torch.rand(3).tolist()


def test_random_state_comes_back():
    np.random.randn()  # one of a pair: the other one is part of the state
    before = random_state()
    first = draw()
    restore_random_state(before)
    assert draw() == first


def test_seeds():
    seed_everything(3, rank=1)
    first = draw()
    seed_everything(3, rank=1)
    assert draw() == first
    seed_everything(3, rank=0)
    assert draw() != first
    assert len({derived_seed(seed, rank) for seed in range(20) for rank in range(20)}) == 400
    with pytest.raises(ValueError, match="seed must be 0 or more, got -1"):
        seed_everything(-1)


# A training that is killed, and goes on -----------------------------------------------------------

JOB = Path(__file__).parent / "killed_training.py"


def train(*runs):
    """Start a training as often as there are ``runs``, and return how each start ended."""
    command = [sys.executable, "-W", "error", str(JOB), json.dumps(runs)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, done.stderr
    codes = json.loads(done.stdout.splitlines()[-1])
    assert 1 not in codes, done.stderr
    return codes


def assert_same_result(directory, other):
    left, right = (torch.load(path / "result.pt", weights_only=True) for path in (directory, other))
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


@pytest.mark.parametrize("loader", ["sharded", "shuffled", "workers"])
def test_killed_and_resumed_equals_never_killed(tmp_path, loader):
    run = {"directory": str(tmp_path / "killed"), "loader": loader}
    codes = train(
        run | {"directory": str(tmp_path / "whole")},
        run | {"kill_in_step": 3},  # before the first checkpoint
        run | {"kill_in_step": 6},
        run | {"cut_write_after_step": 8},
        run | {"kill_before_rename_of_step": 8},
        run | {"kill_after_rename_of_step": 12},
        run | {"cut_newest": True, "kill_in_step": 14},
        run | {"kill_in_step": 15},  # the first of an epoch
        run,
    )
    kill, cut = -signal.SIGKILL, -signal.SIGXFSZ
    assert codes == [0, kill, kill, cut, kill, kill, kill, kill, 0]
    assert_same_result(tmp_path / "killed", tmp_path / "whole")


def test_write_that_is_cut_leaves_the_older_checkpoint_and_a_temporary(tmp_path):
    run = {"directory": str(tmp_path)}
    assert train(run | {"cut_write_after_step": 8}) == [-signal.SIGXFSZ]
    assert names(tmp_path) == ["step_00000004.pt", "step_00000007.pt", "step_00000008.tmp"]
    assert (tmp_path / "step_00000008.tmp").stat().st_size == 3000


def test_sigterm_stops_cleanly_and_the_next_start_goes_on(tmp_path):
    whole, stopped = {"directory": str(tmp_path / "whole")}, {"directory": str(tmp_path / "stopped")}
    codes = train(
        whole,
        stopped | {"sigterm_in_step": 1, "result": "first.pt"},
        stopped | {"sigterm_in_step": 9, "result": "second.pt"},
        stopped,
        stopped,  # finds nothing left to do
    )
    assert codes == [0] * 5
    for name, expected in (("first.pt", True), ("second.pt", True), ("result.pt", False)):
        assert torch.load(tmp_path / "stopped" / name, weights_only=True)["stopped"] == expected
    assert_same_result(tmp_path / "stopped", tmp_path / "whole")
