"""Inputs of closed form for the checks of the conformance suite, and what must come of them.

Every value is a small integer, so sums, products and averages are exact in every dtype, and what is
expected is computed without communication.
"""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from minidist.communicator import ReduceOp
from minidist.contract import checks

A = TypeVar("A")
B = TypeVar("B")
Check = TypeVar("Check", bound=Callable[..., None])
FLOATS = tuple(dtype for dtype in checks.DTYPES if dtype.is_floating_point)
BITWISE = {
    ReduceOp.BAND: torch.bitwise_and,
    ReduceOp.BOR: torch.bitwise_or,
    ReduceOp.BXOR: torch.bitwise_xor,
}
SENTINEL = 99
DEVICE = "MINIDIST_TEST_DEVICE"
"""The variable that tells ranks on which device their tensors are; see `--comm-device`."""
EVERYTHING = "MINIDIST_TEST_EVERYTHING"
"""The variable that is set where checks are to go through every combination of their inputs; see `--slow`."""


@dataclass(frozen=True)
class Needs:
    """What a check asks of the world that runs it.

    Attributes:
        ranks: the fewest ranks with which it says anything.
        fresh: a communicator of its own, which it may leave unusable; it is called once, as
            ``check(comm, meet)``. ``meet()`` returns once every rank has called it, not through ``comm``.
        once: too long to be called twice.
        own_world: it ends a process.
    """

    ranks: int = 1
    fresh: bool = False
    once: bool = False
    own_world: bool = False


def needs(**wanted: int) -> Callable[[Check], Check]:
    """Attach `Needs` to a check."""

    def attach(check: Check) -> Check:
        check.needs = Needs(**wanted)  # type: ignore[attr-defined]
        return check

    return attach


def sizes(world_size: int) -> list[int]:
    """Return the numbers of elements at which an algorithm that cuts into world_size parts can go wrong."""
    return sorted({0, 1, world_size - 1, world_size, world_size + 1, 1000})


def reductions(numels: Sequence[int]) -> Iterator[tuple[torch.dtype, ReduceOp, int]]:
    """Yield every dtype with every operation that is defined for it, and with every number of elements."""
    for turn, dtype in enumerate(checks.DTYPES):
        for op, numel in combinations(_defined(dtype), numels, turn):
            yield dtype, op, numel
    integers = [dtype for dtype in checks.DTYPES if not dtype.is_floating_point and not dtype.is_complex]
    for turn, op in enumerate(BITWISE):
        for dtype, numel in combinations(integers, numels, turn):
            yield dtype, op, numel


def _defined(dtype: torch.dtype) -> Sequence[ReduceOp]:
    """Return what combines numbers of this dtype; the bitwise ones come apart, as few dtypes have them."""
    if dtype.is_complex:
        return [ReduceOp.SUM, ReduceOp.AVG]
    return [op for op in ReduceOp if op not in BITWISE and (dtype.is_floating_point or op is not ReduceOp.AVG)]


def combinable(dtype: torch.dtype) -> Sequence[ReduceOp]:
    """Return what combines numbers of this dtype in a hook, where there is no AVG."""
    is_integer = not dtype.is_floating_point and not dtype.is_complex
    return [op for op in _defined(dtype) if op is not ReduceOp.AVG] + (list(BITWISE) if is_integer else [])


def forget() -> None:
    """Let go of the tensors that are kept, which many sizes would fill the memory with."""
    _closed_form.cache_clear()
    reduced.cache_clear()


def moves(numels: Sequence[int], roots: Sequence[int]) -> Iterator[tuple[torch.dtype, int, int]]:
    """Yield every dtype with every number of elements, and with every root."""
    for turn, dtype in enumerate(checks.DTYPES):
        for numel, root in combinations(numels, roots, turn):
            yield dtype, numel, root


def wants_everything() -> bool:
    return EVERYTHING in os.environ


