"""A small training that is killed at chosen places and started again; test_checkpoint.py says where.

Its argument is a JSON list of `Run`s. Each runs in a fork of a process that has imported everything, one after the
other; their exit codes are printed as a JSON list, negative for a signal, as the last line.
"""

import json
import math
import os
import random
import resource
import signal
import sys
import traceback
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch._dynamo  # optimizers would import it in every fork
from torch import nn
from torch.utils.data import DataLoader, Dataset

from backends.serial import SerialCommunicator
from minidist.ddp import DistributedDataParallel
from minidist.engine import Engine
from minidist.training.checkpoint import Checkpoints
from minidist.training.optimisation import Optimisation
from minidist.training.sampler import ShardedSampler
from minidist.training.seed import seed_everything

NUM_SAMPLES, BATCH_SIZE, EPOCHS = 50, 8, 3  # 7 steps per epoch


class Noisy(Dataset):
    """Samples with noise from every generator there is."""

    def __init__(self, noise):
        self.inputs = torch.randn(NUM_SAMPLES, 6, generator=torch.Generator().manual_seed(0))
        self.noise = noise

    def __len__(self):
        return NUM_SAMPLES

    def __getitem__(self, index):
        noise = self.noise * (torch.rand(()) + random.random() + np.random.rand())
        return self.inputs[index] + noise.float(), int(self.inputs[index].sum() > 0)


def make_loader(kind):
    if kind == "sharded":
        sampler = ShardedSampler(NUM_SAMPLES, 0, 1, BATCH_SIZE, shuffle=True, seed=3)
        return DataLoader(Noisy(0.1), BATCH_SIZE, sampler=sampler)
    num_workers = 1 if kind == "workers" else 0
    return DataLoader(Noisy(0.1), BATCH_SIZE, shuffle=True, num_workers=num_workers)


@dataclass
class Run:
    """One start of the training, and the step at which which accident happens to it; 0 for none."""

    directory: str
    result: str = "result.pt"
    loader: str = "sharded"
    kill_in_step: int = 0
    sigterm_in_step: int = 0
    cut_write_after_step: int = 0
    kill_before_rename_of_step: int = 0
    kill_after_rename_of_step: int = 0
    cut_newest: bool = False

    def loss(self, engine):
        """Return the loss function, during which accidents happen."""

        def loss_fn(outputs, targets):
            if engine[0].model.training:
                self.suffer(engine[0].position.step)
            return nn.functional.cross_entropy(outputs, targets)

        return loss_fn

    def suffer(self, step):
        if step == self.kill_in_step:
            os.kill(os.getpid(), signal.SIGKILL)
        if step == self.sigterm_in_step:
            os.kill(os.getpid(), signal.SIGTERM)
        if step == self.cut_write_after_step:
            limit_file_size(3000)

    def watch(self, event, arguments):
        """See the interpreter's events: a rename comes before it is done, removals of old files after it."""
        if event == "os.rename" and Path(arguments[1]).name == file_name(self.kill_before_rename_of_step):
            os.kill(os.getpid(), signal.SIGKILL)
        if event == "os.remove" and (Path(self.directory) / file_name(self.kill_after_rename_of_step)).exists():
            os.kill(os.getpid(), signal.SIGKILL)


def file_name(step):
    return f"step_{step:08d}.pt"


def limit_file_size(num_bytes):
    """Have the kernel end this process in the middle of the first write that goes beyond."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, num_bytes))


def train(run):
    seed_everything(7)
    comm = SerialCommunicator()
    layers = nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 2)
    model = DistributedDataParallel(nn.Sequential(*layers), comm)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 0.02, total_steps=EPOCHS * math.ceil(NUM_SAMPLES / BATCH_SIZE)
    )
    checkpoints = Checkpoints(Path(run.directory), comm, every_steps=4, resume=True)
    engine = []
    engine.append(
        Engine(
            model,
            optimizer,
            run.loss(engine),
            comm,
            Optimisation(scheduler, max_grad_norm=0.5),
            log_every=5,
            checkpoints=checkpoints,
        )
    )
    sys.addaudithook(run.watch)
    summary = engine[0].fit(make_loader(run.loader), EPOCHS, DataLoader(Noisy(0.0), 20))
    result = {"stopped": torch.tensor(summary.stopped), "loss": torch.tensor(summary.loss)}
    torch.save(result | model.module.state_dict(), Path(run.directory) / run.result)


def in_fork(run):
    pid = os.fork()
    if pid == 0:
        try:
            train_expecting_damage(run) if run.cut_newest else train(run)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def train_expecting_damage(run):
    newest = max(Path(run.directory).glob("step_*.pt"))
    newest.write_bytes(newest.read_bytes()[:-1000])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(run)
    assert any("is damaged or cut short" in str(warning.message) for warning in caught)


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps([in_fork(Run(**fields)) for fields in json.loads(sys.argv[1])]))
