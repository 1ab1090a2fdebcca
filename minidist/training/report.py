"""What a run tells people: a progress bar, log lines, metrics.jsonl, TensorBoard, and a summary at the end."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from minidist.training.loaders import Batch, Steps
from minidist.training.progress import Position
from minidist.training.tally import Tallies, Tally

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


@dataclass(frozen=True)
class Summary:
    """A whole training; the same on all ranks.

    Attributes:
        epochs: complete epochs, those before a resume included.
        steps: optimizer steps, likewise.
        loss: mean training loss per sample of the last epoch.
        accuracy: of the last evaluation, 0 to 1; nan without one.
        samples_per_s: samples per second of training, of all ranks together; nan if there was none.
        comm_share: share of the training time spent waiting for communication, 0 to 1; nan likewise.
        sent_bytes: what a rank sent while it trained, the mean of the ranks; without evaluations, checkpoints, what was
            sent before a resume, and what was on its way at the end.
        stopped: whether it ended because of a SIGTERM, possibly in the last step of all.
    """

    epochs: int
    steps: int
    loss: float
    accuracy: float
    samples_per_s: float
    comm_share: float
    sent_bytes: float
    stopped: bool


class Report:
    """Tells what rank 0 has to say; on other ranks it is silent.

    metrics.jsonl gets one JSON object per line, appended: null stands for what is not known, and a resumed run
    repeats the steps after its checkpoint, so that the last line of a step counts. The seconds of training, by the
    clock of the communicator, and the bytes that a rank sent meanwhile are those since the process began.

    Args:
        directory: where metrics.jsonl and TensorBoard's files go; None for neither.
        rank: this process's rank.
        progress: show a progress bar, where stderr is a terminal.
        tensorboard: write the metrics for TensorBoard as well.

    Raises:
        ValueError: TensorBoard without a directory.
        ImportError: TensorBoard is asked for and not installed.
    """

    def __init__(self, directory: Path | None, rank: int = 0, progress: bool = True, tensorboard: bool = False) -> None:
        self._directory = Path(directory) if directory is not None and rank == 0 else None
        self._speaks = rank == 0
        self._progress = progress
        self._writer = _tensorboard_writer(directory, rank) if tensorboard else None
        if self._directory is not None:
            self._directory.mkdir(parents=True, exist_ok=True)

    def bar(self, steps: Steps) -> Iterable[Sequence[Batch]]:
        """Return ``steps`` with a progress bar around them."""
        disable = None if self._progress and self._speaks else True  # None: where there is no terminal
        bar: Iterable[Sequence[Batch]] = tqdm(
            steps, f"Epoch {steps.epoch}", len(steps), initial=steps.num_done, unit="step", disable=disable, leave=False
        )
        return bar

    def say(self, line: str) -> None:
        """Print ``line`` above the progress bar."""
        if self._speaks:
            tqdm.write(line)
            sys.stdout.flush()

    def progressed(self, position: Position, tally: Tally, lr: float, run: Tally, line: Tally | None) -> None:
        """Record what a roll call told; at a log point print the line, ``line`` being what came since the last one."""
        self._record(position, loss=tally.loss, lr=lr, **_speed(tally), **_spent(run))
        if line is not None:
            self.say(f"[Epoch {position.epoch}] Step {position.step} | Loss: {line.loss:.4f}")

    def end_epoch(self, position: Position, tallies: Tallies) -> None:
        """Record and print how the epoch of ``position`` went."""
        epoch = tallies.epoch
        metrics = tallies.metrics
        self._record(
            position,
            train_loss=epoch.loss,
            eval_loss=metrics.loss,
            accuracy=metrics.accuracy,
            **_speed(epoch),
            **_spent(tallies.run),
        )
        accuracy = "" if math.isnan(metrics.accuracy) else f" | Accuracy: {_percent(metrics.accuracy)}"
        self.say(f"[Epoch {position.epoch}] Done | Loss: {epoch.loss:.4f}{accuracy}")

    def finish(self, position: Position, tallies: Tallies, stopped: bool) -> Summary:
        """Print and return the summary."""
        summary = Summary(
            epochs=position.epoch,
            steps=position.step,
            loss=tallies.epoch.loss,
            accuracy=tallies.metrics.accuracy,
            samples_per_s=tallies.run.samples_per_s,
            comm_share=tallies.run.comm_share,
            sent_bytes=tallies.run.sent_bytes,
            stopped=stopped,
        )
        how = "Stopped early" if summary.stopped else "Finished"
        self.say(f"{how} after {summary.epochs} epochs, {summary.steps} steps | Loss: {summary.loss:.4f}")
        self.say(f"Test accuracy: {_percent(summary.accuracy)}")
        measured = not math.isnan(summary.samples_per_s)
        self.say(f"Throughput: {f'{summary.samples_per_s:.0f} samples/s' if measured else 'not measured'}")
        self.say(f"Time in communication: {_percent(summary.comm_share)}")
        if self._directory is not None:
            self.say(f"Results: {self._directory}")
        if self._writer is not None:
            self._writer.flush()
        return summary

    def _record(self, position: Position, **metrics: float) -> None:
        if self._directory is not None:
            with open(self._directory / "metrics.jsonl", "a", encoding="utf-8") as file:
                file.write(as_json({"epoch": position.epoch, "step": position.step, **metrics}) + "\n")
        if self._writer is not None:
            for name, value in metrics.items():
                self._writer.add_scalar(name, value, position.step)


def as_json(what: Any, indent: int | None = None) -> str:
    """Return JSON that any program reads: null for a number that is not finite, which JSON cannot spell."""
    return json.dumps(_finite(what), indent=indent, allow_nan=False)


def _finite(what: Any) -> Any:
    if isinstance(what, Mapping):
        return {name: _finite(value) for name, value in what.items()}
    if isinstance(what, list | tuple):
        return [_finite(value) for value in what]
    return None if isinstance(what, float) and not math.isfinite(what) else what


def _speed(tally: Tally) -> dict[str, float]:
    return {"samples_per_s": tally.samples_per_s, "comm_share": tally.comm_share}


def _spent(run: Tally) -> dict[str, float]:
    return {"seconds": run.seconds, "bytes": run.sent_bytes}


def _percent(share: float) -> str:
    return "not measured" if math.isnan(share) else f"{100 * share:.2f} %"


def _tensorboard_writer(directory: Path | None, rank: int) -> SummaryWriter | None:
    """Check on every rank, so that none starts to train without the others."""
    if directory is None:
        raise ValueError("Report: TensorBoard needs a directory to write to, got None; give one")
    if importlib.util.find_spec("tensorboard") is None:
        raise ImportError(
            "Report: tensorboard is asked for, but not installed; pip install 'minidist[tensorboard]', or leave it off"
        )
    if rank != 0:
        return None
    from torch.utils.tensorboard import SummaryWriter  # optional, and slow to import

    return SummaryWriter(str(directory))
