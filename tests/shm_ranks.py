"""One rank of a world in which test_shm.py tries something: ``python -m tests.shm_ranks disagree compiled``."""

from __future__ import annotations

import gc
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

import backends.shm.doorbell
import backends.shm.heap
from backends.ring import RingCommunicator
from backends.shm.communicator import ShmCommunicator
from backends.shm.layout import LINE
from minidist.communicator import Communicator, ReduceOp
from minidist.contract.checks import DTYPES
from minidist.errors import BackendUnavailableError, CommError, CommTimeoutError, MismatchError, PeerLostError
from tests import zoo
from tests.inputs import combinable

NO_NAP_S = 20.0


def on_shm(timeout_s: float = 300.0) -> ShmCommunicator:
    """Return a communicator on the path that the command asks for."""
    return ShmCommunicator(timeout_s, kernels=sys.argv[2])


def disagree() -> None:
    """Rank 1 calls something else than the others: each rank is told of both calls."""
    calls: list[tuple[Callable[[Communicator], object], Callable[[Communicator], object], str]] = [
        (
            lambda comm: comm.all_reduce(torch.ones(5)),
            lambda comm: comm.all_reduce(torch.ones(5), ReduceOp.MAX),
            "all_reduce of 5 float32 with op MAX",
        ),
        (
            lambda comm: comm.all_reduce(torch.ones(10000)),
            lambda comm: comm.all_reduce(torch.ones(10000, dtype=torch.int32)),
            "all_reduce of 10000 int32 with op SUM",
        ),
        (
            lambda comm: comm.all_reduce(torch.ones(5)),
            lambda comm: comm.all_reduce(torch.ones(50000)),
            "all_reduce of 50000 float32",
        ),
        (
            lambda comm: comm.broadcast(torch.ones(5), 0),
            lambda comm: comm.broadcast(torch.ones(5), 1),
            "broadcast of 5 float32 with root 1",
        ),
        (
            lambda comm: comm.barrier(),
            lambda comm: comm.all_gather(torch.ones(15), torch.ones(5)),
            "all_gather of 5 float32",
        ),
    ]
    for usual, other, spelt in calls:
        comm = on_shm(timeout_s=20)
        try:
            (other if comm.rank == 1 else usual)(comm)
            print("no error")
        except MismatchError as error:
            print(
                "as expected" if spelt in str(error) and "rank 1 calls" in str(error) else f"wrong: {error}", flush=True
            )
        comm.close()


def disagree_on_schedules() -> None:
    """Rank 1 runs another collective, another schedule, or none at all: each rank is told of both calls."""
    five = r"all_reduce of 5 float32 with op SUM and root 0"
    calls: list[tuple[int, Callable[[Communicator], object], str]] = [
        (
            0,
            lambda comm: comm.all_reduce(torch.ones(7)),
            r"all_reduce of 7 float32 with op SUM at ",
        ),
        (1, lambda comm: comm.all_reduce(torch.ones(5)), five + " by the schedule on channel 2[,;]"),
        (2, lambda comm: comm.all_reduce(torch.ones(5)), five + "[,;]"),
    ]
    for which, other, spelt in calls:
        transport = on_shm(timeout_s=20)
        comms = (RingCommunicator(transport), zoo.around("swing", transport), transport)
        try:
            other(comms[which]) if transport.rank == 1 else comms[0].all_reduce(torch.ones(5))
            print("no error")
        except MismatchError as error:
            is_named = re.search(f"rank 1 calls {spelt}", str(error))
            print("as expected" if is_named else f"wrong: {error}", flush=True)
        transport.close()


