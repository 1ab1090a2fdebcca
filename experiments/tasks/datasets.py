"""Samples in memory, handed out by the batch, and the loaders over this rank's share of them.

What is random about a sample is a function of (seed, epoch, index) alone, so that a resumed run, or one
with another number of workers, sees the same samples.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, Sampler

from minidist.training.sampler import ShardedSampler
from minidist.training.seed import derived_seed

Batch = tuple[Tensor, Tensor]
PAD = 4


class Samples(Protocol):
    """A data set that hands out whole batches, as torch's DataLoader asks for them."""

    def __len__(self) -> int: ...

    def __getitems__(self, indices: Sequence[int]) -> Batch: ...

    def set_epoch(self, epoch: int) -> None:
        """Draw what is random about the samples of ``epoch``."""


class Images:
    """Images of whole bytes, normalised when they are asked for.

    Args:
        pixels: (N, C, H, W), uint8.
        labels: (N,), int64.
        mean, std: per channel, of pixels from 0 to 1.
        augment_seed: shift and mirror images at random; None leaves them as they are.
    """

    def __init__(
        self,
        pixels: Tensor,
        labels: Tensor,
        mean: Sequence[float],
        std: Sequence[float],
        augment_seed: int | None = None,
    ) -> None:
        self.pixels = pixels
        self.labels = labels.long()
        self._augment_seed = augment_seed
        self._mean, self._std = (torch.tensor(values).view(1, -1, 1, 1) for values in (mean, std))
        self.set_epoch(0)

    def __len__(self) -> int:
        return len(self.pixels)

    def set_epoch(self, epoch: int) -> None:
        if self._augment_seed is not None:
            generator = _generator(self._augment_seed, epoch)
            self._shifts = torch.randint(0, 2 * PAD + 1, (len(self), 2), generator=generator)
            self._mirrored = torch.rand(len(self), generator=generator) < 0.5

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        where = torch.as_tensor(indices)
        batch = (self.pixels[where].float() / 255 - self._mean) / self._std
        if self._augment_seed is not None:
            batch = self._augmented(batch, where)
        return batch, self.labels[where]

    def _augmented(self, batch: Tensor, where: Tensor) -> Tensor:
        height, width = batch.shape[2:]
        padded = functional.pad(batch, (PAD, PAD, PAD, PAD))
        shifts = self._shifts[where].tolist()
        crops = [image[:, y : y + height, x : x + width] for image, (y, x) in zip(padded, shifts, strict=True)]
        return torch.where(self._mirrored[where].view(-1, 1, 1, 1), torch.stack(crops).flip(3), torch.stack(crops))


class Synthetic:
    """Noise around one random point per class, made when it is asked for.

    Args:
        shape: of a sample.
        num_classes: labels are 0 to num_classes - 1.
        numbers: which of the endless sequence of samples these are.
        seed: of the whole sequence.
    """

    def __init__(self, shape: tuple[int, ...], num_classes: int, numbers: range, seed: int) -> None:
        self._shape = shape
        self._num_classes = num_classes
        self._numbers = numbers
        self._seed = seed

    def __len__(self) -> int:
        return len(self._numbers)

    def set_epoch(self, epoch: int) -> None:
        return

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        numbers = [self._numbers[index] for index in indices]
        labels = torch.tensor([number % self._num_classes for number in numbers])
        noise = torch.stack([torch.randn(self._shape, generator=_generator(self._seed, 1, n)) for n in numbers])
        return noise + 0.5 * self._centres[labels], labels

    @functools.cached_property
    def _centres(self) -> Tensor:
        return torch.randn((self._num_classes, *self._shape), generator=_generator(self._seed, 0))


class _EpochSampler(Sampler[int]):
    """A sampler that tells its data set the epoch, too."""

    def __init__(self, samples: Samples, sampler: ShardedSampler) -> None:
        self._samples = samples
        self._sampler = sampler
        self.batch_size = sampler.batch_size

    @property
    def first_batch(self) -> int:
        return self._sampler.first_batch

    @property
    def skipped(self) -> int:
        return self._sampler.skipped

    @skipped.setter
    def skipped(self, num_samples: int) -> None:
        self._sampler.skipped = num_samples

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None:
        self._samples.set_epoch(epoch)
        self._sampler.set_epoch(epoch, first_batch)

    def __iter__(self) -> Iterator[int]:
        return iter(self._sampler)

    def __len__(self) -> int:
        return len(self._sampler)


def loader(
    samples: Samples, rank: int, world_size: int, batch_size: int, num_workers: int, train: bool, seed: int
) -> DataLoader[Batch]:
    """Return a loader of this rank's share: shuffled for training, in order and uneven for tests."""
    sharded = ShardedSampler(len(samples), rank, world_size, batch_size, shuffle=train, seed=seed, pad=train)
    return DataLoader(
        samples,  # type: ignore[arg-type]  # has __getitems__ in place of __getitem__
        batch_size,
        sampler=_EpochSampler(samples, sharded),
        num_workers=num_workers,
        collate_fn=_as_it_is,
        generator=torch.Generator(),  # a loader without one draws from the global generator
    )


def _as_it_is(batch: Any) -> Any:
    return batch


def _generator(*parts: int) -> torch.Generator:
    return torch.Generator().manual_seed(derived_seed(*parts))
