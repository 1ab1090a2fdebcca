"""Argument checks of the communicator's public methods: who, which operation, what was given, what to do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor

from minidist.contract.carriers import CARRIED, ONLY_MOVED
from minidist.contract.rank import ANY_SOURCE, Rank
from minidist.contract.reduce_op import ReduceOp

DTYPES = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
    torch.complex64,
    torch.complex128,
)
"""What the hooks take; see `minidist.contract.carriers` for the others."""
_MOVED = CARRIED.union(DTYPES)
_FLOATS = frozenset(dtype for dtype in DTYPES if dtype.is_floating_point)
_OF_FLOATS = frozenset((ReduceOp.SUM, ReduceOp.AVG, ReduceOp.MIN, ReduceOp.MAX, ReduceOp.PRODUCT))
_OF_INTEGERS = frozenset(ReduceOp) - {ReduceOp.AVG}
_OF_COMPLEX = frozenset((ReduceOp.SUM, ReduceOp.AVG))
_OF_BOOL = {ReduceOp.SUM: ReduceOp.MAX, ReduceOp.PRODUCT: ReduceOp.MIN}
"""What the others of the two are for bool."""


def spell(dtype: torch.dtype) -> str:
    """Return the short name of a dtype."""
    return str(dtype).removeprefix("torch.")


def group(rank: int, world_size: int, timeout_s: float) -> None:
    """Check what every communicator is made with."""
    if world_size < 1:
        raise ValueError(f"world_size must be at least 1, got {world_size}")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must be 0 to {world_size - 1} (world_size - 1), got {rank}")
    if not timeout_s > 0:
        raise ValueError(f"timeout_s must be greater than 0 seconds, got {timeout_s}")


def segment_bytes(value: int) -> int:
    """Return the size of a segment, which has to hold an element of any dtype."""
    if value < 16:
        raise ValueError(f"segment_bytes must be at least 16, got {value}")
    return value


def tensors(comm: Rank, operation: str, **named: Tensor) -> None:
    """Check that every tensor can travel at all, and that they are of one kind."""
    first = next(iter(named.values()))
    for name, tensor in named.items():
        if not isinstance(tensor, Tensor) or tensor.dtype not in _MOVED or not _is_movable(tensor, comm.device_type):
            _refuse(comm, operation, name, tensor)
        if not tensor.is_contiguous() and name != "input" and operation != "isend" and overlaps_itself(tensor):
            raise ValueError(
                f"{comm.who(operation)}: elements of {name} share memory (is it expanded, or made of windows that "
                "overlap?), so it cannot be written into; use .clone()"
            )
        if tensor is not first and (tensor.dtype != first.dtype or tensor.device != first.device):
            raise TypeError(
                f"{comm.who(operation)}: {' and '.join(named)} must have one dtype and one device, got "
                f"{first.dtype} on {first.device} and {tensor.dtype} on {tensor.device}"
            )


def _is_movable(tensor: Tensor, device_type: str) -> bool:
    """Whether a communicator that moves tensors of such a device can take or stage this one."""
    on_device = (tensor.is_cpu and device_type == "cpu") or tensor.device.type in (device_type, "cuda")
    return on_device and tensor.layout is torch.strided


def _refuse(comm: Rank, operation: str, name: str, tensor: Tensor) -> NoReturn:
    """Say why a tensor cannot travel."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{comm.who(operation)}: {name} must be a torch.Tensor, got {type(tensor).__name__}")
    if tensor.layout is not torch.strided:
        raise TypeError(f"{comm.who(operation)}: {name} must be dense, got {tensor.layout}; use to_dense()")
    if tensor.dtype not in _MOVED:
        raise TypeError(
            f"{comm.who(operation)}: {name} has dtype {tensor.dtype}, which no backend moves; "
            f"use one of {', '.join(map(spell, DTYPES))}"
        )
    raise ValueError(
        f"{comm.who(operation)}: {type(comm).__name__} moves {comm.device_type} tensors, "
        f"but {name} is on {tensor.device}; move it with .to('{comm.device_type}')"
    )


