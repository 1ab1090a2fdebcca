"""The training loop: right steps, exact metrics, and ranks that agree on when to stop, fail and go on."""

import json
import math
import re
import signal
from dataclasses import fields

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from backends.serial import SerialCommunicator
from backends.thread import run_threads
from minidist import ShardedOptimizer
from minidist.compression import ErrorFeedback, TopK
from minidist.ddp import DistributedDataParallel
from minidist.engine import Engine
from minidist.errors import CheckpointError
from minidist.training.checkpoint import Checkpoints
from minidist.training.optimisation import Optimisation
from minidist.training.report import Report
from minidist.training.sampler import ShardedSampler

WORLDS = [1, 2, 3]
NUM_SAMPLES, NUM_FEATURES, NUM_CLASSES = 30, 5, 3


def samples(num_samples=NUM_SAMPLES):
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(num_samples, NUM_FEATURES, generator=generator, dtype=torch.float64)
    return TensorDataset(inputs, torch.randint(NUM_CLASSES, (num_samples,), generator=generator))


def make_model(*extra):
    layers = [nn.Linear(NUM_FEATURES, 8), *extra, nn.Tanh(), nn.Linear(8, NUM_CLASSES)]
    model = nn.Sequential(*layers).double()
    with torch.no_grad():
        for parameter in model.parameters():  # closed form: threads share one random generator
            parameter.copy_(torch.linspace(-0.5, 0.7, parameter.numel()).cos().view_as(parameter))
    return model


def shard(comm, data, global_batch_size=6, train=True):
    batch_size = global_batch_size // comm.world_size
    sampler = ShardedSampler(len(data), comm.rank, comm.world_size, batch_size, shuffle=train, seed=3, pad=train)
    return DataLoader(data, batch_size, sampler=sampler, generator=torch.Generator())


def make_engine(comm, lr=0.2, model=None, loss_fn=nn.functional.cross_entropy, in_shares=False, ddp=None, **options):
    """``options`` are those of `Optimisation` and of the engine, ``ddp`` those of the wrapper."""
    model = DistributedDataParallel(model or make_model(), comm, **(ddp or {}))
    settings = {"lr": lr, "momentum": 0.9}
    if in_shares:
        optimizer = ShardedOptimizer(model.parameters(), torch.optim.SGD, comm, **settings)
    else:
        optimizer = torch.optim.SGD(model.parameters(), **settings)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.8)
    steps = {field.name: options.pop(field.name) for field in fields(Optimisation) if field.name in options}
    return Engine(model, optimizer, loss_fn, comm, Optimisation(scheduler, **steps), **options)


def parameters(engine):
    return [parameter.detach().clone() for parameter in engine.model.module.parameters()]


def on_ranks(job, world_size):
    return run_threads(job, world_size, timeout_s=30)


def failures(job, world_size, kind):
    """Run ``job(comm)`` on threads and return the message of the error of this kind that each of them raised."""

    def caught(comm):
        with pytest.raises(kind) as error:
            job(comm)
        return str(error.value)

    return on_ranks(caught, world_size)


# Steps ------------------------------------------------------------------------------------------


