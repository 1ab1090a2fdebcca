"""The source text of Python's own standard library, which every installation has, as pieces of characters."""

from __future__ import annotations

import sysconfig
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

NUM_CHARACTERS = 128
"""ASCII; what is not stands as a question mark."""


class Text:
    """Pieces of a text, and what follows each character.

    Args:
        characters: the text, uint8, below NUM_CHARACTERS.
        context: the length of a piece.
    """

    def __init__(self, characters: Tensor, context: int) -> None:
        num_pieces = (len(characters) - 1) // context
        self._inputs = characters[: num_pieces * context].view(num_pieces, context)
        self._targets = characters[1 : num_pieces * context + 1].view(num_pieces, context)

    def __len__(self) -> int:
        return len(self._inputs)

    def set_epoch(self, epoch: int) -> None:
        return

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        where = torch.as_tensor(indices)
        return self._inputs[where].long(), self._targets[where].long()


def standard_library(num_files: int, num_test_files: int) -> tuple[Tensor, Tensor]:
    """Return the text of some modules of the standard library, and of others, spread evenly over all by their names."""
    paths = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    chosen = paths[:: max(1, len(paths) // (num_files + num_test_files))]
    every = max(2, len(chosen) // num_test_files)
    for_test = chosen[every - 1 :: every]
    return _text([path for path in chosen if path not in for_test]), _text(for_test)


def _text(paths: Sequence[Path]) -> Tensor:
    text = "".join(path.read_text(encoding="utf-8", errors="replace") for path in paths)
    return torch.frombuffer(bytearray(text.encode("ascii", "replace")), dtype=torch.uint8)