def overlaps_itself(tensor: Tensor) -> bool:
    """Whether elements of a tensor share memory."""
    if tensor.is_contiguous() or tensor.numel() == 0:
        return False
    reach = 0
    dims = sorted((stride, n) for n, stride in zip(tensor.shape, tensor.stride(), strict=True) if n > 1)
    if dims[0][0] == 0:
        return True
    for stride, n in dims:
        if stride <= reach:
            break
        reach += stride * (n - 1)
    else:
        return False
    places = torch.zeros(1, dtype=torch.int64, device="cpu")  # interleaved in an unusual way: look at each element
    for stride, n in dims:
        places = (places[:, None] + stride * torch.arange(n, device="cpu")).view(-1)
    return len(set(places.tolist())) < places.numel()


def peer(comm: Rank, operation: str, name: str, rank: int) -> None:
    """Check a rank that an argument names."""
    if isinstance(rank, bool) or not isinstance(rank, int):
        raise TypeError(f"{comm.who(operation)}: {name} must be an int, got {type(rank).__name__}")
    if not 0 <= rank < comm.world_size:
        raise ValueError(f"{comm.who(operation)}: {name} must be a rank from 0 to {comm.world_size - 1}, got {rank}")


def message(comm: Rank, operation: str, tensor: Tensor, name: str, rank: int, tag: int) -> None:
    """Check the arguments of a send or receive."""
    tensors(comm, operation, tensor=tensor)
    peer(comm, operation, name, rank)
    if rank == comm.rank:
        raise ValueError(f"{comm.who(operation)}: {name} is this rank itself; copy the tensor instead")
    _tag(comm, operation, tag)


def source(comm: Rank, operation: str, tensor: Tensor, src: int | None, tag: int) -> int:
    """Check the arguments of a receive; return whom it comes from, ANY_SOURCE for None."""
    if src is not None:
        message(comm, operation, tensor, "src", src, tag)
        return src
    if not comm.receives_from_any:
        raise ValueError(
            f"{comm.who(operation)}: src is None, but {type(comm).__name__} cannot receive from any source; "
            "name the rank, and start an irecv for each one that may send"
        )
    if comm.world_size == 1:
        raise ValueError(f"{comm.who(operation)}: src is None, any other rank, but this rank is the only one")
    tensors(comm, operation, tensor=tensor)
    _tag(comm, operation, tag)
    return ANY_SOURCE


def _tag(comm: Rank, operation: str, tag: int) -> None:
    if not isinstance(tag, int) or not 0 <= tag <= comm.max_tag:
        raise ValueError(f"{comm.who(operation)}: tag must be an int from 0 to {comm.max_tag}, got {tag!r}")


def reduction(comm: Rank, operation: str, op: ReduceOp, **named: Tensor) -> ReduceOp:
    """Check tensors that are to be combined with ``op``; return what is to be done to their elements."""
    if not isinstance(op, ReduceOp):
        raise TypeError(f"{comm.who(operation)}: op must be a ReduceOp, got {op!r}; use ReduceOp.SUM")
    tensors(comm, operation, **named)
    for tensor in named.values():
        if tensor.dtype not in _FLOATS or op not in _OF_FLOATS:
            return _defined(comm, operation, op, tensor.dtype)
    return op


def _defined(comm: Rank, operation: str, op: ReduceOp, dtype: torch.dtype) -> ReduceOp:
    """Return what ``op`` is for elements of ``dtype``; raise if it has no meaning for them."""
    if dtype in ONLY_MOVED:
        raise TypeError(f"{comm.who(operation)}: {spell(dtype)} is moved, but not combined; use another dtype")
    if dtype.is_complex:
        defined = _OF_COMPLEX
    else:
        defined = _OF_FLOATS if dtype.is_floating_point else _OF_INTEGERS
    if op not in defined:
        names = ", ".join(op.name for op in ReduceOp if op in defined)
        raise TypeError(f"{comm.who(operation)}: op {op.name} is not defined for {spell(dtype)}; use one of {names}")
    return _OF_BOOL.get(op, op) if dtype is torch.bool else op