def train_by_hand(epochs, accumulation_steps, max_grad_norm):
    """Train one process on the joined batches, with torch alone."""
    model, data = make_model(), samples()
    optimizer = torch.optim.SGD(model.parameters(), 0.2, momentum=0.9)
    num_steps = 0
    for epoch in range(epochs):
        sampler = ShardedSampler(NUM_SAMPLES, 0, 1, 6, shuffle=True, seed=3)
        sampler.set_epoch(epoch)
        batches = list(DataLoader(data, 6, sampler=sampler, generator=torch.Generator()))
        for start in range(0, len(batches), accumulation_steps):
            group = batches[start : start + accumulation_steps]
            optimizer.zero_grad()
            for inputs, targets in group:
                (nn.functional.cross_entropy(model(inputs), targets) / len(group)).backward()
            if max_grad_norm is not None:
                torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
            for settings in optimizer.param_groups:
                settings["lr"] = 0.2 * 0.8 ** (num_steps // 2)
            optimizer.step()
            num_steps += 1
    return list(model.parameters()), num_steps


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize(("accumulation_steps", "max_grad_norm"), [(1, None), (2, 0.1), (5, None)])
def test_fit_equals_torch_on_the_joined_batches(world_size, accumulation_steps, max_grad_norm):
    expected, num_steps = train_by_hand(3, accumulation_steps, max_grad_norm)

    def job(comm):
        engine = make_engine(comm, accumulation_steps=accumulation_steps, max_grad_norm=max_grad_norm)
        return engine.fit(shard(comm, samples()), epochs=3), parameters(engine)

    for summary, got in on_ranks(job, world_size):
        assert (summary.epochs, summary.steps, summary.stopped) == (3, num_steps, False)
        for left, right in zip(got, expected, strict=True):
            torch.testing.assert_close(left, right, rtol=0, atol=1e-12)


def test_fit_goes_on_where_it_ended():
    comm = SerialCommunicator()
    once, twice = make_engine(comm), make_engine(comm)
    once.fit(shard(comm, samples()), epochs=3)
    twice.fit(shard(comm, samples()), epochs=1)
    summary = twice.fit(shard(comm, samples()), epochs=3)
    assert summary.epochs == 3
    assert all(map(torch.equal, parameters(once), parameters(twice)))


def test_autocast_reaches_the_forward_pass():
    seen = []

    def loss_fn(outputs, targets):
        seen.append(outputs.dtype)
        return nn.functional.cross_entropy(outputs.float(), targets)

    engine = make_engine(SerialCommunicator(), model=make_model().float(), autocast_dtype=torch.bfloat16)
    engine.loss_fn = loss_fn
    inputs, targets = samples().tensors
    engine.fit([(inputs.float(), targets)], epochs=1)
    assert seen == [torch.bfloat16]


# Metrics ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize("num_samples", [1, 2, 7, 30])
def test_evaluation_is_exact_for_uneven_and_empty_shares(num_samples, world_size):
    data = samples(num_samples)
    outputs, targets = make_model()(data.tensors[0]), data.tensors[1]
    loss = nn.functional.cross_entropy(outputs, targets).item()
    num_right = (outputs.argmax(dim=1) == targets).sum().item()
    for metrics in on_ranks(lambda comm: make_engine(comm).evaluate(shard(comm, data, train=False)), world_size):
        assert metrics.loss == pytest.approx(loss, abs=1e-12)
        assert metrics.accuracy == num_right / num_samples
        assert metrics.num_samples == num_samples


def test_accuracy_is_nan_without_classes():
    engine = make_engine(SerialCommunicator(), loss_fn=nn.functional.mse_loss)
    inputs, _ = samples().tensors
    metrics = engine.evaluate([(inputs, torch.zeros(NUM_SAMPLES, NUM_CLASSES, dtype=torch.float64))])
    assert math.isnan(metrics.accuracy)
    assert metrics.loss > 0
    nothing = engine.evaluate([])
    assert math.isnan(nothing.loss)
    assert nothing.num_samples == 0


@pytest.mark.parametrize("world_size", WORLDS)
def test_lines_hold_the_mean_loss_since_the_last_one_over_all_ranks(capsys, world_size):
    inputs = samples().tensors[0]
    outputs = make_model()(inputs)

    def loss_fn(outputs, targets):
        return outputs.sum(dim=1).mean() + targets.double().mean()

    def job(comm):
        engine = make_engine(comm, lr=0.0, loss_fn=loss_fn, log_every=5)
        ranks = torch.full((NUM_SAMPLES,), 10 * comm.rank)
        return engine.fit(shard(comm, TensorDataset(inputs, ranks)), epochs=2)

    on_ranks(job, world_size)
    mean = outputs.sum(dim=1).mean().item() + 10 * (world_size - 1) / 2
    lines = [line for line in capsys.readouterr().out.splitlines() if " Step " in line]
    assert lines == [f"[Epoch {epoch}] Step {5 * epoch + 5} | Loss: {mean:.4f}" for epoch in range(2)]


def test_report_writes_one_json_object_per_line(tmp_path, capsys):
    def job(comm):
        report = Report(tmp_path, comm.rank, progress=False)
        engine = make_engine(comm, log_every=2, report=report)
        return engine.fit(shard(comm, samples()), 2, shard(comm, samples(), train=False))

    summary = on_ranks(job, 2)[0]
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert {2, 4, 5, 6, 8, 10} <= {record["step"] for record in records}
    assert records[0].keys() == {
        "epoch",
        "step",
        "loss",
        "lr",
        "samples_per_s",
        "comm_share",
        "seconds",
        "bytes",
    }
    assert records[-1]["accuracy"] == summary.accuracy
    assert records[-1]["train_loss"] == summary.loss
    for spent in ("seconds", "bytes"):
        totals = [record[spent] for record in records]
        assert totals == sorted(totals)
        assert totals[0] > 0
    assert 0 < summary.comm_share < 1
    assert summary.samples_per_s > 0
    out = capsys.readouterr().out
    for line in (f"Test accuracy: {100 * summary.accuracy:.2f} %", f"Results: {tmp_path}"):
        assert out.count(line) == 1
    assert re.search(r"Throughput: \d+ samples/s\nTime in communication: \d+\.\d\d %", out)


def test_report_writes_null_for_what_is_not_known(tmp_path):
    engine = make_engine(SerialCommunicator(), report=Report(tmp_path, progress=False))
    engine.fit(shard(engine.comm, samples()), epochs=1)
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["accuracy"] is None


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard", reason="an optional extra")
    engine = make_engine(SerialCommunicator(), report=Report(tmp_path, progress=False, tensorboard=True))
    engine.fit(shard(engine.comm, samples()), epochs=1)
    assert [path.stat().st_size > 0 for path in tmp_path.glob("events.out.tfevents.*")] == [True]
    with pytest.raises(ValueError, match="TensorBoard needs a directory"):
        Report(None, tensorboard=True)


# Ends -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", WORLDS)
def test_loss_that_is_not_finite_is_named_on_every_rank(world_size):
    def job(comm):
        def loss_fn(outputs, targets):
            bad = comm.rank == world_size - 1 and engine.position.step == 3
            return outputs.mean() * (math.inf if bad else 1)

        engine = make_engine(comm, loss_fn=loss_fn)
        engine.fit(shard(comm, samples()), epochs=1)

    for message in failures(job, world_size, FloatingPointError):
        assert f"the loss of rank {world_size - 1} is not finite since epoch 0, step 3" in message


@pytest.mark.parametrize("world_size", WORLDS)
def test_one_rank_asked_to_stop_stops_all_after_the_same_step(tmp_path, world_size):
    """Then a new start goes on to the same parameters, bit for bit, as a training that was not stopped."""

    def train(comm, directory, stop_at, resume):
        def loss_fn(outputs, targets):
            if comm.rank == world_size - 1 and engine.position.step == stop_at:
                engine.stop_signal.received = True
            return nn.functional.cross_entropy(outputs, targets)

        # Every rank has statistics of its own, since buffers are not broadcast.
        model = make_model(nn.BatchNorm1d(8))
        checkpoints = Checkpoints(directory, comm, resume=resume)
        ddp = {"broadcast_buffers": False, "hook": ErrorFeedback(TopK(0.3))}  # which holds back what is this rank's own
        engine = make_engine(comm, model=model, loss_fn=loss_fn, ddp=ddp, checkpoints=checkpoints, log_every=7)
        summary = engine.fit(shard(comm, samples()), epochs=4)
        return summary, [*parameters(engine), *engine.model.module.buffers()]

    whole = on_ranks(lambda comm: train(comm, tmp_path / "whole", 0, False), world_size)
    stopped = on_ranks(lambda comm: train(comm, tmp_path / "stopped", 6, False), world_size)
    assert all(summary.stopped and 6 <= summary.steps <= 10 for summary, _ in stopped)
    assert len({summary.steps for summary, _ in stopped}) == 1
    resumed = on_ranks(lambda comm: train(comm, tmp_path / "stopped", 0, True), world_size)
    for (summary, left), (expected, right) in zip(resumed, whole, strict=True):
        assert (summary.steps, summary.epochs) == (expected.steps, expected.epochs) == (20, 4)
        assert all(map(torch.equal, left, right))


def test_what_no_checkpoint_can_hold_is_refused_before_training(tmp_path):
    class Schedule:
        def __init__(self):
            self.wave = np.cos

        def __call__(self, step):
            return self.wave(step)

    def job(comm):
        model = DistributedDataParallel(make_model(), comm)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, Schedule())
        steps, checkpoints = Optimisation(scheduler), Checkpoints(tmp_path, comm)
        engine = Engine(model, optimizer, nn.functional.cross_entropy, comm, steps, checkpoints=checkpoints)
        engine.fit(shard(comm, samples()), epochs=1)

    for message in failures(job, 2, CheckpointError):
        assert "on rank 0, scheduler.lr_lambdas.0.wave is a numpy.ufunc, which could not be read back" in message


