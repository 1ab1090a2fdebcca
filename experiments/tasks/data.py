"""The data sets that conf/data/ names, and what is done where one cannot be had."""

from __future__ import annotations

import logging
import socket
import threading
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from experiments.tasks.datasets import Images, Samples, Synthetic
from experiments.tasks.text import NUM_CHARACTERS, Text, standard_library
from minidist.communicator import Communicator
from minidist.config import DataConfig, SyntheticConfig, TextConfig
from minidist.errors import ConfigError

log = logging.getLogger(__name__)
CONNECT_TIMEOUT_S = 5.0
STALL_TIMEOUT_S = 15.0
DOWNLOAD_TIMEOUT_S = 1800.0


@dataclass(frozen=True)
class Data:
    """What a job trains and is tested on.

    Attributes:
        name: which data this is, as opposed to which was asked for.
        train, test: the samples.
        shape: of one sample.
        num_classes: labels are 0 to num_classes - 1.
    """

    name: str
    train: Samples
    test: Samples
    shape: tuple[int, ...]
    num_classes: int


@dataclass(frozen=True)
class Source:
    """A data set of torchvision.

    Attributes:
        kind: the class in torchvision.datasets.
        folder: what it makes in the data directory.
        url: an address that answers where a download can work.
        shape: of an image.
        mean, std: of the pixels of each channel, from 0 to 1.
        augment: whether to shift and mirror the images.
        substitute: the data to take where this cannot be had.
    """

    kind: str
    folder: str
    url: str
    shape: tuple[int, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augment: bool
    substitute: str

    def open(self, root: str, train: bool, download: bool = False) -> Any:
        """Return torchvision's data set; OSError or RuntimeError where it is not there."""
        import torchvision  # seconds, which data from elsewhere need not wait for

        return getattr(torchvision.datasets, self.kind)(root, train=train, download=download)


SOURCES = {
    "mnist": Source(
        "MNIST",
        "MNIST",
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        (1, 28, 28),
        (0.1307,),
        (0.3081,),
        False,
        "digits",
    ),
    "fashion_mnist": Source(
        "FashionMNIST",
        "FashionMNIST",
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        (1, 28, 28),
        (0.2860,),
        (0.3530,),
        False,
        "digits",
    ),
    "cifar10": Source(
        "CIFAR10",
        "cifar-10-batches-py",
        "https://www.cs.toronto.edu/~kriz/cifar.html",
        (3, 32, 32),
        (0.4914, 0.4822, 0.4465),
        (0.2470, 0.2435, 0.2616),
        True,
        "synthetic",
    ),
}
NAMES = (*SOURCES, "digits", "synthetic", "stdlib")


def sizes_of(config: DataConfig) -> tuple[tuple[int, ...], int]:
    """Return the shape of a sample and the number of classes, also of what stands in for the data, without a look."""
    if isinstance(config, SyntheticConfig):
        return tuple(config.shape), config.num_classes
    if isinstance(config, TextConfig):
        return (config.context,), NUM_CHARACTERS
    return SOURCES[config.name].shape if config.name in SOURCES else (1, 28, 28), 10


def load(config: DataConfig, comm: Communicator, seed: int) -> Data:
    """Return the data that ``config`` names, or its substitute; every rank calls it and gets the same.

    Raises:
        ConfigError: on every rank, where the data cannot be had and ``data.strict`` is set, or where
            ``data.root`` cannot be written.
    """
    if config.name not in NAMES:
        raise ConfigError(f"data.name must be one of {', '.join(NAMES)}, got {config.name}")
    if config.name not in SOURCES:
        return _embedded(config, seed)
    source = SOURCES[config.name]
    reason = _missing(config, source, comm)
    if not reason:
        return _stored(config, source, seed)
    if config.strict:
        raise ConfigError(f"data={config.name}: {reason}; put it there, or use data={source.substitute}")
    if comm.rank == 0:
        log.warning("WARNING: data=%s: %s; going on with data=%s", config.name, reason, source.substitute)
    return _embedded(SyntheticConfig() if source.substitute == "synthetic" else DataConfig("digits"), seed)


def _missing(config: DataConfig, source: Source, comm: Communicator) -> str:
    """Return why the data cannot be had, the same on every rank; empty if all of them have it."""
    answer = (_fetch(config, source) if comm.rank == 0 else None) or ("", "")
    reason, fault = comm.broadcast_object(answer, src=0, timeout_s=DOWNLOAD_TIMEOUT_S)
    if fault:
        raise ConfigError(fault)
    if reason:
        return str(reason)
    without = [rank for rank, found in enumerate(comm.all_gather_object(_is_stored(config, source))) if not found]
    return f"rank {without[0]} does not find in {config.root} what rank 0 has there" if without else ""


def _fetch(config: DataConfig, source: Source) -> tuple[str, str]:
    """Download what is not there; return why that was impossible, and what is wrong with the configuration."""
    if _is_stored(config, source):
        return "", ""
    try:
        Path(config.root).mkdir(parents=True, exist_ok=True)
        (Path(config.root) / ".writable").touch()
        (Path(config.root) / ".writable").unlink()
    except OSError as error:
        return "", f"data.root={config.root} cannot be written ({error.strerror}); choose another directory"
    if not _answers(source.url):
        return f"it is not in {config.root} and {source.url} cannot be reached", ""
    return _download(config, source), ""


def _download(config: DataConfig, source: Source) -> str:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(STALL_TIMEOUT_S)
    try:
        source.open(config.root, train=True, download=True)
    except (OSError, RuntimeError) as error:
        return f"it is not in {config.root} and cannot be downloaded ({str(error).splitlines()[0]})"
    finally:
        socket.setdefaulttimeout(before)
    return ""


def _answers(url: str) -> bool:
    """Whether a server answers; asked in a thread, because a name look-up has no timeout of its own."""
    answers: list[bool] = []

    def ask() -> None:
        try:
            with urllib.request.urlopen(url, timeout=CONNECT_TIMEOUT_S):
                answers.append(True)
        except urllib.error.HTTPError:
            answers.append(True)
        except OSError:
            answers.append(False)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(2 * CONNECT_TIMEOUT_S)
    return any(answers)


def _is_stored(config: DataConfig, source: Source) -> bool:
    if not (Path(config.root) / source.folder).is_dir():
        return False
    try:
        source.open(config.root, train=True)
        source.open(config.root, train=False)
    except (OSError, RuntimeError):
        return False
    return True


def _stored(config: DataConfig, source: Source, seed: int) -> Data:
    def part(train: bool) -> Images:
        stored = source.open(config.root, train)
        pixels = torch.as_tensor(stored.data)
        pixels = pixels.permute(0, 3, 1, 2) if pixels.dim() == 4 else pixels.unsqueeze(1)
        augment_seed = seed if train and source.augment else None
        return Images(pixels.contiguous(), torch.as_tensor(stored.targets), source.mean, source.std, augment_seed)

    train = part(True)
    return Data(config.name, train, part(False), tuple(train.pixels.shape[1:]), 10)


def _embedded(config: DataConfig, seed: int) -> Data:
    if isinstance(config, SyntheticConfig):
        shape = tuple(config.shape)
        count = config.num_samples
        train = Synthetic(shape, config.num_classes, range(count), seed)
        test = Synthetic(shape, config.num_classes, range(count, count + config.num_test_samples), seed)
        return Data("synthetic", train, test, shape, config.num_classes)
    if isinstance(config, TextConfig):
        train_text, test_text = standard_library(config.num_files, config.num_test_files)
        return Data(
            "stdlib",
            Text(train_text, config.context),
            Text(test_text, config.context),
            (config.context,),
            NUM_CHARACTERS,
        )
    return _digits()


def _digits() -> Data:
    """1797 digits of 8x8 pixels as 28x28; every sixth of each class is for testing."""
    from sklearn.datasets import load_digits  # seconds, which other data need not wait for

    pixels, labels = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
    large = functional.interpolate(pixels.view(-1, 1, 8, 8), size=(28, 28), mode="bilinear")
    large = (large * (255 / 16)).round().to(torch.uint8)
    by_class = labels.argsort(stable=True)
    for_test = torch.arange(len(labels)) % 6 == 0

    def part(indices: Tensor) -> Images:
        return Images(large[indices], labels[indices], (0.305,), (0.325,))

    return Data("digits", part(by_class[~for_test]), part(by_class[for_test]), (1, 28, 28), 10)
