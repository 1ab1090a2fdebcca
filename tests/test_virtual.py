"""A virtual cluster: the results of threads, bit for bit, and the times of the model, to rounding."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from backends.ring import ring_all_reduce
from backends.thread import ThreadCommunicator, run_threads, spawn_threads
from backends.virtual import VirtualCommunicator
from backends.virtual_time import turn
from backends.virtual_time.clock import FORWARD
from backends.virtual_time.turn import Turns
from minidist.analysis.network import Flat, Network, Torus
from minidist.analysis.simulate import simulate
from minidist.collective import Run
from minidist.communicator import Communicator
from minidist.compression import ErrorFeedback, PowerSGD, TopK
from minidist.ddp import DistributedDataParallel
from minidist.engine import Engine
from minidist.errors import MismatchError
from minidist.gradients.hooks import AllReduce, BFloat16, Hook
from minidist.methods import DiLoCo
from minidist.training.report import Report
from tests import models
from tests.test_commands import ROOT, run_ranks

ALPHA, BETA = 1e-3, 1e-6
FLAT = Flat(ALPHA, BETA)
RING = {"all_reduce": ring_all_reduce}
HOOKS: dict[str, Callable[[], Hook]] = {
    "all_reduce": AllReduce,
    "bfloat16": BFloat16,
    "top_k": lambda: ErrorFeedback(TopK(0.1)),
    "power_sgd": lambda: ErrorFeedback(PowerSGD(rank=1)),
}


def virtual(step_s: float = 1.0, network: Network = FLAT, **pace: object) -> VirtualCommunicator:
    return VirtualCommunicator(network, RING, step_s, timeout_s=60.0, **pace)  # type: ignore[arg-type]


def ends(job: Callable[[VirtualCommunicator], object], world_size: int, **settings: object) -> list[float]:
    """Return what the clocks of all ranks show after ``job``."""

    def run() -> float:
        with virtual(**settings) as comm:  # type: ignore[arg-type]
            job(comm)
            return comm.clock.now_s()

    return spawn_threads(run, world_size)


def ring(world_size: int, numel: int) -> float:
    return simulate(ring_all_reduce, Run("all_reduce", world_size), 4 * numel, FLAT).seconds


def trained(comm: Communicator, hook: Hook) -> list[Tensor]:
    ddp = DistributedDataParallel(models.seeded(nn.Sequential(*models.mlp()), 0), comm, bucket_cap_mb=1e-4, hook=hook)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1, momentum=0.9)
    for step in range(3):
        generator = torch.Generator().manual_seed(10 * step + comm.rank)
        optimizer.zero_grad()
        ddp(torch.randn(4, models.NUM_INPUTS, generator=generator)).square().mean().backward()
        optimizer.step()
        comm.clock.step_done()
    return [parameter.detach().clone() for parameter in ddp.parameters()]


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("hook", HOOKS)
def test_training_gives_the_bits_of_threads(hook: str, world_size: int) -> None:
    def job() -> list[Tensor]:
        with virtual() as comm:
            return trained(comm, HOOKS[hook]())

    expected = run_threads(lambda comm: trained(comm, HOOKS[hook]()), world_size, timeout_s=60.0)
    for found, wanted in zip(spawn_threads(job, world_size), expected, strict=True):
        assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


def test_a_collective_takes_what_the_simulation_says_and_sends_what_the_schedule_does() -> None:
    def job(comm: VirtualCommunicator) -> None:
        comm.all_reduce(torch.ones(1000))
        assert (comm.traffic.messages, comm.traffic.bytes) == (6, 6000)
        assert comm.traffic.seconds == comm.traffic.blocked_seconds == comm.clock.now_s()

    assert ends(job, 4) == pytest.approx([ring(4, 1000)] * 4)


def test_a_collective_waits_for_the_slow_rank() -> None:
    def job(comm: VirtualCommunicator) -> None:
        comm.clock.step_done()
        comm.all_reduce(torch.ones(1000))

    slow = {"slow_ranks": [2], "slow_factor": 3.0}
    starts = [1.0, 1.0, 3.0, 1.0]
    model = simulate(ring_all_reduce, Run("all_reduce", 4), 4000, FLAT, starts=starts).ends
    assert ends(job, 4, **slow) == pytest.approx(model)
    assert min(model) > 3.0


@pytest.mark.parametrize("numel", [10, 500_000])
def test_the_background_hides_behind_computing(numel: int) -> None:
    """Two buckets a step: once a step has had two, they start in the middle of backward and at its end."""

    def job(comm: VirtualCommunicator) -> None:
        for _ in range(2):
            for work in [comm.all_reduce(torch.ones(numel), async_op=True) for _ in range(2)]:
                work.wait()
            comm.clock.step_done()

    takes = ring(2, numel)
    first = 1.0 + 2 * takes  # nothing is known of a step before it
    middle = FORWARD + (1 - FORWARD) / 2
    assert ends(job, 2) == pytest.approx([first + max(middle + takes, 1.0) + takes] * 2)


def test_what_starts_between_two_steps_hides_behind_the_next() -> None:
    def job(comm: VirtualCommunicator) -> None:
        comm.clock.step_done()
        with comm.clock.between_steps():
            work = comm.all_reduce(torch.ones(1000), async_op=True)
        comm.clock.step_done()
        work.wait()

    assert ends(job, 2) == [2.0, 2.0]


def test_pseudo_gradients_leave_at_the_end_of_their_step() -> None:
    """And not with the gradients of the next step, of which there are none: it would be computed twice at the end."""

    def job(comm: VirtualCommunicator) -> None:
        ddp = DistributedDataParallel(nn.Linear(100, 1000, bias=False), comm)
        optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1)
        engine = Engine(ddp, optimizer, nn.MSELoss(), comm, method=DiLoCo(2))
        before = comm.clock.now_s()
        engine.fit([(torch.ones(2, 100), torch.ones(2, 1000))] * 4, epochs=1)
        roll_calls = 4 * 2 * ALPHA
        assert 0 <= comm.clock.now_s() - before - 4 - 2 * ring(2, 100_000) <= roll_calls + 0.01

    ends(job, 2)


def test_one_run_tells_the_times_of_several_networks() -> None:
    networks: dict[str, Network] = {"slow": FLAT, "fast": Flat(ALPHA / 10, BETA / 10)}

    def job(network: object) -> list[float]:
        with virtual(network=network, spread=0.3, seed=5) as comm:  # type: ignore[arg-type]
            trained(comm, AllReduce())
            return comm.clock.times().tolist()

    both = spawn_threads(lambda: job(networks), 3)
    slow, fast = (spawn_threads(lambda network=network: job(network), 3) for network in networks.values())
    assert both == [[*one, *other] for one, other in zip(slow, fast, strict=True)]
    assert both[0][1] < both[0][0]


def test_the_spread_follows_its_seed() -> None:
    def job(comm: VirtualCommunicator) -> None:
        for _ in range(3):
            comm.clock.step_done()

    once, again, other = (ends(job, 2, spread=0.2, seed=seed) for seed in (1, 1, 2))
    assert once == again != other
    assert once[0] != once[1]
    assert ends(job, 2) == [3.0, 3.0]


def test_computing_is_measured_unless_it_is_given() -> None:
    """A rank that computes more is later by that, whatever else the machine does: its thread's own time counts."""

    def job() -> tuple[float, float]:
        with VirtualCommunicator(FLAT, timeout_s=60.0) as comm:
            torch.randn(200, 200) @ torch.randn(200, 200)  # the first time takes longer
            comm.barrier()
            before = comm.clock.now_s()
            for _ in range(40 if comm.rank else 1):
                torch.randn(200, 200) @ torch.randn(200, 200)
            own = comm.clock.now_s() - before
            comm.barrier()
            return own, comm.clock.now_s() - before

    (quick, after), (slow, _) = spawn_threads(job, 2)
    assert quick < slow <= after


