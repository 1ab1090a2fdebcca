"""Loaders: what they give has to be what they say, on every rank, and something."""

import pytest
from torch.utils.data import DataLoader, TensorDataset

from backends.serial import SerialCommunicator
from minidist.training.checkpoint import Checkpoints
from minidist.training.sampler import ShardedSampler
from tests.test_engine import NUM_SAMPLES, WORLDS, failures, make_engine, samples, shard


def test_loaders_of_different_lengths_are_refused():
    def job(comm):
        batch = samples().tensors
        make_engine(comm).fit([batch] * (2 + comm.rank), epochs=1)

    for message in failures(job, 2, ValueError):
        assert "same number of batches, got [2, 3]; use ShardedSampler with pad=True" in message


class Loader:
    """Says one number of batches and gives another, by rank and by epoch."""

    def __init__(self, says, *gives):
        self.says, self.gives = says, list(gives)

    def __len__(self):
        return self.says

    def __iter__(self):
        num_batches = self.gives.pop(0) if self.gives else 0
        return iter([samples(6).tensors] * num_batches)


EMPTY = TensorDataset(*(tensor[:0] for tensor in samples().tensors))


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        (lambda: DataLoader(samples(5), 6, drop_last=True), "the training loader has no batch; give more samples"),
        (lambda: DataLoader(EMPTY, 6), "the training loader has no batch"),
        (list, "the training loader has no batch"),
        (lambda: Loader(3, 0), "loader of rank 0 gave no batch in epoch 0, though its length is 3"),
        (lambda: Loader(3, 3), "loader of rank 0 gave no batch in epoch 1, though its length is 3"),
        (lambda: Loader(3, 2), "loader said that epoch 0 has 3 batches and ended after 2"),
        (lambda: Loader(3, 3, 2), "loader said that epoch 1 has 3 batches and ended after 2"),
        (lambda: Loader(3, 4), "loader said that epoch 0 has 3 batches and goes on"),
    ],
    ids=["drop-last", "no-samples", "empty-list", "gives-none", "read-once", "fewer", "fewer-later", "more"],
)
@pytest.mark.parametrize("accumulation_steps", [1, 2])
@pytest.mark.parametrize("world_size", WORLDS)
def test_training_on_other_batches_than_were_promised_is_refused(loader, message, accumulation_steps, world_size):
    def job(comm):
        make_engine(comm, accumulation_steps=accumulation_steps).fit(loader(), epochs=2)

    for found in failures(job, world_size, ValueError):
        assert message in found


def test_rank_whose_loader_gives_nothing_is_named_on_every_rank():
    for message in failures(lambda comm: make_engine(comm).fit(Loader(3, 3 - 3 * comm.rank), epochs=1), 2, ValueError):
        assert "the training loader of rank 1 gave no batch in epoch 0, though its length is 3" in message


def test_loader_without_a_length_is_refused():
    for message in failures(lambda comm: make_engine(comm).fit(iter([samples(6).tensors]), epochs=1), 2, TypeError):
        assert "the training loader has no length" in message


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        (lambda comm: [], "the eval_loader has no batch on any rank"),
        (lambda comm: Loader(3, 0), "the eval_loader gave no sample on any rank"),
        (lambda comm: Loader(3, 3), "the eval_loader gave no sample on any rank"),
        (lambda comm: iter([samples(6).tensors]), "the eval_loader gave no sample on any rank"),
        (lambda comm: None if comm.rank else [samples(6).tensors], "got rank 0 one, rank 1 none"),
    ],
    ids=["empty-list", "gives-none", "read-once", "iterator", "not-everywhere"],
)
def test_evaluating_nothing_between_epochs_is_refused(loader, message):
    def job(comm):
        make_engine(comm).fit(shard(comm, samples()), 2, loader(comm))

    for found in failures(job, 2, ValueError):
        assert message in found


def test_no_epochs_are_refused():
    with pytest.raises(ValueError, match="epochs must be at least 1, got 0"):
        make_engine(SerialCommunicator()).fit([samples(6).tensors], epochs=0)


def test_loader_that_became_shorter_in_the_middle_of_an_epoch_is_refused(tmp_path):
    def job(comm, loader, epochs, resume):
        checkpoints = Checkpoints(tmp_path, comm, every_steps=4, resume=resume)
        make_engine(comm, checkpoints=checkpoints).fit(loader, epochs)

    for _ in failures(lambda comm: job(comm, Loader(5, 4), 1, False), 2, ValueError):
        continue
    for message in failures(lambda comm: job(comm, Loader(3, 3), 1, True), 2, ValueError):
        assert "training stopped after batch 4 of epoch 0, and now the training loader has only 3" in message


def test_batch_size_of_loader_and_sampler_must_agree():
    sampler = ShardedSampler(NUM_SAMPLES, 0, 1, 5, shuffle=False)
    engine = make_engine(SerialCommunicator())
    with pytest.raises(ValueError, match="the loader's batch_size is 6, its sampler's 5; give both the same"):
        engine.fit(DataLoader(samples(), 6, sampler=sampler), epochs=1)
