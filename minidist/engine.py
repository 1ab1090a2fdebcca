"""The training loop: steps, epochs, evaluations and checkpoints, the same on every rank.

Where it stands is in training/progress.py, what ranks tell each other on the way in training/status.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from minidist.communicator import Communicator
from minidist.ddp import DistributedDataParallel
from minidist.training.checkpoint import Checkpoints
from minidist.training.learning_rate import LearningRate, Scheduler
from minidist.training.loaders import Batch, Loader, require_eval_batches
from minidist.training.metrics import Metrics, MetricSums
from minidist.training.progress import Position
from minidist.training.report import Report, Summary
from minidist.training.resume import Resumption
from minidist.training.settings import check_settings
from minidist.training.status import Status


class Engine:
    """Trains ``model`` on batches of ``(inputs, targets)``.

    All ranks construct it and call `fit` and `evaluate` together, each with its own share of the data.

    Args:
        model: on ``device``.
        optimizer: over the model's parameters.
        loss_fn: ``loss_fn(outputs, targets)``, the mean over the samples of a batch.
        comm: the ranks that train.
        scheduler: stepped once per optimizer step, not per epoch: ``StepLR(optimizer, 30)`` means 30 steps, and 30
            epochs are ``StepLR(optimizer, 30 * len(train_loader))``. ReduceLROnPlateau alone is stepped once per
            epoch, with the loss of its evaluation.
        device: where batches are moved to.
        accumulation_steps: batches per optimizer step, each with the same weight; the last step of an epoch
            may have fewer. Only the last batch of a step communicates.
        max_grad_norm: gradients are scaled down to this global norm; None leaves them.
        autocast_dtype: forward passes run in ``torch.autocast`` of this type; None leaves it off. float16
            is refused, since its gradients vanish without loss scaling.
        log_every: a log line after so many steps.
        checkpoints: where and how often to save; None for never.
        report: who is told; None for nobody but the log lines.
        resume: go on from the newest checkpoint, if there is one; without it, an earlier run's are refused.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        model: DistributedDataParallel,
        optimizer: Optimizer,
        loss_fn: Callable[[Tensor, Tensor], Tensor],
        comm: Communicator,
        *,
        scheduler: Scheduler | None = None,
        device: torch.device | str = "cpu",
        accumulation_steps: int = 1,
        max_grad_norm: float | None = None,
        autocast_dtype: torch.dtype | None = None,
        log_every: int = 100,
        checkpoints: Checkpoints | None = None,
        report: Report | None = None,
        resume: bool = False,
    ) -> None:
        check_settings(accumulation_steps, log_every, max_grad_norm, autocast_dtype)
        self.model, self.optimizer, self.loss_fn, self.comm = model, optimizer, loss_fn, comm
        self.scheduler, self.learning_rate = scheduler, LearningRate(scheduler, optimizer)
        self.device, self.autocast_dtype = torch.device(device), autocast_dtype
        self.accumulation_steps, self.max_grad_norm, self.log_every = accumulation_steps, max_grad_norm, log_every
        self.report = report or Report(None, comm.rank, progress=False)
        self.position, self.status = Position(), Status(comm)
        self.resumption = Resumption(
            checkpoints, resume, model.module, optimizer, scheduler, self.position, self.status
        )

    def fit(self, train_loader: Loader, epochs: int, eval_loader: Iterable[Batch] | None = None) -> Summary:
        """Train until ``epochs`` epochs are complete, those before a resume included.

        After each epoch it evaluates and saves a checkpoint. On SIGTERM all ranks stop after the same step,
        within about a second, save, and return.

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
        require_eval_batches(eval_loader, self.comm)
        self.learning_rate.check(eval_loader)
        self.resumption.start()
        with self.status.stop_signal:
            while self.position.epoch < epochs and not self.status.stopping:
                self._train_epoch(train_loader, eval_loader)
        return self.report.finish(self.position, self.status)

    @torch.no_grad()
    def evaluate(self, loader: Iterable[Batch]) -> Metrics:
        """Return the exact metrics over all samples of all ranks' loaders, which may differ in length.

        The model is left in evaluation mode.
        """
        self.model.eval()
        self.model.sync_buffers()
        sums = MetricSums(self.device)
        for batch in loader:
            sums.add(*self._forward(self.model.module, batch))
        return sums.over_all_ranks(self.comm)

    def _train_epoch(self, train_loader: Loader, eval_loader: Iterable[Batch] | None) -> None:
        """Go to the end of the epoch, or to where some rank was asked to stop."""
        position, status = self.position, self.status
        self.model.train()
        status.start_epoch(resumed=position.batch > 0)
        for group in self.report.bar(position.steps(train_loader, self.accumulation_steps, self.comm)):
            self._step(group)
            self._exchange_if_due()
            if status.stopping:
                return
        self._exchange_if_due(at_end=True)
        if eval_loader is not None:
            status.evaluated(self.evaluate(eval_loader))
            self.learning_rate.end_epoch(status.metrics)
        self.report.end_epoch(position, status)
        position.end_epoch()
        self.resumption.save()

    def _step(self, group: Sequence[Batch]) -> None:
        """Take one optimizer step on the batches of ``group``; only the last one's backward communicates."""
        self.position.advance(len(group))
        self.optimizer.zero_grad()
        for index, batch in enumerate(group, start=1):
            with nullcontext() if index == len(group) else self.model.no_sync():
                _, targets, loss = self._forward(self.model, batch)
                (loss / len(group)).backward()  # type: ignore[no-untyped-call]
            self.status.add(loss, len(targets), self.position.step)
        if self.max_grad_norm is not None:
            # Every rank has the same gradients by now, and hence the same norm.
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.max_grad_norm)
        self.optimizer.step()
        self.learning_rate.step()

    def _forward(self, module: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        inputs, targets = (tensor.to(self.device, non_blocking=True) for tensor in batch)
        with torch.autocast(self.device.type, self.autocast_dtype, enabled=self.autocast_dtype is not None):
            outputs = module(inputs)
            return outputs, targets, self.loss_fn(outputs, targets)

    def _exchange_if_due(self, at_end: bool = False) -> None:
        """Exchange after steps on which all ranks agree; then they also agree on whether to stop."""
        position, status = self.position, self.status
        save, log = self.resumption.due(position.step), position.step % self.log_every == 0
        if status.last_step < position.step and (at_end or save or log or status.due(position.step)):
            tally = status.exchange(position.epoch, position.step)
            line = status.take_line() if log else None
            self.report.exchanged(position, tally, self.optimizer.param_groups[0]["lr"], line)
            if save or status.stopping:
                self.resumption.save()