def disagree_before_all_came() -> None:
    """Rank 2 calls something else and fails before rank 1 has come: rank 0, which waits for that one, hears why."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with on_shm() as elsewhere:
        comm = on_shm(timeout_s=20)
        if comm.rank != 1:
            try:
                with comm:
                    comm.all_reduce(torch.ones(5, dtype=torch.int32 if comm.rank == 2 else torch.float32))
            except CommError as error:
                print(f"{type(error).__name__} {error}", flush=True)
        elsewhere.barrier()
        comm.close()


def leave_nothing() -> None:
    """Much use of one communicator, then many communicators: files, mappings and memory are as before."""
    with on_shm() as comm:
        work(comm, 100)
        before = footprint()
        work(comm, 10_000)
        for gigabyte in (comm.empty(2**28), torch.empty(2**28)):
            comm.all_reduce(gigabyte.fill_(1))
        del gigabyte
        for _ in range(100):
            comm.empty(2**24).fill_(1)
        for _ in range(100):
            with on_shm() as another:
                work(another, 1)
        del another
        until = time.monotonic() + 10  # the other rank hangs up a moment later
        while (more := more_than(before)) and time.monotonic() < until:
            gc.collect()
        print(more or "as before", flush=True)


def more_than(before: tuple[int, int, int]) -> str:
    num_files, num_maps, resident = (a - b for a, b in zip(footprint(), before, strict=True))
    same = num_files <= 0 and num_maps <= 0 and resident < 2**25
    return "" if same else f"{num_files} files, {num_maps} maps, {resident} bytes more"


def work(comm: Communicator, times: int) -> None:
    small, shared, ordinary = torch.ones(100), comm.empty(30_000).fill_(1), torch.ones(30_000)
    for _ in range(times):
        for tensor in (small, shared, ordinary):
            comm.all_reduce(tensor)


def footprint() -> tuple[int, int, int]:
    """Return how many files and mappings of heaps this process has, and its resident memory in bytes."""
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    maps = Path("/proc/self/maps").read_text().count("memfd:minidist")
    return len(os.listdir("/proc/self/fd")), maps, resident


def die_together() -> None:
    """Hold memory, then die on all ranks at once."""
    comm = on_shm()
    held = comm.empty(2**24).fill_(1)
    comm.barrier()
    print(f"holds {held.nbytes >> 20} MiB", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)


def one_dies() -> None:
    """Rank 1 is killed in the middle of an all-reduce; the others say who is gone, and how long that took."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun asks the others to end when one has died
    comm = on_shm()
    tensor = comm.empty(2**22).fill_(1)
    comm.all_reduce(tensor)
    if comm.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    started = time.monotonic()
    try:
        comm.all_reduce(tensor)
    except PeerLostError as error:
        seconds = time.monotonic() - started
        print(
            "named rank 1" if error.peers == (1,) and seconds < 10.0 else f"{error} after {seconds:.1f} s", flush=True
        )
    os._exit(0)