def test_a_message_takes_its_latency_and_its_bytes() -> None:
    def job(comm: VirtualCommunicator) -> None:
        if comm.rank == 0:
            comm.clock.step_done()
            comm.send(torch.ones(250), 1)
        else:
            assert comm.recv(torch.empty(250), None) == 0

    assert ends(job, 2) == pytest.approx([1 + ALPHA + 1000 * BETA] * 2)


def test_messages_queue_for_the_port_of_a_rank() -> None:
    def job(comm: VirtualCommunicator) -> None:
        if comm.rank:
            comm.send(torch.ones(250), 0)
        else:
            for src in (1, 2):
                comm.recv(torch.empty(250), src)

    root, *_ = ends(job, 3)
    assert root == pytest.approx(ALPHA + 2 * 1000 * BETA)


def test_a_split_has_the_clock_of_its_ranks() -> None:
    def job(comm: VirtualCommunicator) -> None:
        before = comm.clock.now_s()
        half = comm.split(comm.rank % 2)
        assert half is not None
        split_s = half.clock.now_s() - before
        half.all_reduce(total := torch.full((1000,), float(comm.rank)))
        assert total.eq(2 + 2 * (comm.rank % 2)).all()
        assert comm.clock.now_s() == pytest.approx(before + split_s + ring(2, 1000))

    ends(job, 4)


