"""What only shared memory can get wrong: the memory itself, and who can reach it."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from backends.shm.communicator import ShmCommunicator
from backends.shm.heap import ALIGNMENT, OwnHeap, attach, available_bytes
from backends.shm.mailbox import NUM_SLOTS, SLOT_BYTES, Mailbox, Message, num_words
from minidist.errors import BackendUnavailableError, CommError, MismatchError
from tests.harness import run_forked
from tests.shm_ranks import footprint

KERNELS = ("torch", "compiled")
on_both_paths = pytest.mark.parametrize("kernels", KERNELS)


def run_ranks(what: str, kernels: str, tmp_path: Path, world_size: int = 2, status: int = 0) -> str:
    """Run a function of tests/shm_ranks.py on every rank; return what they wrote, if they ended with ``status``."""
    returncode, output = run_forked(
        "tests.shm_ranks", what, kernels, world_size=world_size, output=tmp_path / "output.txt", limit_s=100
    )
    assert returncode == status, output
    return output


# The heap ---------------------------------------------------------------------------------------


def test_memory_goes_back_and_is_used_again() -> None:
    heap = OwnHeap()
    first, second, third = (heap.allocate(1000, torch.float32, "test") for _ in range(3))
    places = [heap.offset_of(tensor) for tensor in (first, second, third)]
    assert places == [0, ALIGNMENT, 2 * ALIGNMENT]
    view = second[10:20]
    del second
    assert heap.offset_of(heap.allocate(1, torch.uint8, "test")) == 3 * ALIGNMENT, "a view still needs it"
    del first, view
    gc.collect()
    assert heap.offset_of(heap.allocate(2 * ALIGNMENT, torch.uint8, "test")) == 0, "two neighbours are one piece"


def test_a_tensor_that_is_gone_holds_no_memory() -> None:
    heap = OwnHeap()
    before = os.fstat(heap._file).st_blocks
    tensor = heap.allocate(2**24, torch.uint8, "test").fill_(1)
    assert os.fstat(heap._file).st_blocks * 512 >= 2**24
    del tensor
    assert os.fstat(heap._file).st_blocks == before


def test_too_little_memory_is_said_with_both_sizes() -> None:
    heap = OwnHeap()
    with pytest.raises(CommError, match=r"empty needs 1125899906842624 bytes of shared memory, but \d+ are available"):
        heap.allocate(2**50, torch.uint8, "empty")
    assert 0 < available_bytes() < 2**50


def test_a_process_of_the_same_user_can_map_it_and_another_cannot() -> None:
    heap = OwnHeap()
    tensor = heap.allocate(8, torch.int64, "test").fill_(7)
    assert attach(heap.address).tensor(heap.offset_of(tensor), 8, torch.int64).tolist() == [7] * 8
    program = (
        "import os, sys\n"
        "if sys.argv[2] == 'other':\n"
        "    os.setuid(65534)\n"
        "try:\n"
        "    os.open(sys.argv[1], os.O_RDWR)\n"
        "    print('opened')\n"
        "except PermissionError:\n"
        "    print('refused')\n"
    )

    def tried(who: str) -> str:
        done = subprocess.run([sys.executable, "-c", program, heap.address, who], capture_output=True, text=True)
        return done.stdout.strip()

    assert tried("same") == "opened"
    if os.getuid() == 0:
        assert tried("other") == "refused"


def test_memory_that_cannot_be_mapped_is_one_sentence() -> None:
    with pytest.raises(BackendUnavailableError, match=r"shm cannot map the memory of another rank.*comm=gloo"):
        attach("/proc/1/fd/no-such-file")


# The mailbox ------------------------------------------------------------------------------------


def two_mailboxes() -> tuple[Mailbox, Mailbox]:
    words = [memoryview(bytearray(8 * num_words(2))).cast("q") for _ in range(2)]
    slots = [torch.zeros(2, NUM_SLOTS, SLOT_BYTES, dtype=torch.uint8) for _ in range(2)]
    return Mailbox(0, words, slots, lambda rank: None), Mailbox(1, words, slots, lambda rank: None)


def message(numel: int, seed: int) -> torch.Tensor:
    return torch.randint(256, (numel,), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


@pytest.mark.parametrize("numel", [1, SLOT_BYTES, SLOT_BYTES + 1, 11 * SLOT_BYTES + 5])
def test_a_message_goes_through_the_slots_in_pieces(numel: int) -> None:
    sender, receiver = two_mailboxes()
    sent, target = message(numel, 0), torch.zeros(numel, dtype=torch.uint8)
    sending, arriving = sender.send(sent, 1, tag=3), receiver.receive(target, 0, tag=3)
    for _ in range(20):
        receiver.advance()
        sender.advance()
    assert sending.done
    assert arriving.done
    assert torch.equal(target, sent)


def test_messages_are_matched_by_tag_in_any_order_of_receives() -> None:
    sender, receiver = two_mailboxes()
    messages = {tag: message(2 * SLOT_BYTES + tag, tag) for tag in (1, 2, 3)}
    targets = {tag: torch.zeros_like(sent) for tag, sent in messages.items()}
    for tag, sent in messages.items():
        sender.send(sent, 1, tag)
    for tag in (3, 1, 2):
        arriving = receiver.receive(targets[tag], 0, tag)
        for _ in range(20):
            receiver.advance()
            sender.advance()
        assert arriving.done
    assert all(torch.equal(targets[tag], messages[tag]) for tag in messages)


def test_a_receive_that_comes_while_its_message_is_half_there() -> None:
    sender, receiver = two_mailboxes()
    first, second = message(10, 0), message(3 * NUM_SLOTS * SLOT_BYTES, 1)
    sender.send(second, 1, tag=2)
    sender.send(first, 1, tag=1)
    targets = torch.zeros_like(first), torch.zeros_like(second)
    expected = receiver.receive(targets[0], 0, tag=1)
    receiver.advance()  # takes in a part of the other message, which nobody has asked for
    unexpected = receiver.receive(targets[1], 0, tag=2)
    for _ in range(20):
        sender.advance()
        receiver.advance()
    assert expected.done
    assert unexpected.done
    assert torch.equal(targets[0], first)
    assert torch.equal(targets[1], second)


def test_a_message_of_another_size_is_an_error_of_its_receive_alone() -> None:
    sender, receiver = two_mailboxes()
    sender.send(message(8, 0), 1, tag=0)
    sender.send(message(4, 1), 1, tag=0)
    wrong, target = receiver.receive(torch.zeros(4, dtype=torch.uint8), 0, 0), torch.zeros(4, dtype=torch.uint8)
    right = receiver.receive(target, 0, 0)
    receiver.advance()
    assert isinstance(wrong.error, MismatchError)
    assert "rank 0 sends 8 elements of uint8, this rank receives 4 of uint8" in str(wrong.error)
    assert right.error is None
    assert torch.equal(target, message(4, 1))


LARGE = 3 * NUM_SLOTS * SLOT_BYTES


def refuse_at_once(sender: Mailbox, receiver: Mailbox) -> None:
    receiver.receive(message(8, 9), 0, tag=2)
    receiver.advance()


def refuse_what_has_begun_to_come(sender: Mailbox, receiver: Mailbox) -> None:
    receiver.receive(message(8, 9), 0, tag=1)
    receiver.advance()
    receiver.receive(message(8, 9), 0, tag=2)


def refuse_two(sender: Mailbox, receiver: Mailbox) -> None:
    """The second one is all there: what is said of it must not hide what was said of the first."""
    receiver.receive(message(1, 9), 0, tag=1)
    receiver.advance()
    receiver.receive(message(8, 9), 0, tag=2)
    receiver.receive(message(8, 9), 0, tag=0)


@pytest.mark.parametrize("refuse", [refuse_at_once, refuse_what_has_begun_to_come, refuse_two])
def test_a_refused_message_ends_for_its_sender_too(refuse: Callable[[Mailbox, Mailbox], None]) -> None:
    sender, receiver = two_mailboxes()
    sender.send(message(4, 0), 1, tag=0)
    large, small = sender.send(message(LARGE, 0), 1, tag=2), message(5, 1)
    later = sender.send(small, 1, tag=3)
    refuse(sender, receiver)
    sender.advance()
    assert large.done
    assert isinstance(large.error, MismatchError)
    said = f"this rank sends {LARGE} elements of uint8, rank 1 receives 8 of uint8"
    assert said in str(large.error)
    target = torch.zeros_like(small)
    arriving = receiver.receive(target, 0, tag=3)
    for _ in range(3):
        receiver.advance()
        sender.advance()
    assert later.done
    assert later.error is None
    assert arriving.done
    assert torch.equal(target, small), "what was left out of the message before it is taken for this one"
    assert not sender.has_open()


class _Watched:
    """Memory that looks, while it is copied, whether its message says that it is done."""

    def __init__(self) -> None:
        self.message: Message | None = None
        self.seen: list[bool] = []

    def numel(self) -> int:
        return 4

    def __getitem__(self, piece: slice) -> _Watched:
        return self

    def copy_(self, source: torch.Tensor) -> None:
        assert self.message is not None
        self.seen.append(self.message.done)


def test_a_message_is_not_done_before_its_bytes_are_there() -> None:
    sender, receiver = two_mailboxes()
    sender.send(message(4, 0), 1, tag=0)
    memory = _Watched()
    memory.message = receiver.receive(memory, 0, tag=0)  # type: ignore[arg-type]
    receiver.advance()
    assert memory.message.done
    assert memory.seen == [False]


# The communicator -------------------------------------------------------------------------------


@pytest.mark.parametrize("end", [ShmCommunicator.close, lambda comm: comm.abort("enough")], ids=["close", "abort"])
def test_the_end_gives_back_files_and_mappings_at_once(end: Callable[[ShmCommunicator], None]) -> None:
    ShmCommunicator().close()  # what a process opens once
    gc.collect()
    gc.disable()
    try:
        before = footprint()
        for _ in range(5):
            comm = ShmCommunicator()
            comm.all_reduce(comm.empty(30_000).fill_(1))
            end(comm)
        del comm
        assert footprint()[0] <= before[0]
        assert end is not ShmCommunicator.close or footprint()[1] <= before[1]
    finally:
        gc.enable()


def test_negative_sizes_are_refused() -> None:
    with ShmCommunicator() as comm, pytest.raises(ValueError, match=r"empty: sizes must be at least 0, got \(2, -1\)"):
        comm.empty((2, -1))


def test_without_meetings_are_for_shared_memory() -> None:
    with ShmCommunicator() as comm, pytest.raises(ValueError, match="make it with empty"):
        comm.without_meetings(torch.ones(10))


def test_several_hosts_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(
        BackendUnavailableError, match=r"one host, but of these 4 ranks only 2 are on this one; use comm=ring"
    ):
        ShmCommunicator.check_available()


@on_both_paths
def test_ranks_that_disagree_are_all_told(kernels: str, tmp_path: Path) -> None:
    output = run_ranks("disagree", kernels, tmp_path, world_size=3)
    assert output.count("as expected") == 3 * 5


@pytest.mark.parametrize("world_size", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_both_paths_agree_on_every_bit(world_size: int, tmp_path: Path) -> None:
    output = run_ranks("same_bits", "compiled", tmp_path, world_size)
    assert output.count("the same") == world_size, output


@on_both_paths
def test_a_disagreement_is_named_before_all_ranks_have_come(kernels: str, tmp_path: Path) -> None:
    output = run_ranks("disagree_before_all_came", kernels, tmp_path, world_size=3)
    assert output.count("MismatchError [rank ") == 2, output
    for rank in (0, 2):
        assert f"[rank {rank}/3] all_reduce: rank 0 calls all_reduce of 5 float32" in output
    assert output.count("; rank 2 calls all_reduce of 5 int32") == 2, output


@on_both_paths
@pytest.mark.slow
def test_use_leaves_memory_as_it_was(kernels: str, tmp_path: Path) -> None:
    assert run_ranks("leave_nothing", kernels, tmp_path).count("as before") == 2


@on_both_paths
def test_killed_ranks_leave_no_memory(kernels: str, tmp_path: Path) -> None:
    files, memory = set(os.listdir("/dev/shm")), shared_bytes()
    output = run_ranks("die_together", kernels, tmp_path, status=1)
    assert output.count("holds 64 MiB") == 2, output
    new = {name for name in os.listdir("/dev/shm") if not name.startswith("mpich")} - files  # MPI may run beside it
    assert not new
    assert shared_bytes() < memory + 2**26, "the memory of the killed ranks is still there"


@on_both_paths
@pytest.mark.parametrize("world_size", [2, 3])
def test_no_message_waits_for_a_nap(world_size: int, kernels: str, tmp_path: Path) -> None:
    assert run_ranks("never_nap", kernels, tmp_path, world_size).count("no nap") == world_size


@on_both_paths
def test_ctrl_c_ends_a_wait(kernels: str, tmp_path: Path) -> None:
    assert "interrupted" in run_ranks("interrupted", kernels, tmp_path)


@on_both_paths
def test_what_was_sent_before_close_arrives(kernels: str, tmp_path: Path) -> None:
    assert "all of it came" in run_ranks("send_and_close", kernels, tmp_path)


@on_both_paths
def test_both_ends_of_a_refused_message_are_told(kernels: str, tmp_path: Path) -> None:
    output = run_ranks("refuse", kernels, tmp_path)
    assert "isend: this rank sends 1000000 elements of float32, rank 1 receives 3 of float32" in output
    assert "irecv: rank 0 sends 1000000 elements of float32, this rank receives 3 of float32" in output


@on_both_paths
def test_a_rank_that_cannot_take_part_is_named(kernels: str, tmp_path: Path) -> None:
    output = run_ranks("one_cannot_start", kernels, tmp_path, status=1)
    assert "rank 1 is gone: CommError: shm needs" in output, output


@on_both_paths
def test_a_killed_rank_is_named_long_before_the_timeout(kernels: str, tmp_path: Path) -> None:
    output = run_ranks("one_dies", kernels, tmp_path, world_size=3, status=1)
    assert output.count("named rank 1") == 2, output


def shared_bytes() -> int:
    fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    return int(fields["Shmem"].split()[0]) * 1024