def one_dies_in_a_schedule() -> None:
    """Rank 1 is killed amid many large all-reduces of a ring; the others say who is gone, and how long that took."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun asks the others to end when one has died
    comm = RingCommunicator(on_shm())
    shared, ordinary = comm.empty(2**20).fill_(0), torch.zeros(2**20)
    comm.all_reduce(shared)
    if comm.rank == 1:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # which ends the process, also inside of a kernel
        signal.setitimer(signal.ITIMER_REAL, 0.3)
    started = time.monotonic()
    try:
        while True:
            comm.all_reduce(shared)
            comm.all_reduce(ordinary)
    except PeerLostError as error:
        seconds = time.monotonic() - started
        print(
            "named rank 1" if error.peers == (1,) and seconds < 20.0 else f"{error} after {seconds:.1f} s", flush=True
        )
    os._exit(0)


def interrupted_in_a_schedule() -> None:
    """Rank 0 is interrupted as by Ctrl-C while it waits for rank 1 in a schedule."""
    with on_shm(timeout_s=60) as elsewhere:
        transport = on_shm(timeout_s=60)
        comm = RingCommunicator(transport)
        tensor = comm.empty(30_000).fill_(1)
        comm.all_reduce(tensor)
        try:
            if comm.rank == 0:
                signal.signal(signal.SIGALRM, signal.default_int_handler)
                signal.setitimer(signal.ITIMER_REAL, 0.5)
                comm.all_reduce(tensor)
        except KeyboardInterrupt:
            print("interrupted", flush=True)
        elsewhere.barrier()
        transport.abort("enough")


def no_answer_to_a_schedule() -> None:
    """Rank 1 does not come; rank 0, which waits in a schedule, is told so when its time is up."""
    with on_shm(timeout_s=60) as elsewhere:
        transport = on_shm(timeout_s=60)
        comm = RingCommunicator(transport)
        if comm.rank == 0:
            try:
                comm.all_reduce(torch.ones(10), timeout_s=0.5)
            except CommTimeoutError as error:
                print(error, flush=True)
        elsewhere.barrier()
        transport.abort("enough")


def send_and_close() -> None:
    """Rank 0 sends more than fits into the slots, and leaves; rank 1 gets all of it."""
    sent = torch.arange(500_000)
    with on_shm(timeout_s=20) as comm:
        if comm.rank == 0:
            comm.isend(sent, 1)
            return
        target = torch.zeros_like(sent)
        comm.recv(target, 0)
    print("all of it came" if torch.equal(target, sent) else "something else came", flush=True)


def refuse() -> None:
    """Rank 1 refuses a large message and waits elsewhere; rank 0, which still holds most of it, is told."""
    with on_shm() as elsewhere:
        comm = on_shm(timeout_s=20)
        try:
            comm.send(torch.ones(10**6), 1) if comm.rank == 0 else comm.recv(torch.ones(3), 0)
        except MismatchError as error:
            print(error, flush=True)
        elsewhere.barrier()
        comm.close()


def never_nap() -> None:
    """Messages on two communicators, with naps so long that one would be seen."""
    backends.shm.doorbell.NAP_S = 2 * NO_NAP_S
    with on_shm(timeout_s=4 * NO_NAP_S) as comm:
        child = comm.split(0)
        assert child is not None
        n, me, small, large = comm.world_size, comm.rank, torch.ones(10), torch.ones(2**20)
        started = time.monotonic()
        for _ in range(5):  # what is sent on the one moves while its sender waits on the other
            works = [child.isend(large, (me + 1) % n)]
            comm.barrier() if me == 0 else child.recv(large.clone(), me - 1)
            child.recv(large.clone(), n - 1) if me == 0 else comm.barrier()
            works[0].wait()
        for _ in range(100):
            work = comm.isend(small, (me + 1) % n)
            comm.recv(small.clone(), (me - 1) % n)
            work.wait()
        ring = RingCommunicator(comm)
        for tensor in (small, large) * 10:
            ring.all_reduce(tensor)
        seconds = time.monotonic() - started
        print("no nap" if seconds < NO_NAP_S else f"it took {seconds:.1f} s", flush=True)
        child.close()


def one_cannot_start() -> None:
    """Rank 1 has no memory; rank 0 is told at once."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if os.environ["RANK"] == "1":
        backends.shm.heap.available_bytes = lambda: 0
    started = time.monotonic()
    try:
        on_shm(timeout_s=60)
    except PeerLostError as error:
        print(error if time.monotonic() - started < 30 else "it took too long", flush=True)
        os._exit(0)


def mix_paths() -> None:
    """Each rank asks for a path of its own."""
    try:
        with ShmCommunicator(kernels=sys.argv[2 + int(os.environ["RANK"])], timeout_s=20) as comm:
            tensor = torch.ones(3) + comm.rank
            comm.all_reduce(tensor)
            print(f"sum {tensor[0]:g}", flush=True)
    except BackendUnavailableError:
        print("refused", flush=True)
    except PeerLostError:
        print("lost", flush=True)


def interrupted() -> None:
    """Rank 0 waits for rank 1, and is interrupted as by Ctrl-C."""
    with on_shm(timeout_s=60) as elsewhere:
        comm = on_shm(timeout_s=60)
        if comm.rank == 0:
            signal.signal(signal.SIGALRM, signal.default_int_handler)
            signal.setitimer(signal.ITIMER_REAL, 0.5)
            try:
                comm.all_reduce(comm.empty(30_000).fill_(1))
            except KeyboardInterrupt:
                print("interrupted", flush=True)
        elsewhere.barrier()
        comm.abort("enough")


def same_bits() -> None:
    """Every collective on random numbers of every dtype: compiled kernels and torch's operations agree on each bit."""
    with ShmCommunicator(kernels="torch") as torch_comm, ShmCommunicator(kernels="compiled") as comm:
        for seed, (dtype, op) in enumerate((one, op) for one in DTYPES for op in combinable(one)):
            for numel, shared in ((5 + seed, False), (2048, True), (40_003, seed % 2 == 0)):
                expected, actual = (results(each, numel, dtype, op, shared, seed) for each in (torch_comm, comm))
                differ = [name for name in expected if not torch.equal(expected[name], actual[name])]
                assert not differ, f"{differ} differ: {dtype} {op} {numel} shared={shared}"
                sums = comm.all_gather_object(actual["all_reduce"].numpy().tobytes())
                assert len(set(sums)) == 1, f"ranks differ: {dtype} {op} {numel} shared={shared}"
        print("the same", flush=True)


