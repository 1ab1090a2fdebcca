"""The training loop: steps, epochs, evaluations and checkpoints, the same on every rank.

Where it stands is in training/progress.py, what ranks tell each other on the way in training/roll_call.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from minidist.communicator import Communicator
from minidist.ddp import DistributedDataParallel
from minidist.methods.method import EveryStep, Method
from minidist.training.checkpoint import Checkpoints
from minidist.training.learning_rate import LearningRate
from minidist.training.loaders import Batch, Loader, ensure_eval_batches
from minidist.training.metrics import Metrics, MetricSums
from minidist.training.optimisation import Optimisation
from minidist.training.progress import Position
from minidist.training.report import Report, Summary
from minidist.training.resume import Training, begin
from minidist.training.roll_call import RollCall
from minidist.training.stop import StopSignal
from minidist.training.tally import Tallies

DEFAULTS = Optimisation()


class Engine:
    """Trains ``model`` on batches of ``(inputs, targets)``.

    All ranks construct it and call `fit` and `evaluate` together, each with its own share of the data.

    Args:
        model: on ``device``, wrapped over what ``method.replica_comm(comm)`` returns.
        optimizer: over the model's parameters.
        loss_fn: ``loss_fn(outputs, targets)``, the mean over the samples of a batch.
        comm: the ranks that train.
        optimisation: the learning rate's schedule, accumulation, clipping and autocast.
        device: where batches are moved to.
        log_every: a log line after so many steps.
        checkpoints: where and how often to save; None for never.
        report: who is told; None for nobody but the log lines.
        method: what replicas exchange, and when; None for their gradients in every step.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        model: DistributedDataParallel,
        optimizer: Optimizer,
        loss_fn: Callable[[Tensor, Tensor], Tensor],
        comm: Communicator,
        optimisation: Optimisation = DEFAULTS,
        *,
        device: torch.device | str = "cpu",
        log_every: int = 100,
        checkpoints: Checkpoints | None = None,
        report: Report | None = None,
        method: Method | None = None,
    ) -> None:
        if log_every < 1:
            raise ValueError(f"Engine: log_every must be at least 1, got {log_every}")
        self.model = model
        self.optimizer = optimizer
        self.loss_fn = loss_fn
        self.comm = comm
        self.optimisation = optimisation
        self.device = torch.device(device)
        self.log_every = log_every
        self.checkpoints = checkpoints
        self.report = report or Report(None, comm.rank, progress=False)
        self.method = method or EveryStep()
        self.method.begin(model, optimizer, comm)
        self.learning_rate = LearningRate(optimisation.scheduler, optimizer)
        self.position = Position()
        self.tallies = Tallies()
        self.training = Training(
            model.module, optimizer, optimisation.scheduler, self.position, self.tallies, self.method, model.hook
        )
        self.stop_signal = StopSignal()
        self.roll_call = RollCall(comm, self.stop_signal)

    def fit(self, train_loader: Loader, epochs: int, eval_loader: Iterable[Batch] | None = None) -> Summary:
        """Train until ``epochs`` epochs are complete, those before a resume included.

        After each epoch it evaluates and saves a checkpoint. Where the method lets replicas differ, what is evaluated,
        and what is in the module when this returns, is the model that it shows; a second call goes on from the
        replicas. On SIGTERM all ranks stop after the same step, within about a second, save, and return.

        Loaders have to be equally long on all ranks. A resume is exact with `minidist.training.sampler.ShardedSampler`,
        and with anything else that draws its order from the global generators; a generator of the loader's own would
        begin anew. What worker processes draw is exact without ShardedSampler only (see `minidist.training.progress`).

        Raises:
            ValueError: the loaders differ in length, have no batch, or other numbers of batches than they say; or
                the scheduler wants an evaluation, and there is none.
            FloatingPointError: a loss is not finite.
            CheckpointError: a checkpoint cannot be written, or does not fit.
        """
        if epochs < 1:
            raise ValueError(f"{self.comm.who('Engine.fit')}: epochs must be at least 1, got {epochs}")
        ensure_eval_batches(eval_loader, self.comm)
        self.learning_rate.ensure_evaluated(eval_loader)
        self.method.hide()
        begin(self.training, self.checkpoints)
        self.roll_call.start(self.position.step)
        with self.stop_signal:
            while self.position.epoch < epochs and not self.roll_call.stopping:
                self._train_epoch(train_loader, eval_loader)
        self.method.show()
        return self.report.finish(self.position, self.tallies, self.roll_call.stopping)

    @torch.no_grad()
    def evaluate(self, loader: Iterable[Batch]) -> Metrics:
        """Return the exact metrics over all samples of all ranks' loaders, which may differ in length.

        The model is left in evaluation mode.
        """
        sums = MetricSums(self.device)
        with self.method.shown():
            self.model.eval()
            self.model.sync_buffers()
            for batch in loader:
                sums.add(*self._forward(self.model.module, batch))
        return sums.over_all_ranks(self.comm)

    def _train_epoch(self, train_loader: Loader, eval_loader: Iterable[Batch] | None) -> None:
        """Go to the end of the epoch, or to where some rank was asked to stop."""
        if self.position.batch == 0:
            self.tallies.start_epoch()
        self.model.train()
        self.roll_call.restart_clock()
        steps = self.position.steps(train_loader, self.optimisation.accumulation_steps, self.comm)
        for group in self.report.bar(steps):
            self._step(group)
            self._call_roll_if_due()
            if self.roll_call.stopping:
                return
        self._call_roll_if_due(at_end=True)
        if eval_loader is not None:
            self._evaluate_epoch(eval_loader)
        self.report.end_epoch(self.position, self.tallies)
        self.position.end_epoch()
        self._save()

    def _evaluate_epoch(self, eval_loader: Iterable[Batch]) -> None:
        metrics = self.evaluate(eval_loader)
        if not metrics.num_samples:
            raise ValueError(
                f"{self.comm.who('Engine.fit')}: the eval_loader gave no sample on any rank; "
                "give one that can be read again in each epoch, such as a DataLoader or a list"
            )
        self.tallies.metrics = metrics
        self.learning_rate.end_epoch(metrics)

    def _step(self, group: Sequence[Batch]) -> None:
        """Take one optimizer step on the batches of ``group``; at most the last one's backward communicates."""
        self.position.advance(len(group))
        self.comm.recorder.step = self.position.step
        self.optimizer.zero_grad()
        averages = self.method.averages_gradients(self.position.step)
        for index, batch in enumerate(group, start=1):
            with nullcontext() if averages and index == len(group) else self.model.no_sync():
                _, targets, loss = self._forward(self.model, batch)
                (loss / len(group)).backward()  # type: ignore[no-untyped-call]
            self.roll_call.note(loss, len(targets), self.position.step)
        self.optimisation.clip(self.optimizer, self.model)
        self.optimizer.step()
        self.comm.clock.step_done()
        with self.comm.clock.between_steps():
            self.method.after_step(self.position.step)
        self.learning_rate.step()

    def _forward(self, module: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        inputs, targets = (tensor.to(self.device, non_blocking=True) for tensor in batch)
        dtype = self.optimisation.autocast_dtype
        with torch.autocast(self.device.type, dtype, enabled=dtype is not None):
            outputs = module(inputs)
            return outputs, targets, self.loss_fn(outputs, targets)

    def _call_roll_if_due(self, at_end: bool = False) -> None:
        """Hear from all ranks after steps on which they agree; then they also agree on whether to stop."""
        step = self.position.step
        save = self.checkpoints is not None and self.checkpoints.due(step)
        log = step % self.log_every == 0
        if not self.roll_call.due(step, wanted=at_end or save or log):
            return
        tally = self.roll_call.hold(self.position.epoch, step)
        self.tallies.add(tally)
        line = self.tallies.end_line() if log else None
        self.report.progressed(self.position, tally, self.optimizer.param_groups[0]["lr"], self.tallies.run, line)
        if save or self.roll_call.stopping:
            self._save()

    def _save(self) -> None:
        """Save where training stands, right after a roll call, so that the tallies hold all of it."""
        if self.checkpoints is not None:
            self.checkpoints.save(self.training.state())
            self.roll_call.restart_clock()
