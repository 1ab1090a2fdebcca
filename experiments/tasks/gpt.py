"""A small transformer that predicts the next character.

Vaswani et al., "Attention Is All You Need" (2017), with the norm before each layer as in Radford et al., "Language
Models are Unsupervised Multitask Learners" (2019). It has no dropout, so that ranks which share a process draw nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class Gpt(nn.Module):
    """From characters (N, T), int64, to the scores of those that follow, (N, num_classes, T).

    Args:
        context: the most characters of a sample.
        num_classes: how many different characters there are.
        width: of the stream that the layers add to, a multiple of ``num_heads``.
        depth: how many layers.
        num_heads: of the attention in each of them.

    Raises:
        ValueError: the width cannot be shared by the heads.
    """

    def __init__(self, context: int, num_classes: int, width: int, depth: int, num_heads: int) -> None:
        super().__init__()
        if width % num_heads:
            raise ValueError(f"width must be a multiple of num_heads = {num_heads}, got {width}")
        self.characters = nn.Embedding(num_classes, width)
        self.places = nn.Parameter(0.02 * torch.randn(context, width))
        self.blocks = nn.Sequential(*(_Block(width, num_heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.scores = nn.Linear(width, num_classes, bias=False)
        nn.init.normal_(self.characters.weight, std=0.02)

    def forward(self, characters: Tensor) -> Tensor:
        stream = self.characters(characters) + self.places[: characters.shape[1]]
        scores: Tensor = self.scores(self.norm(self.blocks(stream)))
        return scores.transpose(1, 2)


class _Block(nn.Module):
    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self._num_heads = num_heads
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.queries_keys_values = nn.Linear(width, 3 * width)
        self.mixed = nn.Linear(width, width)
        self.hidden = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, stream: Tensor) -> Tensor:
        stream = stream + self.mixed(self._attention(self.norms[0](stream)))
        out: Tensor = stream + self.hidden(self.norms[1](stream))
        return out

    def _attention(self, stream: Tensor) -> Tensor:
        parts = self.queries_keys_values(stream).chunk(3, dim=2)
        queries, keys, values = (part.unflatten(2, (self._num_heads, -1)).transpose(1, 2) for part in parts)
        attended = functional.scaled_dot_product_attention(queries, keys, values, is_causal=True)
        return attended.transpose(1, 2).flatten(2)
