"""Formats of numbers in few bits, each block of them with a scale of its own.

A format turns rows of float32 into rows of bytes and back. The scale is the only thing that a block has of its own, so
a row costs as many bits per number as the format says, and four bytes per block.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

SCALE_BYTES = 4


class Format(ABC):
    """Numbers in blocks.

    Attributes:
        bits: of a number, 8 or 1.
        block: numbers that share a scale, a multiple of 8.
    """

    bits = 8

    def __init__(self, block: int) -> None:
        if not isinstance(block, int) or block < 8 or block % 8:
            raise ValueError(f"{type(self).__name__}: block must be a positive multiple of 8, got {block}")
        self.block = block

    def describe(self) -> str:
        """Return the class and its setting."""
        return f"{type(self).__name__}(block={self.block})"

    def nbytes(self, numel: int) -> int:
        """Return the bytes of so many numbers, a multiple of the block."""
        return numel * self.bits // 8 + numel // self.block * SCALE_BYTES

    def encode(self, rows: Tensor, draws: torch.Generator, lengths: Tensor | None = None) -> Tensor:
        """Return uint8[rows, nbytes] for float32[rows, numel].

        Args:
            rows: the numbers.
            draws: decide where rounding is left to chance.
            lengths: int64[rows], how many numbers of each row count; those behind them are 0.
        """
        blocks = rows.view(len(rows), -1, self.block)
        starts = torch.arange(blocks.shape[1], device=rows.device) * self.block
        counts = torch.full_like(starts, self.block) if lengths is None else lengths.unsqueeze(1) - starts
        scales = self.scales(blocks, counts.clamp(1, self.block))
        codes = self.codes(blocks, scales.unsqueeze(-1), draws).view(len(rows), -1)
        return torch.cat([scales.view(torch.uint8), codes], dim=1)

    def decode(self, data: Tensor, numel: int) -> Tensor:
        """Return float32[rows, numel] for uint8[rows, nbytes]."""
        split = numel // self.block * SCALE_BYTES
        # Clones, as memory can be seen as another dtype only from a multiple of its size on.
        scales = data[:, :split].reshape(-1).clone().view(torch.float32)
        codes = data[:, split:].reshape(-1).clone().view(len(data), -1)
        return (self.numbers(codes).view(-1, self.block) * scales.unsqueeze(-1)).view(len(data), numel)

    @abstractmethod
    def scales(self, blocks: Tensor, counts: Tensor) -> Tensor:
        """Return float32[rows, blocks] for float32[rows, blocks, block]: what the numbers of a block are divided by.

        So many of a block count, at least one; the others are 0.

        Where a number is not finite, the scale must not be, or what comes out would be wrong without a sign of it.
        """

    @abstractmethod
    def codes(self, blocks: Tensor, scales: Tensor, draws: torch.Generator) -> Tensor:
        """Return uint8[rows, bytes]: the numbers over their scales."""

    @abstractmethod
    def numbers(self, codes: Tensor) -> Tensor:
        """Return float32[rows, numel] for codes, not yet times their scales."""


class Float8(Format):
    """Eight bits, of which four are an exponent (e4m3): Micikevicius et al., "FP8 Formats for Deep Learning" (2022)."""

    def __init__(self, block: int = 256) -> None:
        super().__init__(block)

    def scales(self, blocks: Tensor, counts: Tensor) -> Tensor:
        return blocks.abs().amax(-1) / torch.finfo(torch.float8_e4m3fn).max

    def codes(self, blocks: Tensor, scales: Tensor, draws: torch.Generator) -> Tensor:
        return _over(blocks, scales).to(torch.float8_e4m3fn).view(torch.uint8)

    def numbers(self, codes: Tensor) -> Tensor:
        return codes.view(torch.float8_e4m3fn).float()


class Int8(Format):
    """255 equal steps, rounded up or down by chance so that the mean is right.

    QSGD: Alistarh et al., "QSGD: Communication-Efficient SGD via Gradient Quantization and Encoding" (2017), with the
    largest number of a block as its scale.
    """

    LEVELS = 127

    def __init__(self, block: int = 256) -> None:
        super().__init__(block)

    def scales(self, blocks: Tensor, counts: Tensor) -> Tensor:
        return blocks.abs().amax(-1) / self.LEVELS

    def codes(self, blocks: Tensor, scales: Tensor, draws: torch.Generator) -> Tensor:
        chance = torch.rand(blocks.shape, generator=draws, device=blocks.device)
        rounded = (_over(blocks, scales) + chance).floor_().clamp_(-self.LEVELS, self.LEVELS)
        return rounded.to(torch.int8).view(torch.uint8)

    def numbers(self, codes: Tensor) -> Tensor:
        return codes.view(torch.int8).float()


class Sign(Format):
    """One bit, the sign, and the mean absolute value of the block.

    With `ErrorFeedback` that is EF-signSGD: Karimireddy et al., "Error Feedback Fixes SignSGD and other Gradient
    Compression Schemes" (2019). Without it, signSGD does not converge on many problems.
    """

    bits = 1

    def __init__(self, block: int = 4096) -> None:
        super().__init__(block)

    def scales(self, blocks: Tensor, counts: Tensor) -> Tensor:
        return blocks.abs().sum(-1) / counts

    def codes(self, blocks: Tensor, scales: Tensor, draws: torch.Generator) -> Tensor:
        places = 2 ** torch.arange(8, dtype=torch.uint8, device=blocks.device)
        return ((blocks.view(len(blocks), -1, 8) >= 0) * places).sum(-1, dtype=torch.uint8)

    def numbers(self, codes: Tensor) -> Tensor:
        places = 2 ** torch.arange(8, dtype=torch.uint8, device=codes.device)
        return ((codes.unsqueeze(-1) & places) != 0).float().mul_(2).sub_(1).view(len(codes), -1)


def _over(blocks: Tensor, scales: Tensor) -> Tensor:
    """Return the numbers over their scales; 0 where all of a block are 0."""
    return blocks / scales.where(scales != 0, 1.0)
