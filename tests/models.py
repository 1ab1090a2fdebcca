"""Small models for the tests of training, each with something that a data-parallel wrapper can get wrong."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

NUM_INPUTS, NUM_HIDDEN, NUM_OUTPUTS = 5, 8, 3


class Tied(nn.Module):
    """One weight in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(NUM_INPUTS, NUM_INPUTS, bias=False)
        self.second = nn.Linear(NUM_INPUTS, NUM_INPUTS)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))[..., :NUM_OUTPUTS]


class Branches(nn.Module):
    """Two branches of which the sign of the first input picks one, and a third that is never used."""

    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleList(nn.Linear(NUM_INPUTS, NUM_OUTPUTS) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.branches[int(x[0, 0] > 0)](x)


class Lstm(nn.Module):
    """A recurrent layer; the features are its time steps."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(1, NUM_HIDDEN, batch_first=True)
        self.head = nn.Linear(NUM_HIDDEN, NUM_OUTPUTS)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x.unsqueeze(-1))[0][:, -1])


class Checkpointed(nn.Module):
    """Blocks whose activations are computed again in backward."""

    def __init__(self, use_reentrant: bool) -> None:
        super().__init__()
        self.first = nn.Linear(NUM_INPUTS, NUM_HIDDEN)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(NUM_HIDDEN, NUM_HIDDEN), nn.Tanh()) for _ in range(3))
        self.head = nn.Linear(NUM_HIDDEN, NUM_OUTPUTS)
        self.use_reentrant = use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=self.use_reentrant)
        return self.head(x)


class SharedCheckpoint(Checkpointed):
    """One block, checkpointed twice in a row."""

    def __init__(self, use_reentrant: bool) -> None:
        super().__init__(use_reentrant)
        self.blocks = self.blocks[:1]

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for _ in range(2):
            x = checkpoint(self.blocks[0], x, use_reentrant=self.use_reentrant)
        return self.head(x)


class SeveralOutputs(nn.Module):
    """Outputs in a dict and a tuple, one of them without a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Linear(NUM_INPUTS, NUM_HIDDEN)
        self.left = nn.Linear(NUM_HIDDEN, NUM_OUTPUTS)
        self.right = nn.Linear(NUM_HIDDEN, NUM_OUTPUTS)

    def forward(self, x: Tensor) -> dict[str, Tensor | tuple[Tensor, Tensor]]:
        hidden = torch.tanh(self.trunk(x))
        return {"left": self.left(hidden), "both": (self.right(hidden), hidden.detach())}


class MixedDtypes(nn.Module):
    """A float32 layer between float64 ones."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(NUM_INPUTS, NUM_HIDDEN).double()
        self.middle = nn.Linear(NUM_HIDDEN, NUM_HIDDEN).float()
        self.head = nn.Linear(NUM_HIDDEN, NUM_OUTPUTS).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.middle(self.first(x).float())).double())


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(NUM_INPUTS, NUM_HIDDEN), nn.Tanh(), nn.Linear(NUM_HIDDEN, NUM_OUTPUTS))


def frozen() -> nn.Module:
    model = mlp()
    model[0].requires_grad_(False)
    return model


def batch_norm() -> nn.Module:
    return nn.Sequential(
        nn.Linear(NUM_INPUTS, NUM_HIDDEN), nn.BatchNorm1d(NUM_HIDDEN), nn.Tanh(), nn.Linear(NUM_HIDDEN, NUM_OUTPUTS)
    )


def cnn() -> nn.Module:
    """A small convolutional network for 1x12x12 images and 10 classes, in channels_last."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Flatten(),
        nn.Linear(16 * 8 * 8, 10),
    ).to(memory_format=torch.channels_last)  # fmt: skip


def seeded(model: nn.Module, seed: int = 0) -> nn.Module:
    """Fill the parameters from a generator of their own: ranks that are threads share the global one."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3)
    return model