def same_schedules() -> None:
    """Every algorithm on random numbers: as one compiled call it has the bits, and the traffic, of its messages."""
    with ShmCommunicator(kernels="torch") as by_messages, ShmCommunicator(kernels="compiled") as transport:
        for name in sorted({*zoo.ALGORITHMS} - {"auto"}):
            pair = [zoo.around(name, each) for each in (by_messages, transport)]
            before = [(each.traffic.messages, each.traffic.bytes) for each in pair]
            for seed, (dtype, op) in enumerate(SOME):
                for numel, shared in ((5 + seed, False), (2048, True), (40_003, seed % 2 == 0)):
                    expected, actual = (results(each, numel, dtype, op, shared, seed) for each in pair)
                    differ = [one for one in expected if not torch.equal(expected[one], actual[one])]
                    assert not differ, f"{name}: {differ} differ: {dtype} {op} {numel} shared={shared}"
            messages, whole = (
                (each.traffic.messages - count, each.traffic.bytes - nbytes)
                for each, (count, nbytes) in zip(pair, before, strict=True)
            )
            assert messages == whole, f"{name} counts {whole}, its messages are {messages}"
        assert sent_by_mail(by_messages) > 0
        assert sent_by_mail(transport) == 0, "a schedule ran over messages"
        print("the same", flush=True)


def sent_by_mail(comm: ShmCommunicator) -> int:
    """Return how many pieces of messages this rank has sent."""
    own = comm._arena.mail._words[comm.rank]
    return sum(own[LINE * peer] for peer in range(comm.world_size))


SOME = (
    (torch.float32, ReduceOp.SUM),
    (torch.bfloat16, ReduceOp.SUM),
    (torch.float16, ReduceOp.MAX),
    (torch.float64, ReduceOp.PRODUCT),
    (torch.int32, ReduceOp.BXOR),
    (torch.complex64, ReduceOp.SUM),
    (torch.bool, ReduceOp.MAX),
)
"""Enough of them for schedules, which combine what they are given as `same_bits` has seen it."""


def results(
    comm: Communicator, numel: int, dtype: torch.dtype, op: ReduceOp, shared: bool, seed: int
) -> dict[str, torch.Tensor]:
    """Return what each collective makes of random numbers, as bytes."""
    n, me, root = comm.world_size, comm.rank, seed % comm.world_size
    generator = torch.Generator().manual_seed(n * seed + me)

    def new(size: int) -> torch.Tensor:
        tensor = comm.empty(size, dtype=dtype) if shared else torch.empty(size, dtype=dtype)
        values = torch.randn(2 * size, generator=generator, dtype=torch.float64)[: size * (1 + dtype.is_complex)] * 3
        if dtype.is_complex:
            return tensor.copy_(torch.view_as_complex(values.view(-1, 2)))
        return tensor.copy_(values > 0 if dtype == torch.bool else values)

    done = {name: new(numel) for name in ("all_reduce", "reduce", "broadcast", "scatter", "reduce_scatter")}
    done |= {name: new(n * numel) for name in ("all_gather", "gather", "all_to_all")}
    comm.all_reduce(done["all_reduce"], op)
    comm.reduce(done["reduce"], root, op)
    comm.broadcast(done["broadcast"], root)
    comm.scatter(done["scatter"], new(n * numel) if me == root else None, root)
    comm.reduce_scatter(done["reduce_scatter"], new(n * numel), op)
    comm.all_gather(done["all_gather"], new(numel))
    comm.gather(done["gather"] if me == root else None, new(numel), root)
    comm.all_to_all(done["all_to_all"], new(n * numel))
    return {name: tensor.view(-1).view(torch.uint8).clone() for name, tensor in done.items()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    {
        "disagree": disagree,
        "disagree_before_all_came": disagree_before_all_came,
        "leave_nothing": leave_nothing,
        "die_together": die_together,
        "send_and_close": send_and_close,
        "one_cannot_start": one_cannot_start,
        "one_dies": one_dies,
        "refuse": refuse,
        "never_nap": never_nap,
        "same_bits": same_bits,
        "same_schedules": same_schedules,
        "disagree_on_schedules": disagree_on_schedules,
        "one_dies_in_a_schedule": one_dies_in_a_schedule,
        "interrupted_in_a_schedule": interrupted_in_a_schedule,
        "no_answer_to_a_schedule": no_answer_to_a_schedule,
        "mix_paths": mix_paths,
        "interrupted": interrupted,
    }[sys.argv[1]]()