def combinations(first: Sequence[A], second: Sequence[B], turn: int) -> Iterator[tuple[A, B]]:
    """Yield each of both at least once; over as many turns as the longer has members, each of one with each other.

    So what is wrong with a value, or with two of three values together, is found in a third or less of the product,
    which the slow set goes through.
    """
    if wants_everything():
        return itertools.product(first, second)
    steps = range(max(len(first), len(second)))
    return ((first[(step - turn) % len(first)], second[step % len(second)]) for step in steps)


@functools.lru_cache(maxsize=4096)
def _closed_form(rank: int, numel: int, dtype: torch.dtype, salt: int) -> Tensor:
    values = (torch.arange(numel) * 3 + rank * 5 + salt) % 7
    if dtype == torch.bool:
        return values > 2
    if dtype.is_complex:
        return torch.complex(values - 3.0, (values * 2 + 1) % 7 - 3.0).to(dtype)
    return (values if dtype == torch.uint8 else values - 3).to(dtype)


def tensor(rank: int, numel: int, dtype: torch.dtype = torch.float32, salt: int = 0) -> Tensor:
    """Return the data that ``rank`` brings; ``salt`` tells the operations of a check apart."""
    return _closed_form(rank, numel, dtype, salt).clone()


def operand(rank: int, numel: int, dtype: torch.dtype, op: ReduceOp, world_size: int) -> Tensor:
    """Return what ``rank`` brings to a reduction, such that the result is exact."""
    values = tensor(rank, numel, dtype)
    if op is ReduceOp.PRODUCT and dtype != torch.bool:
        return values % 2 + 1
    return values * world_size if op is ReduceOp.AVG else values


@functools.lru_cache(maxsize=4096)
def reduced(world_size: int, numel: int, dtype: torch.dtype, op: ReduceOp) -> Tensor:
    """Return the reduction of all ranks' operands; not to be changed."""
    wide = torch.complex128 if dtype.is_complex else torch.float64 if dtype.is_floating_point else torch.int64
    stack = torch.stack([operand(r, numel, dtype, op, world_size) for r in range(world_size)]).to(wide)
    combine: dict[ReduceOp, Callable[[Tensor], Tensor]] = {
        ReduceOp.SUM: lambda s: s.sum(0),
        ReduceOp.AVG: lambda s: s.mean(0),
        ReduceOp.MIN: lambda s: s.amin(0),
        ReduceOp.MAX: lambda s: s.amax(0),
        ReduceOp.PRODUCT: lambda s: s.prod(0),
        **{op: functools.partial(functools.reduce, both) for op, both in BITWISE.items()},
    }
    return combine[op](stack).to(dtype)


def layouts(values: Tensor) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield (name, view, memory): copies of ``values`` (1-d, even numel) that are laid out differently.

    What of ``memory`` does not belong to ``view`` holds SENTINEL, and must keep it.
    """
    yield "contiguous", (whole := values.clone()), whole
    memory = torch.full((2 * values.numel(),), SENTINEL, dtype=values.dtype)
    yield "strided", memory[::2].copy_(values), memory
    memory = torch.full((values.numel() // 2, 3), SENTINEL, dtype=values.dtype)
    yield "transposed", memory.t()[:2].copy_(values.view(2, -1)), memory


def untouched(memory: Tensor) -> int:
    """Count the elements that still hold SENTINEL."""
    return int((memory == SENTINEL).sum())


def assert_same(actual: Tensor, expected: Tensor, *what: object) -> None:
    """Compare bit for bit; ``what`` names the case in the message."""
    actual, expected = actual.detach().reshape(-1), expected.reshape(-1)
    case = " ".join(str(part) for part in what)
    assert actual.dtype == expected.dtype, f"{case}: dtype {actual.dtype}, expected {expected.dtype}"
    assert torch.equal(actual, expected), f"{case}: got {actual[:8]}, expected {expected[:8]} (first 8 shown)"
