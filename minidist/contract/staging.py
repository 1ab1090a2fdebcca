"""Memory that a backend can take: contiguous, on its own kind of device, and of a dtype that it knows."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from minidist.contract.carriers import CARRIED, WIDER, as_carried


def staged(
    hook: Callable[..., None],
    tensors: Sequence[Tensor | None],
    device_type: str,
    divisor: int = 0,
    keep: bool = False,
    own_block: int | None = None,
) -> Callable[..., None] | None:
    """Return ``hook`` bound to ``tensors``, or to copies of them that the backend can take; None if all are empty.

    Copies are filled before the hook runs and written back after it, by the thread that runs it: an operation before
    this one may still change what it reads.

    Args:
        hook: called with them.
        tensors: ``(tensor,)``, read and written, or ``(output, input)``; None where this rank has none. An input that
            shares memory with the output is copied too.
        device_type: the kind of device that the hook takes.
        divisor: what is read is divided by it first; 0 where nothing is combined.
        keep: the one tensor is only read; the hook writes into a copy.
        own_block: the hook takes an input that is this block of the output as it is.
    """
    is_empty = is_ready = True
    for tensor in tensors:
        if tensor is not None:
            is_empty = is_empty and tensor.numel() == 0
            is_ready = is_ready and not tensor.requires_grad and is_native(tensor, device_type)
    if is_empty and tensors:
        return None
    apart = keep or (len(tensors) > 1 and _need_apart(tensors[0], tensors[1], divisor, own_block))
    if is_ready and divisor < 2 and not apart:
        return functools.partial(hook, *tensors)
    return _on_copies(hook, tensors, device_type, divisor, keep, apart)


def _need_apart(output: Tensor | None, input: Tensor | None, divisor: int, own_block: int | None) -> bool:
    """Whether what is read needs memory of its own, so that it keeps its values, or is not written over too early."""
    return output is not None and input is not None and (divisor > 1 or overlap(output, input, own_block))


def _on_copies(
    hook: Callable[..., None],
    tensors: Sequence[Tensor | None],
    device_type: str,
    divisor: int,
    keep: bool,
    apart: bool,
) -> Callable[..., None]:
    """Return ``hook`` bound to copies of ``tensors``, the input in memory of its own if ``apart``."""
    copies = [tensor if tensor is None else Staged(tensor.detach(), device_type, divisor > 0) for tensor in tensors]
    if apart and copies[-1] is not None:
        copies[-1].stand_apart()

    def copy_run_copy(*args: object) -> None:
        if copies[-1] is not None:
            copies[-1].load()
            if divisor > 1:
                copies[-1].memory.div_(divisor)
        hook(*(copy if copy is None else as_carried(copy.memory) for copy in copies), *args)
        if copies[0] is not None and not keep:
            copies[0].store()

    return copy_run_copy


def is_native(tensor: Tensor, device_type: str) -> bool:
    """Whether a backend that works on ``device_type`` can take ``tensor`` as it is."""
    return tensor.dtype not in CARRIED and _is_in_place(tensor, device_type)


def _is_in_place(tensor: Tensor, device_type: str) -> bool:
    """Whether its memory is what a backend can work on."""
    on_device = tensor.is_cpu if device_type == "cpu" else tensor.device.type == device_type
    # A single element counts as contiguous with any stride, and could not be viewed as bytes.
    is_whole = tensor.is_contiguous() and (tensor.numel() != 1 or tensor.stride()[-1:] in ((), (1,)))
    return on_device and is_whole and not tensor.is_conj() and not tensor.is_neg()


def overlap(output: Tensor, input: Tensor, own_block: int | None = None) -> bool:
    """Whether two contiguous tensors have memory in common, and not as the hook takes it."""
    start = output.data_ptr()
    other = input.data_ptr()
    if own_block is not None and other == start + own_block * input.nbytes:
        return False
    return start < other + input.nbytes and other < start + output.nbytes


class Staged:
    """A tensor and the memory that stands in for it; the same memory where none is needed.

    Args:
        tensor: what the caller has given.
        device_type: the kind of device that the backend takes.
        is_combined: whether its elements are combined, and not only moved.
    """

    def __init__(self, tensor: Tensor, device_type: str, is_combined: bool = False) -> None:
        self.tensor = self.memory = tensor
        dtype = WIDER.get(tensor.dtype, tensor.dtype) if is_combined else tensor.dtype
        if dtype != tensor.dtype or not _is_in_place(tensor, device_type):
            on_cuda = tensor.is_cuda and device_type == "cpu"
            device = "cpu" if on_cuda else tensor.device
            self.memory = torch.empty(tensor.shape, dtype=dtype, device=device, pin_memory=on_cuda)
        # Recorded in the thread that owns the tensor: the copy may run in another one.
        self._ready = torch.cuda.current_stream(tensor.device).record_event() if tensor.is_cuda else None

    def stand_apart(self) -> None:
        """Use memory of its own in any case."""
        if self.memory is self.tensor:
            self.memory = torch.empty_like(self.tensor, memory_format=torch.contiguous_format)

    def load(self) -> None:
        """Copy the tensor into the memory."""
        self._copy(self.memory, self.tensor)

    def store(self) -> None:
        """Copy the memory into the tensor."""
        self._copy(self.tensor, self.memory)

    def _copy(self, target: Tensor, source: Tensor) -> None:
        if target is source:
            return
        if self._ready is None or self.memory.is_cuda:
            target.copy_(source)
            return
        stream = torch.cuda.Stream(self.tensor.device)  # type: ignore[no-untyped-call]
        stream.wait_event(self._ready)
        with torch.cuda.stream(stream):
            target.copy_(source, non_blocking=True)
        stream.synchronize()