def test_ranks_that_mean_different_things_are_told() -> None:
    def job(comm: VirtualCommunicator) -> str:
        with pytest.raises(MismatchError) as caught:
            comm.all_reduce(torch.ones(3)) if comm.rank else comm.broadcast(torch.ones(4), 0)
        return str(caught.value)

    def run() -> str:
        return job(virtual())

    whats = ("broadcast", "all_reduce")
    where = r"at tests/test_virtual\.py:\d+"
    of_0, of_1 = f"broadcast of 4 float32 with root 0 {where}", f"all_reduce of 3 float32 with op SUM {where}"
    told = f"rank 0 calls {of_0}; rank 1 calls {of_1}; every rank has to call the same as its collective #"
    for rank, (what, said) in enumerate(zip(whats, spawn_threads(run, 2), strict=True)):
        assert re.match(rf"\[rank {rank}/2\] {what}: {told}", said), said


def test_a_rank_that_waits_for_something_else_loses_its_turn() -> None:
    """Both have to come to the barrier of Python's, of which the communicator knows nothing."""
    elsewhere = threading.Barrier(2)

    def job(comm: VirtualCommunicator) -> None:
        elsewhere.wait(50)
        comm.barrier()

    ends(job, 2)


@pytest.mark.parametrize("kind", ["collective", "message"])
def test_a_rank_that_only_asks_whether_something_is_done_lets_others_do_it(kind: str) -> None:
    def job(comm: VirtualCommunicator) -> None:
        if kind == "message" and comm.rank > 0:
            comm.send(torch.ones(3), 0)
        else:
            messages = [comm.irecv(torch.empty(3), src) for src in (1, 2)] if kind == "message" else []
            works = messages or [comm.all_reduce(torch.ones(3), async_op=True)]
            while not all(work.is_done() for work in works):
                pass
            for work in works:
                work.wait()

    def run() -> None:
        with VirtualCommunicator(FLAT, RING, 1.0, timeout_s=20.0) as comm:
            job(comm)

    spawn_threads(run, 3)


def test_turns_let_as_many_compute_as_they_say() -> None:
    turns = Turns(2)
    inside: list[int] = []
    most: list[int] = []

    def job(comm: Communicator) -> None:
        for _ in range(20):
            turns.take()
            inside.append(comm.rank)
            most.append(len(inside))
            torch.ones(1000).sum()
            inside.remove(comm.rank)
            assert turns.end()
        assert not turns.end()

    run_threads(job, 4)
    assert max(most) <= 2


