"""The data sets: what they hold, and what is done where one cannot be had."""

from __future__ import annotations

import logging
import socket
import struct
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from backends.serial import SerialCommunicator
from backends.thread import run_threads
from experiments.tasks import data
from experiments.tasks.datasets import Images, Synthetic, loader
from minidist.communicator import Communicator
from minidist.config import DataConfig, SyntheticConfig
from minidist.errors import ConfigError
from minidist.training.progress import Position


@pytest.fixture
def nowhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Let mnist and cifar10 come from an address of this machine where nobody answers."""
    with socket.socket() as taken:  # bound but not listening: a connection is refused at once
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/"
        for name in ("mnist", "cifar10"):
            monkeypatch.setitem(data.SOURCES, name, replace(data.SOURCES[name], url=url))
        yield url


def load(config: DataConfig) -> data.Data:
    with SerialCommunicator() as comm:
        return data.load(config, comm, seed=0)


def write_mnist(root: Path, count: int) -> None:
    """Write images of constant grey, image i of grey i and label i modulo 10, as MNIST's files."""
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part in ("train", "t10k"):
        pixels = b"".join(bytes([i]) * 28 * 28 for i in range(count))
        header = struct.pack(">iiii", 0x803, count, 28, 28)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(header + pixels)
        labels = bytes(i % 10 for i in range(count))
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">ii", 0x801, count) + labels)


def test_digits_are_images_of_28_pixels_in_a_fixed_stratified_split() -> None:
    digits = load(DataConfig("digits"))
    assert (len(digits.train), len(digits.test)) == (1497, 300)
    images, labels = digits.test.__getitems__(range(300))
    assert images.shape == (300, 1, 28, 28)
    assert labels.bincount(minlength=10).tolist() == pytest.approx([30] * 10, abs=2)
    again, _ = load(DataConfig("digits")).test.__getitems__(range(300))
    assert torch.equal(images, again)
    train, _ = digits.train.__getitems__(range(1497))
    assert train.mean().item() == pytest.approx(0, abs=0.05)
    assert train.std().item() == pytest.approx(1, abs=0.05)


def test_mnist_is_read_from_the_data_directory(tmp_path: Path) -> None:
    write_mnist(tmp_path, 20)
    mnist = load(DataConfig("mnist", root=str(tmp_path), strict=True))
    assert (mnist.name, mnist.shape, len(mnist.train)) == ("mnist", (1, 28, 28), 20)
    images, labels = mnist.train.__getitems__([3, 12])
    assert labels.tolist() == [3, 2]
    assert images[1].unique().item() == pytest.approx((12 / 255 - 0.1307) / 0.3081)


