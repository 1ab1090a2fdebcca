"""A training that goes on with another number of ranks."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from backends.thread import run_threads
from minidist import ShardedOptimizer
from minidist.communicator import Communicator
from minidist.compression import ErrorFeedback, TopK
from minidist.ddp import DistributedDataParallel
from minidist.engine import Engine
from minidist.errors import CheckpointError
from minidist.training.checkpoint import Checkpoints
from minidist.training.report import Summary
from minidist.training.sampler import ShardedSampler

NUM_SAMPLES, BATCH_SIZE = 23, 2


class Counted(Dataset[tuple[Tensor, Tensor]]):
    """Samples that write down which of them were asked for."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def __len__(self) -> int:
        return NUM_SAMPLES

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        self.asked.append(index)
        return torch.full((3,), index / NUM_SAMPLES), torch.tensor(index % 4)


def engine_of(comm: Communicator, directory: Path, in_shares: bool, elastic: bool, stop_at: int) -> Engine:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.LayerNorm(8), nn.Linear(8, 4))
    hook = {} if in_shares else {"hook": ErrorFeedback(TopK(0.5))}
    ddp = DistributedDataParallel(model, comm, **hook)
    if in_shares:
        optimizer: torch.optim.Optimizer = ShardedOptimizer(ddp.parameters(), torch.optim.Adam, comm, lr=0.01)
    else:
        optimizer = torch.optim.Adam(ddp.parameters(), lr=0.01)

    def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
        if comm.rank == 0 and engine.position.step == stop_at:
            engine.stop_signal.received = True
        return nn.functional.cross_entropy(outputs, targets)

    checkpoints = Checkpoints(directory, comm, every_steps=1, resume=stop_at == 0, elastic=elastic)
    engine = Engine(ddp, optimizer, loss_fn, comm, log_every=1, checkpoints=checkpoints)
    return engine


def train(
    world_size: int,
    directory: Path,
    in_shares: bool = False,
    elastic: bool = True,
    stop_at: int = 0,
    epochs: int = 2,
    batch_size: int = BATCH_SIZE,
) -> list[tuple[Summary, list[int], list[Tensor]]]:
    """Train on threads; a training that is told where to stop is the first one."""

    def job(comm: Communicator) -> tuple[Summary, list[int], list[Tensor]]:
        samples = Counted()
        sampler = ShardedSampler(NUM_SAMPLES, comm.rank, comm.world_size, batch_size, shuffle=True, seed=1)
        loader = DataLoader(samples, batch_size, sampler=sampler, generator=torch.Generator())
        engine = engine_of(comm, directory, in_shares, elastic, stop_at)
        summary = engine.fit(loader, epochs)
        return summary, samples.asked, [p.detach().clone() for p in engine.model.parameters()]

    return run_threads(job, world_size, timeout_s=30)


def asked(results: list[tuple[Summary, list[int], list[Tensor]]]) -> Counter[int]:
    return Counter(index for _, indices, _ in results for index in indices)


@pytest.mark.parametrize("in_shares", [False, True], ids=["whole", "sharded"])
@pytest.mark.parametrize(("before", "after"), [(3, 2), (2, 3), (2, 1), (1, 2)])
@pytest.mark.parametrize("stop_at", [2, pytest.param(1, marks=pytest.mark.slow)])
def test_the_rest_of_the_epoch_is_shared_out_anew(
    before: int, after: int, stop_at: int, in_shares: bool, tmp_path: Path
) -> None:
    """Each sample once, but for those that fill up the last batch; and all ranks end with the same parameters."""
    stopped = train(before, tmp_path, in_shares, stop_at=stop_at)
    num_steps = stopped[0][0].steps
    assert stopped[0][0].stopped
    trained_on = Counter(index for _, indices, _ in stopped for index in indices[: num_steps * BATCH_SIZE])
    resumed = train(after, tmp_path, in_shares, epochs=1)
    every = trained_on + asked(resumed)
    assert set(every) == set(range(NUM_SAMPLES))
    rest = NUM_SAMPLES - before * num_steps * BATCH_SIZE
    assert every.total() == NUM_SAMPLES + -rest % after
    assert resumed[0][0].steps == num_steps + -(-(rest + -rest % after) // after // BATCH_SIZE)
    assert all(torch.equal(p, q) for _, _, other in resumed for p, q in zip(other, resumed[0][2], strict=True))
    again = train(before, tmp_path, in_shares, epochs=2)  # and back, at the end of the epoch
    assert asked(again).total() == NUM_SAMPLES + -NUM_SAMPLES % before


def test_the_batch_of_all_ranks_may_be_kept(tmp_path: Path) -> None:
    """By another batch size of each."""
    stopped = train(2, tmp_path, stop_at=2, batch_size=2)
    num_steps = stopped[0][0].steps
    trained_on = Counter(index for _, indices, _ in stopped for index in indices[: num_steps * 2])
    every = trained_on + asked(train(1, tmp_path, epochs=1, batch_size=4))
    assert every == Counter(range(NUM_SAMPLES))


def test_buffers_are_those_of_rank_0(tmp_path: Path) -> None:
    def job(comm: Communicator, value: float, resume: bool) -> list[float]:
        model = nn.Linear(3, 4)
        model.register_buffer("kept", torch.full((1,), value + comm.rank))
        model.register_buffer("not_kept", torch.full((1,), value + comm.rank), persistent=False)
        ddp = DistributedDataParallel(model, comm, broadcast_buffers=False)
        optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1)
        checkpoints = Checkpoints(tmp_path, comm, resume=resume, elastic=True)
        engine = Engine(ddp, optimizer, nn.functional.cross_entropy, comm, checkpoints=checkpoints)
        engine.fit([(torch.ones(2, 3), torch.tensor([0, 1]))], 2 if resume else 1)
        return [model.kept.item(), model.not_kept.item()]

    first = run_threads(lambda comm: job(comm, 5.0, False), 2, timeout_s=30)
    assert run_threads(lambda comm: job(comm, 9.0, True), 3, timeout_s=30) == [first[0]] * 3


def test_an_epoch_of_which_nothing_is_left_ends(tmp_path: Path) -> None:
    stopped = train(2, tmp_path, stop_at=6)  # the last batch of the epoch
    assert stopped[0][0].steps >= 6
    resumed = train(3, tmp_path)
    assert resumed[0][0].epochs == 2
    assert asked(resumed).total() in (24, 0)


def test_a_hook_begins_anew_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train(2, tmp_path, stop_at=1)
    train(1, tmp_path)
    assert "the hook begins anew: its state is of 2 ranks" in caplog.text


def test_without_leave_it_is_refused(tmp_path: Path) -> None:
    train(2, tmp_path, stop_at=1)
    with pytest.raises(CheckpointError, match=r"of 2 ranks, this run has 1; .* go on with elastic=true"):
        train(1, tmp_path, elastic=False)


def test_a_loader_that_cannot_be_cut_anew_is_named(tmp_path: Path) -> None:
    def job(comm: Communicator, stop_at: int) -> None:
        batches = [(torch.randn(2, 3), torch.tensor([0, 1])) for _ in range(4)]
        engine_of(comm, tmp_path, False, True, stop_at).fit(batches, 2)

    run_threads(lambda comm: job(comm, 2), 2, timeout_s=30)
    with pytest.raises(ValueError, match=r"this loader cannot share out the rest of it anew; use ShardedSampler"):
        run_threads(lambda comm: job(comm, 0), 1, timeout_s=30)