def test_handler_of_sigterm_is_put_back():
    seen = []

    def loss_fn(outputs, targets):
        seen.append(signal.getsignal(signal.SIGTERM))
        return outputs.mean()

    before = signal.getsignal(signal.SIGTERM)
    engine = make_engine(SerialCommunicator(), loss_fn=loss_fn)
    engine.fit(shard(engine.comm, samples()), epochs=1)
    assert seen[0] != before
    assert signal.getsignal(signal.SIGTERM) == before


def test_checkpoints_of_an_earlier_run_are_not_overwritten(tmp_path):
    def job(comm):
        make_engine(comm, checkpoints=Checkpoints(tmp_path, comm)).fit(shard(comm, samples()), epochs=1)

    on_ranks(job, 2)
    for message in failures(job, 2, CheckpointError):
        assert "holds checkpoints of an earlier run (step_00000005.pt); go on from them with resume=true" in message


def test_checkpoint_of_another_optimizer_or_model_is_refused(tmp_path):
    def job(comm, model, optimizer):
        model = DistributedDataParallel(model, comm)
        optimizer = optimizer(model.parameters(), lr=0.1)
        checkpoints = Checkpoints(tmp_path, comm, resume=True)
        engine = Engine(model, optimizer, nn.CrossEntropyLoss(), comm, checkpoints=checkpoints)
        engine.fit(shard(comm, samples()), epochs=1)

    on_ranks(lambda comm: job(comm, make_model(), torch.optim.SGD), 2)
    for message in failures(lambda comm: job(comm, make_model(), torch.optim.Adam), 2, CheckpointError):
        assert "the optimizer is SGD there and Adam here" in message
    other = nn.Sequential(nn.Linear(NUM_FEATURES, 4)).double()
    for message in failures(lambda comm: job(comm, other, torch.optim.SGD), 2, CheckpointError):
        assert "0.weight is float64[8, 5] there and float64[4, 5] here" in message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"accumulation_steps": 0}, "accumulation_steps must be at least 1, got 0"),
        ({"log_every": 0}, "log_every must be at least 1, got 0"),
        ({"max_grad_norm": 0.0}, "max_grad_norm must be greater than 0, got 0.0"),
        ({"autocast_dtype": torch.float16}, "autocast_dtype float16 needs loss scaling"),
    ],
)
def test_wrong_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        make_engine(SerialCommunicator(), **options)