@pytest.mark.parametrize("pause_s", [5e-3, 0.0])
def test_a_turn_ends_whose_thread_asks_for_what_another_has_to_do(
    pause_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranks may wait for each other in ways that no communicator knows of, such as a file: with pauses, or without."""
    if not pause_s:
        monkeypatch.setattr(turn, "LONGEST_S", 1.0)
    turns = Turns(1)
    is_held, is_done = threading.Event(), threading.Event()

    def ask() -> None:
        turns.take()
        is_held.set()
        while not is_done.is_set():
            asked_at = time.thread_time()
            while time.thread_time() < asked_at + pause_s / 20:
                pass
            time.sleep(pause_s)

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    is_held.wait()
    helper = threading.Thread(target=lambda: (turns.take(), is_done.set()), daemon=True)
    helper.start()
    try:
        assert is_done.wait(30)
    finally:
        is_done.set()


def test_metrics_are_in_virtual_seconds(tmp_path: Path) -> None:
    """Four steps of a second each, and what is exposed of their all-reduces and roll calls."""

    def job() -> None:
        with virtual() as comm:
            model = DistributedDataParallel(models.seeded(nn.Sequential(*models.mlp()), 0), comm)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            report = Report(tmp_path, comm.rank, progress=False)
            engine = Engine(model, optimizer, nn.MSELoss(), comm, report=report)
            batches = [(torch.ones(2, models.NUM_INPUTS), torch.ones(2, models.NUM_OUTPUTS))] * 4
            engine.fit(batches, epochs=1)

    spawn_threads(job, 2)
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert 4.0 < last["seconds"] < 4.2
    numel = sum(parameter.numel() for parameter in nn.Sequential(*models.mlp()).parameters())
    assert last["bytes"] >= 4 * 4 * numel  # at two ranks each sends as much as it has
    assert last["samples_per_s"] == pytest.approx(4 * 4 / last["seconds"])


def test_settings_are_checked() -> None:
    wrong: list[tuple[Callable[[], object], str]] = [
        (lambda: VirtualCommunicator(None), "virtual needs the model of a network; choose one with network=<name>"),
        (lambda: virtual(0.0), "step_s must be greater than 0, or null to measure, got 0.0"),
        (lambda: virtual(spread=1.0), "spread must be at least 0 and less than 1, got 1.0"),
        (lambda: virtual(slow_factor=0.5), "slow_factor must be at least 1, got 0.5"),
        (lambda: virtual(slow_ranks=[2]), "slow_ranks must be of 0 to 0, got 2"),
        (lambda: virtual(num_at_once=0), "num_at_once must be at least 1, got 0"),
        (lambda: VirtualCommunicator(FLAT, {"all_reduce": "nowhere.ring"}), "the schedule nowhere.ring of all_reduce"),
    ]
    for make, message in wrong:
        with pytest.raises(ValueError, match=message):
            make()


def test_a_network_with_too_few_places_is_refused() -> None:
    def job() -> None:
        with pytest.raises(ValueError, match="a torus of 1 x 2 has no rank 2"):
            VirtualCommunicator(Torus(1, 2, ALPHA, BETA))

    spawn_threads(job, 3)


def test_one_object_is_shared_by_the_ranks_of_a_communicator() -> None:
    def job() -> tuple[object, object]:
        return ThreadCommunicator().shared(object), ThreadCommunicator().shared(object)

    (one, other), again = spawn_threads(job, 2)
    assert again == (one, other)
    assert one is not other


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 3])
def test_real_steps_on_the_paced_network_are_no_faster_than_their_collectives(world_size: int, tmp_path: Path) -> None:
    """How much slower they are than virtual ones depends on the machine; the program prints it."""
    program = ROOT / "experiments" / "truth.py"
    settings = ("network=ethernet_1g", "widths=[256]", "iterations=5", f"hydra.run.dir={tmp_path}")
    done = run_ranks(tmp_path, world_size, str(program), *settings)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads((tmp_path / "truth.json").read_text())["rows"]
    network = Flat(5e-5, 8e-9, 1e-10)
    nbytes = 4 * round(1e6 * row["parameters_M"])
    collectives = simulate(ring_all_reduce, Run("all_reduce", world_size), nbytes, network).seconds
    assert min(row["real_ms"], row["measured_ms"], row["given_ms"]) >= 1e3 * collectives * 0.99


@pytest.mark.parametrize("splits", [False, True])
def test_what_is_only_looked_at_takes_no_time(splits: bool) -> None:
    """Not even of an operation that is on its way meanwhile, or of the next one, over a split or not."""

    def job(comm: VirtualCommunicator) -> None:
        ours = comm.split(0) if splits else comm
        assert ours is not None
        start, sent = comm.clock.now_s(), comm.traffic.with_splits().bytes
        work = ours.all_reduce(torch.ones(1000), async_op=True)
        begun = comm.clock.now_s()
        with comm.unwatched():
            ours.all_reduce(torch.ones(50_000))
            work.wait()
        assert comm.clock.now_s() == begun
        work.wait()
        assert comm.clock.now_s() - start == pytest.approx(begun - start + ring(4, 1000))
        ours.all_reduce(torch.ones(1000))
        assert comm.clock.now_s() - start == pytest.approx(begun - start + 2 * ring(4, 1000))
        assert comm.traffic.with_splits().bytes - sent == 4 * (2 * 1000 + 50_000) * 3 / 2

    ends(job, 4)