@pytest.mark.parametrize(("name", "substitute"), [("mnist", "digits"), ("cifar10", "synthetic")])
def test_data_that_cannot_be_had_is_replaced_with_one_warning(
    name: str, substitute: str, nowhere: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        names = run_threads(lambda comm: data.load(DataConfig(name, root=str(tmp_path)), comm, seed=0).name, 2)
    assert names == [substitute, substitute]
    assert [record.getMessage() for record in caplog.records] == [
        f"WARNING: data={name}: it is not in {tmp_path} and {nowhere} cannot be reached; "
        f"going on with data={substitute}"
    ]


def test_strict_data_that_cannot_be_had_is_an_error_on_every_rank(nowhere: str, tmp_path: Path) -> None:
    def job(comm: data.Communicator) -> str:
        with pytest.raises(ConfigError) as caught:
            data.load(DataConfig("mnist", root=str(tmp_path), strict=True), comm, seed=0)
        return str(caught.value)

    messages = run_threads(job, 2)
    assert messages[0] == messages[1]
    assert messages[0].startswith(f"data=mnist: it is not in {tmp_path} and {nowhere} cannot be reached; put it there")


def test_a_data_directory_that_cannot_be_written_is_an_error_on_every_rank(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    root = str(tmp_path / "file" / "data")

    def job(comm: data.Communicator) -> str:
        with pytest.raises(ConfigError) as caught:
            data.load(DataConfig("mnist", root=root), comm, seed=0)
        return str(caught.value)

    message = f"data.root={root} cannot be written (Not a directory); choose another directory"
    assert run_threads(job, 2) == [message] * 2


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"data\.name must be one of mnist, .*, got imagenet"):
        load(DataConfig("imagenet"))


def test_synthetic_samples_are_a_function_of_seed_and_number() -> None:
    config = SyntheticConfig(shape=[2, 5], num_classes=3, num_samples=8, num_test_samples=4)
    synthetic = load(config)
    assert (synthetic.shape, synthetic.num_classes, len(synthetic.test)) == ((2, 5), 3, 4)
    samples, labels = synthetic.train.__getitems__([1, 7])
    alone, _ = load(config).train.__getitems__([7])
    assert labels.tolist() == [1, 1]
    assert torch.equal(samples[1:], alone)
    other, _ = Synthetic((2, 5), 3, range(8), seed=1).__getitems__([7])
    assert not torch.equal(alone, other)


def test_augmentation_is_a_function_of_seed_epoch_and_index() -> None:
    pixels = torch.arange(6 * 3 * 8 * 8).remainder(251).to(torch.uint8).view(6, 3, 8, 8)

    def images(epoch: int, indices: list[int], seed: int = 0) -> torch.Tensor:
        samples = Images(pixels, torch.zeros(6), (0.5,) * 3, (0.5,) * 3, augment_seed=seed)
        samples.set_epoch(epoch)
        return samples.__getitems__(indices)[0]

    assert torch.equal(images(1, [0, 4])[1:], images(1, [4]))
    assert not torch.equal(images(1, [4]), images(2, [4]))
    assert not torch.equal(images(1, list(range(6))), images(1, list(range(6)), seed=1))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_ranks_share_the_samples(num_workers: int) -> None:
    samples = Synthetic((1,), 7, range(7), seed=0)
    loaders = [loader(samples, rank, 2, 3, num_workers, train=False, seed=0) for rank in range(2)]
    labels = [torch.cat([labels for _, labels in batches]).tolist() for batches in loaders]
    assert labels == [[0, 2, 4, 6], [1, 3, 5]]


def test_loaders_leave_the_global_generator_alone() -> None:
    state = torch.get_rng_state()
    for _ in loader(Synthetic((1,), 2, range(4), seed=0), 0, 1, 2, 0, train=True, seed=0):
        continue
    assert torch.equal(torch.get_rng_state(), state)


# The middle of an epoch -------------------------------------------------------------------------


class Counted(Images):
    """Notes which samples it is asked for."""

    asked: list[int]

    def __getitems__(self, indices: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        self.asked += indices
        return super().__getitems__(indices)


def counted() -> Counted:
    pixels = torch.arange(30 * 8 * 8).remainder(251).to(torch.uint8).view(30, 1, 8, 8)
    samples = Counted(pixels, torch.arange(30), (0.5,), (0.5,), augment_seed=7)
    samples.asked = []
    return samples


def batches_of(loader: Any, comm: Communicator, epoch: int, first_batch: int) -> list[tuple[torch.Tensor, ...]]:
    """What training takes from a loader when it goes on there."""
    return [batch for (batch,) in Position(epoch, first_batch).steps(loader, 1, comm)]


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize(("epoch", "first_batch"), [(0, 2), (1, 3), (1, 5)])
def test_a_loader_begins_where_training_goes_on_and_asks_for_no_sample_before(
    num_workers: int, epoch: int, first_batch: int
) -> None:
    def job(comm: Communicator) -> None:
        def run(first_batch: int) -> tuple[list[tuple[torch.Tensor, ...]], list[int]]:
            samples = counted()
            train = loader(samples, comm.rank, 2, 3, num_workers, train=True, seed=1)
            return batches_of(train, comm, epoch, first_batch), samples.asked

        (whole, all_asked), (rest, asked) = run(0), run(first_batch)
        assert len(rest) == 5 - first_batch
        for (images, labels), (expected, names) in zip(rest, whole[first_batch:], strict=True):
            assert torch.equal(images, expected)
            assert torch.equal(labels, names)
        assert num_workers or asked == all_asked[3 * first_batch :]

    run_threads(job, 2)