def blocks(comm: Rank, operation: str, many: str, **named: Tensor) -> None:
    """Check that the tensor called ``many`` holds one block of the other's size per rank."""
    tensors(comm, operation, **named)
    (one,) = (name for name in named if name != many)
    wanted = comm.world_size * named[one].numel()
    if named[many].numel() != wanted:
        raise ValueError(
            f"{comm.who(operation)}: {many} must have world_size x {one}.numel() = "
            f"{comm.world_size} x {named[one].numel()} = {wanted} elements, got {named[many].numel()}"
        )


def sized(comm: Rank, operation: str, name: str, tensor: Tensor, sizes: Sequence[int]) -> None:
    """Check that a tensor consists of a block of the given size for each rank."""
    if len(sizes) != comm.world_size:
        raise ValueError(
            f"{comm.who(operation)}: there must be a size for each of the {comm.world_size} ranks, got {len(sizes)}"
        )
    if min(sizes) < 0 or sum(sizes) != tensor.numel():
        raise ValueError(
            f"{comm.who(operation)}: {name} has {tensor.numel()} elements, but its blocks have {list(sizes)}"
        )


def uneven_blocks(comm: Rank, operation: str, many: str, sizes: Sequence[int], **named: Tensor) -> None:
    """Check that the tensor called ``many`` holds a block per rank, and this rank's is as large as the other tensor."""
    tensors(comm, operation, **named)
    sized(comm, operation, many, named[many], sizes)
    (one,) = (name for name in named if name != many)
    if named[one].numel() != sizes[comm.rank]:
        raise ValueError(
            f"{comm.who(operation)}: {one} has {named[one].numel()} elements, but sizes says {sizes[comm.rank]}"
        )


def uneven_all_to_all(
    comm: Rank, output: Tensor, input: Tensor, output_sizes: Sequence[int] | None, input_sizes: Sequence[int] | None
) -> tuple[Sequence[int], Sequence[int]]:
    """Check the tensors of an all-to-all whose blocks differ in size; return both sizes."""
    if output_sizes is None or input_sizes is None:
        raise ValueError(f"{comm.who('all_to_all')}: give both output_sizes and input_sizes, or neither")
    tensors(comm, "all_to_all", output=output, input=input)
    sized(comm, "all_to_all", "output", output, output_sizes)
    sized(comm, "all_to_all", "input", input, input_sizes)
    return output_sizes, input_sizes


def rooted(comm: Rank, operation: str, root: tuple[str, int], many: str, **named: Tensor | None) -> None:
    """Check a gather or scatter, where only the root has the tensor called ``many``."""
    peer(comm, operation, *root)
    given = {name: tensor for name, tensor in named.items() if tensor is not None or name != many}
    if comm.rank == root[1]:
        blocks(comm, operation, many, **named)  # type: ignore[arg-type]  # a None is refused by type
    elif len(given) != 1:
        raise ValueError(
            f"{comm.who(operation)}: {many} is for rank {root[1]} ({root[0]}) alone; give None on the others"
        )
    else:
        tensors(comm, operation, **given)  # type: ignore[arg-type]  # likewise


def equal_blocks(comm: Rank, operation: str, output: Tensor, input: Tensor) -> None:
    """Check the tensors of an all-to-all."""
    tensors(comm, operation, output=output, input=input)
    if output.numel() != input.numel() or input.numel() % comm.world_size:
        raise ValueError(
            f"{comm.who(operation)}: output and input must have one size that world_size = {comm.world_size} "
            f"divides, got {output.numel()} and {input.numel()} elements"
        )


def timeout(comm: Rank, operation: str, timeout_s: float) -> float:
    """Return the seconds that an operation may take."""
    if not timeout_s > 0:
        raise ValueError(f"{comm.who(operation)}: timeout_s must be greater than 0 seconds, got {timeout_s}")
    return timeout_s
