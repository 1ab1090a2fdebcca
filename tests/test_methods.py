"""Methods that exchange more rarely than in every step: what they come to, and that wrong ones are caught."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from backends.thread import run_threads
from minidist.communicator import Communicator, Work
from minidist.ddp import DistributedDataParallel
from minidist.errors import CheckpointError, CommError, PeerLostError
from minidist.gradients.buckets import Bucket
from minidist.gradients.hooks import AllReduce
from minidist.methods import DiLoCo, EveryStep, Gossip, LocalSGD, Method, SparseLoCo, StreamingDiLoCo
from minidist.methods.gossip import Graph, exponential
from minidist.methods.pieces import assign_fragments
from minidist.sharded import ShardedOptimizer
from tests import harness, method_checks, models
from tests.method_checks import METHODS, PERIOD, Make, Run, same

IDENTICAL = {
    "local_sgd": [3, 6, 9],
    "post_local_sgd": [1, 2, 3, 4, 7, 10],
    "diloco": [3, 6, 9],
    "sparse_loco": [3, 6, 9],
}
EVERY_STEP: dict[str, Make] = {
    "local_sgd": lambda: LocalSGD(1),
    "post_local_sgd": lambda: LocalSGD(1, local_after=2),
    "diloco": lambda: DiLoCo(1, outer_lr=1.0, outer_momentum=0.0),
    "streaming_diloco": lambda: StreamingDiLoCo(1, 2, 0, 0.0, outer_lr=1.0, outer_momentum=0.0),
    "sparse_loco": lambda: SparseLoCo(1, fraction=1.0),
}
each_method = pytest.mark.parametrize("name", METHODS)


def on_threads(check: Callable[..., None], world_size: int, *args: Any) -> None:
    run_threads(lambda comm: check(comm, *args), world_size, timeout_s=60)


def needs_ranks(name: str, world_size: int) -> bool:
    return name == "gossip" and world_size == 1


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("name", EVERY_STEP)
def test_a_period_of_one_is_data_parallel_training(name: str, world_size: int) -> None:
    on_threads(method_checks.check_equals_ddp, world_size, EVERY_STEP[name])


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("name", ["diloco", "streaming_diloco"])
def test_it_is_what_one_process_computes(name: str, world_size: int) -> None:
    on_threads(method_checks.check_equals_one_process, world_size, METHODS[name])


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("name", IDENTICAL)
def test_replicas_are_identical_when_they_should_be(name: str, world_size: int) -> None:
    on_threads(method_checks.check_replicas_identical, world_size, METHODS[name], IDENTICAL[name])


@pytest.mark.parametrize("world_size", [1, 3])
@each_method
def test_the_shown_model_is_one(name: str, world_size: int) -> None:
    if not needs_ranks(name, world_size):
        on_threads(method_checks.check_shown_model, world_size, METHODS[name])


@each_method
def test_a_resume_goes_on_to_the_same_bits(name: str, tmp_path: Path) -> None:
    on_threads(method_checks.check_resume, 2, METHODS[name], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 3])
@each_method
def test_a_resume_goes_on_to_the_same_bits_on(name: str, world_size: int, tmp_path: Path) -> None:
    if not needs_ranks(name, world_size):
        on_threads(method_checks.check_resume, world_size, METHODS[name], tmp_path)


def test_streaming_without_streams_is_diloco_and_diloco_without_an_optimizer_is_local_sgd() -> None:
    def job(comm: Communicator) -> None:
        streaming = Run(comm, StreamingDiLoCo(PERIOD, 1, 0, 0.0), method_checks.adamw).steps(7)
        assert same(streaming.parameters(), Run(comm, DiLoCo(PERIOD), method_checks.adamw).steps(7).parameters())
        plain = Run(comm, DiLoCo(PERIOD, 1.0, 0.0)).steps(7).parameters()
        for left, right in zip(plain, Run(comm, LocalSGD(PERIOD)).steps(7).parameters(), strict=True):
            torch.testing.assert_close(left, right, rtol=0, atol=1e-13)

    run_threads(job, 3, timeout_s=60)


# Gossip -------------------------------------------------------------------------------------------


def star(round: int, num_workers: int) -> list[tuple[int, int]]:
    """Rank 0 tells all others, and one of them tells it: a graph without which weights would do nothing."""
    told = [(0, rank) for rank in range(1, num_workers)]
    return [*told, (1 + round % (num_workers - 1), 0)]


@pytest.mark.parametrize("world_size", [2, 3, 4])
@pytest.mark.parametrize("graph", [exponential, star])
def test_gossip_conserves_the_sum_and_reaches_the_mean(graph: Graph, world_size: int) -> None:
    on_threads(method_checks.check_gossip_conserves_the_sum, world_size, graph)


def test_gossip_without_weights_would_miss_the_mean_of_a_star() -> None:
    def without_weights(graph: Graph) -> Gossip:
        method = Gossip(graph)
        exchange = method._exchange

        def exchange_and_forget(step: int) -> None:
            exchange(step)
            method.weight = 1.0

        method._exchange = exchange_and_forget  # type: ignore[method-assign]
        return method

    with pytest.raises(AssertionError):
        on_threads(method_checks.check_gossip_conserves_the_sum, 3, star, without_weights)


# Bytes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [2, 3])
def test_bytes_are_those_of_the_formula(world_size: int) -> None:
    """In a period, over all ranks: those that crossed the communicator."""
    numel = 36 + 6  # each of them a multiple of the ranks, so that no schedule fills anything up
    nbytes = 8 * numel
    all_reduce = 2 * (world_size - 1)
    formulas: dict[Make, float] = {
        EveryStep: PERIOD * all_reduce * nbytes,
        METHODS["local_sgd"]: all_reduce * nbytes,
        METHODS["diloco"]: all_reduce * nbytes,
        METHODS["streaming_diloco"]: all_reduce * nbytes,
        METHODS["sparse_loco"]: world_size * (world_size - 1) * round(0.2 * numel) * (4 + 8),
        METHODS["gossip"]: PERIOD * world_size * (nbytes + 8),
        lambda: DiLoCo(PERIOD, hook=Half()): all_reduce * nbytes / 2,
    }
    for make, formula in formulas.items():
        sent = run_threads(lambda comm, make=make: method_checks.bytes_per_period(comm, make), world_size)
        assert sum(sent) == formula, make().describe()


class Half:
    """A hook that sends numbers in half of the bytes of float64."""

    def __call__(self, bucket: Bucket, comm: Communicator) -> Work:
        cast = bucket.flat.float()
        return comm.all_reduce(cast, async_op=True).then(lambda: bucket.flat.copy_(cast))


# Workers of several ranks -------------------------------------------------------------------------


WORKERS: dict[str, Make] = {
    "local_sgd": lambda: LocalSGD(PERIOD, ranks_per_worker=2),
    "diloco": lambda: DiLoCo(PERIOD, ranks_per_worker=2),
    "streaming_diloco": lambda: StreamingDiLoCo(PERIOD, 2, 1, ranks_per_worker=2),
    "sparse_loco": lambda: SparseLoCo(PERIOD, 0.2, ranks_per_worker=2),
    "gossip": lambda: Gossip(ranks_per_worker=2),
}


@pytest.mark.parametrize("name", WORKERS)
def test_the_ranks_of_a_worker_have_one_replica(name: str, tmp_path: Path) -> None:
    def job(comm: Communicator) -> None:
        run = Run(comm, WORKERS[name](), method_checks.adamw)
        for _ in range(2 * PERIOD + 1):
            everywhere = run.steps(1).everywhere()
            assert same(everywhere[0], everywhere[1])
            assert same(everywhere[2], everywhere[3])
            if name != "gossip":  # two workers that tell each other have the mean
                assert same(everywhere[0], everywhere[2]) == (run.step in IDENTICAL.get(name, []))
            with run.method.shown():
                assert method_checks.are_replicas_identical(run)
        run.method.close()

    run_threads(job, 4, timeout_s=60)


def test_a_worker_is_a_rank_with_the_batches_of_all_of_its_own() -> None:
    """And between workers each value crosses once: the bytes are those of ranks that are workers."""
    models_of: dict[int, list[Any]] = {}

    def job(comm: Communicator, ranks_per_worker: int) -> tuple[list[torch.Tensor], int]:
        num_workers = comm.world_size // ranks_per_worker
        method = DiLoCo(PERIOD, ranks_per_worker=ranks_per_worker)
        run = Run(comm, method, model=models.seeded(models.mlp().double()))
        worker, place = divmod(comm.rank, ranks_per_worker)
        before = method.comm.traffic.bytes
        for step in range(1, 2 * PERIOD + 1):
            run.step = step
            inputs = torch.randn(8, 5, generator=torch.Generator().manual_seed(10 * step + worker)).double()
            part = inputs.chunk(ranks_per_worker)[place]
            run.on(lambda model, part=part: model(part).square().mean())
        assert method.comm.world_size == num_workers
        return run.parameters(), method.comm.traffic.bytes - before

    for ranks_per_worker in (1, 2):
        models_of[ranks_per_worker] = run_threads(
            lambda comm, k=ranks_per_worker: job(comm, k), 2 * ranks_per_worker, timeout_s=60
        )
    for left, right in zip(models_of[1][0][0], models_of[2][0][0], strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=1e-13)
    alone, together = (sum(nbytes for _, nbytes in models_of[k]) for k in (1, 2))
    assert alone <= together <= alone + 4 * 2 * 8  # what fills up the last share


def _meet_twice(comm: Communicator) -> None:
    """Rank 3 may leave the first barrier, and fail, before this rank has left it."""
    comm.barrier()
    comm.barrier(timeout_s=10)


def test_a_rank_that_fails_with_parts_on_their_way_waits_for_nobody() -> None:
    """The others wait for it elsewhere: it would wait out its timeout, and only then tell them why."""
    told: list[str] = []

    def job(comm: Communicator) -> None:
        with StreamingDiLoCo(4, 1, 3, ranks_per_worker=2) as method:
            Run(comm, method).steps(3)
            if comm.rank == 3:
                comm.barrier()  # all have come so far
                method.after_step(4)
                raise OSError("the disk is full")
            with pytest.raises(PeerLostError) as caught:
                _meet_twice(comm)
            told.append(str(caught.value))

    with pytest.raises(OSError, match="the disk is full"):
        run_threads(job, 4, timeout_s=20)
    assert len(told) == 3
    assert all("rank 3 is gone: OSError: the disk is full" in message for message in told), told


@pytest.mark.slow
@pytest.mark.parametrize("name", WORKERS)
def test_workers_resume_to_the_same_bits(name: str, tmp_path: Path) -> None:
    on_threads(method_checks.check_resume, 4, WORKERS[name], tmp_path)


# What is wrong is caught --------------------------------------------------------------------------


def flipped(bucket: Bucket, comm: Communicator) -> Work:
    bucket.flat.neg_()
    return AllReduce()(bucket, comm)


def test_a_flipped_pseudo_gradient_is_caught() -> None:
    with pytest.raises(AssertionError):
        on_threads(method_checks.check_equals_one_process, 2, lambda: DiLoCo(PERIOD, hook=flipped))
    with pytest.raises(AssertionError):
        on_threads(method_checks.check_equals_ddp, 2, lambda: DiLoCo(1, 1.0, 0.0, hook=flipped))


def test_unequal_initial_models_are_caught() -> None:
    """Where nobody had made them equal; `begin` does, and without the broadcast of the wrapper, too."""

    def job(comm: Communicator) -> None:
        run = Run(comm, DiLoCo(PERIOD))
        assert method_checks.are_replicas_identical(run)
        with torch.no_grad():
            next(run.ddp.parameters()).add_(comm.rank)
        run.method.begin_anew()
        assert not method_checks.are_replicas_identical(run.steps(PERIOD))

    run_threads(job, 2, timeout_s=60)


def test_fragments_in_another_order_are_caught() -> None:
    def check(comm: Communicator) -> None:
        run = Run(comm, StreamingDiLoCo(PERIOD, 2, 0, 0.0))
        if comm.rank == 1:
            first, second = run.method.pieces
            first.fragment, second.fragment = second.fragment, first.fragment
        run.steps(3 * PERIOD)
        with run.method.shown():
            assert method_checks.are_replicas_identical(run)

    with pytest.raises((AssertionError, CommError)):
        on_threads(check, 2)


@pytest.mark.parametrize(
    ("lost", "name"), [("hook", "sparse_loco"), ("momentum", "diloco"), ("mean", "streaming_diloco")]
)
def test_a_state_that_is_lost_at_a_resume_is_caught(lost: str, name: str, tmp_path: Path) -> None:
    def make() -> Method:
        method = METHODS[name]()
        load = method.load_state_dict

        def load_less(state: dict[str, Any]) -> None:
            if lost == "hook":
                state["method"]["hook"] = {"errors": {}, "compressor": {}}
            else:
                for outer in state["method"]["outers"]:
                    outer.update(
                        {"mean": None} if lost == "mean" else {"optimizer": {**outer["optimizer"], "state": {}}}
                    )
            load(state)

        method.load_state_dict = load_less  # type: ignore[method-assign]
        return method

    with pytest.raises(AssertionError):
        on_threads(method_checks.check_resume, 2, make, tmp_path)


def test_a_checkpoint_of_another_method_is_refused(tmp_path: Path) -> None:
    def job(comm: Communicator) -> None:
        method_checks.engine(comm, DiLoCo(PERIOD), tmp_path).fit(method_checks.loader(comm), 1)
        for other in (DiLoCo(PERIOD + 1), LocalSGD(PERIOD), EveryStep()):
            with pytest.raises(CheckpointError, match=r"of another training: the method is DiLoCo\(period=3, .* there"):
                method_checks.engine(comm, other, tmp_path, resume=True).fit(method_checks.loader(comm), 2)

    run_threads(job, 2, timeout_s=60)


def test_fit_goes_on_from_the_replicas(tmp_path: Path) -> None:
    """Not from what is shown in between."""

    def job(comm: Communicator) -> None:
        once, twice = (method_checks.engine(comm, DiLoCo(PERIOD), tmp_path / name) for name in ("once", "twice"))
        once.fit(method_checks.loader(comm), 2)
        for epochs in (1, 2):
            twice.fit(method_checks.loader(comm), epochs)
        assert same(method_checks.ended(once), method_checks.ended(twice))

    run_threads(job, 2, timeout_s=60)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LocalSGD(0), "LocalSGD: period must be at least 1, got 0"),
        (lambda: LocalSGD(2, -1), "LocalSGD: local_after must be at least 0, got -1"),
        (lambda: LocalSGD(2, 5, 2), "LocalSGD: local_after=5 averages the gradients of all ranks"),
        (lambda: DiLoCo(0), "DiLoCo: period must be at least 1, got 0"),
        (lambda: DiLoCo(2.5), "DiLoCo: period must be a whole number, got 2.5"),
        (lambda: LocalSGD("8"), "LocalSGD: period must be a whole number, got '8'"),
        (lambda: Gossip(ranks_per_worker=1.5), "Gossip: ranks_per_worker must be a whole number, got 1.5"),
        (lambda: DiLoCo(outer_lr=0), "DiLoCo: outer_lr must be greater than 0 and finite, got 0"),
        (lambda: DiLoCo(outer_lr=math.inf), "DiLoCo: outer_lr must be greater than 0 and finite, got inf"),
        (lambda: SparseLoCo(outer_lr=math.nan), "SparseLoCo: outer_lr must be greater than 0 and finite, got nan"),
        (lambda: DiLoCo(outer_momentum=-1), "DiLoCo: outer_momentum must be at least 0 and below 1, got -1"),
        (lambda: StreamingDiLoCo(outer_momentum=1), "outer_momentum must be at least 0 and below 1, got 1"),
        (lambda: DiLoCo(outer_momentum=math.nan), "DiLoCo: outer_momentum must be at least 0 and below 1, got nan"),
        (lambda: DiLoCo(ranks_per_worker=0), "DiLoCo: ranks_per_worker must be at least 1, got 0"),
        (lambda: StreamingDiLoCo(4, tau=4), "StreamingDiLoCo: tau must be below period, 4, .* got 4"),
        (lambda: StreamingDiLoCo(4, tau=-1), "StreamingDiLoCo: tau must be at least 0, got -1"),
        (lambda: StreamingDiLoCo(mixing=math.nan), "mixing must be at least 0 and below 1, got nan"),
        (lambda: StreamingDiLoCo(num_fragments=0), "StreamingDiLoCo: num_fragments must be at least 1, got 0"),
        (lambda: StreamingDiLoCo(mixing=1), "StreamingDiLoCo: mixing must be at least 0 and below 1, got 1"),
        (lambda: SparseLoCo(fraction=0), "fraction must be above 0 and at most 1, got 0"),
        (lambda: SparseLoCo(fraction=1.5), "fraction must be above 0 and at most 1, got 1.5"),
        (lambda: SparseLoCo(decay=2), "decay must be at least 0 and at most 1, got 2"),
    ],
)
def test_bad_settings(make: Make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("make", "world_size", "message"),
    [
        (Gossip, 1, r"\[rank 0/1\] Gossip: there is nobody to tell with one worker; use more ranks"),
        (lambda: DiLoCo(ranks_per_worker=2), 3, r"ranks_per_worker is 2, which does not divide the number of ranks, 3"),
        (lambda: StreamingDiLoCo(num_fragments=5), 2, r"num_fragments is 5, and there are 4 parameters to share out"),
    ],
)
def test_what_does_not_fit_the_ranks_or_the_model(make: Make, world_size: int, message: str) -> None:
    def job(comm: Communicator) -> None:
        with pytest.raises(ValueError, match=message):
            Run(comm, make())

    run_threads(job, world_size, timeout_s=30)


def test_what_is_put_together_wrongly_is_refused() -> None:
    def job(comm: Communicator) -> None:
        ddp = DistributedDataParallel(models.mlp(), comm)
        optimizer = method_checks.sgd(ddp)
        alone = comm.split(comm.rank)
        apart = DistributedDataParallel(models.mlp(), alone)
        with pytest.raises(ValueError, match="wrapped over 1 of the 2 ranks, and the others would train apart"):
            EveryStep().begin(apart, optimizer, comm)
        with pytest.raises(ValueError, match=r"wrap it over replica_comm\(comm\) of this method"):
            DiLoCo().begin(apart, optimizer, comm)
        with pytest.raises(ValueError, match=r"wrap it over replica_comm\(comm\) of this method"):
            DiLoCo(ranks_per_worker=2).begin(ddp, optimizer, comm)  # whose workers nobody has asked for
        method = DiLoCo()
        method.begin(ddp, optimizer, comm)
        with pytest.raises(RuntimeError, match="it serves another training"):
            method.begin(ddp, optimizer, comm)
        ddp.module[0].bias.requires_grad_(False)
        with pytest.raises(RuntimeError, match="frozen or unfrozen since training began"):
            method.after_step(1)
        sharded = DistributedDataParallel(models.mlp(), comm)
        in_shares = ShardedOptimizer(sharded.parameters(), torch.optim.SGD, comm, lr=0.1)
        with pytest.raises(ValueError, match="a ShardedOptimizer has the ranks step one model together"):
            DiLoCo().begin(sharded, in_shares, comm)

    run_threads(job, 2, timeout_s=30)


def test_fragments_are_about_equal_and_none_is_empty() -> None:
    assert assign_fragments([1, 1, 1, 1], 2) == [0, 0, 1, 1]
    assert assign_fragments([100, 1, 1], 3) == [0, 1, 2]
    assert assign_fragments([1, 1, 100], 3) == [0, 1, 2]
    assert assign_fragments([3, 1, 1, 1], 2) == [0, 1, 1, 1]
    assert assign_fragments([5], 1) == [0]


# Processes ----------------------------------------------------------------------------------------


def test_all_of_it_holds_over_gloo(tmp_path: Path) -> None:
    returncode, output = harness.run_forked(
        "tests.method_ranks", str(tmp_path), world_size=2, output=tmp_path / "output.txt", limit_s=110
    )
    assert returncode == 0, output


def test_a_summary_says_what_a_rank_sent(tmp_path: Path) -> None:
    """Without evaluations and checkpoints, which cost more here; a roll call has less than 100 bytes per rank."""

    def job(comm: Communicator) -> float:
        engine = method_checks.engine(comm, LocalSGD(4), tmp_path)
        return engine.fit(method_checks.loader(comm), 2, method_checks.loader(comm, train=False)).sent_bytes

    nbytes = 8 * (5 * 8 + 8 + 8 * 3 + 3 + 3 + 3)
    for sent in run_threads(job, 2, timeout_s=60):
        assert 4 * nbytes < sent < 4 * nbytes + 16 * 100 + 2 * 500


def test_what_a_rank_sends_within_its_worker_counts(tmp_path: Path) -> None:
    """Each step all gradients to the other rank, each fourth the half of the parameters to either neighbour."""

    def job(comm: Communicator) -> float:
        with LocalSGD(4, ranks_per_worker=2) as method:
            return method_checks.engine(comm, method, tmp_path).fit(method_checks.loader(comm), 2).sent_bytes

    nbytes = 8 * (5 * 8 + 8 + 8 * 3 + 3 + 3 + 3)
    for sent in run_threads(job, 4, timeout_s=60):
        assert (16 + 4) * nbytes < sent < (16 + 4) * nbytes + 16 * 200 + 2 * 1000


def test_what_is_on_its_way_at_the_end_of_an_epoch_counts(tmp_path: Path) -> None:
    def job(comm: Communicator) -> float:
        engine = method_checks.engine(comm, StreamingDiLoCo(8, num_fragments=1, tau=2), tmp_path)
        return engine.fit(method_checks.loader(comm), 3, method_checks.loader(comm, train=False)).sent_bytes

    nbytes = 8 * (5 * 8 + 8 + 8 * 3 + 3 + 3 + 3)
    for sent in run_threads(job, 2, timeout_s=60):
        assert 2 * nbytes < sent < 3 * nbytes + 24 * 100 + 3 * 500
