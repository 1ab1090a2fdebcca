"""The models that conf/model/ names: each is made for samples of a shape (C, H, W) and a number of classes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from torch import nn

from experiments.tasks.gpt import Gpt


def mlp(shape: Sequence[int], num_classes: int, width: int, depth: int) -> nn.Module:
    """Return ``depth`` hidden layers of ``width`` units; samples may have any shape."""
    sizes = [math.prod(shape)] + [width] * depth
    hidden = [layer for n, m in pairwise(sizes) for layer in (nn.Linear(n, m), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(sizes[-1], num_classes))


def cnn(shape: Sequence[int], num_classes: int, width: int, dropout: float = 0.25) -> nn.Module:
    """Return two convolutions of ``width`` and twice as many channels and two fully connected layers."""
    return nn.Sequential(
        nn.Conv2d(shape[0], width, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(width, 2 * width, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveMaxPool2d(7),
        nn.Flatten(),
        nn.Linear(2 * width * 7 * 7, 8 * width),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Linear(8 * width, num_classes),
    )


def resnet18(shape: Sequence[int], num_classes: int) -> nn.Module:
    """Return torchvision's ResNet-18; images below 64 pixels keep their size through the stem."""
    import torchvision  # seconds, which the other models need not wait for

    model: nn.Module = torchvision.models.resnet18(num_classes=num_classes)
    small = min(shape[1:]) < 64
    kernel, stride = (3, 1) if small else (7, 2)
    model.conv1 = nn.Conv2d(shape[0], 64, kernel, stride, kernel // 2, bias=False)
    if small:
        model.maxpool = nn.Identity()
    return model


def gpt(shape: Sequence[int], num_classes: int, width: int, depth: int, num_heads: int) -> nn.Module:
    """Return a transformer for samples of ``shape[0]`` characters, see `Gpt`.

    Raises:
        ValueError: the samples are no text.
    """
    if len(shape) != 1:
        raise ValueError(f"gpt reads text, and samples of shape {tuple(shape)} are none; choose data=stdlib")
    return Gpt(shape[0], num_classes, width, depth, num_heads)
