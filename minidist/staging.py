"""Memory that a backend can take: contiguous and on its own kind of device."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def staged(hook: Callable[..., None], tensors: Sequence[Tensor | None], device_type: str) -> Callable[..., None] | None:
    """Return ``hook`` bound to ``tensors``, or to copies of them that the backend can take; None if all are empty.

    ``tensors`` is ``(tensor,)``, read and written, or ``(output, input)``; None where this rank has
    none. Copies are filled before the hook runs and written back after it, by the thread that runs it.
    """
    numel, native, detached = 0, True, list[Tensor | None]()
    for tensor in tensors:  # one plain loop: what is done here is paid for by every operation
        if tensor is not None:
            numel += tensor.numel()
            native = native and is_native(tensor, device_type)
            tensor = tensor.detach() if tensor.requires_grad else tensor
        detached.append(tensor)
    if tensors and numel == 0:
        return None
    if native:
        return functools.partial(hook, *detached)
    copies = [tensor if tensor is None else Staged(tensor, device_type) for tensor in detached]

    def copy_run_copy(*args: object) -> None:
        if copies[-1] is not None:
            copies[-1].load()
        hook(*(copy if copy is None else copy.memory for copy in copies), *args)
        if copies[0] is not None:
            copies[0].store()

    return copy_run_copy


def is_native(tensor: Tensor, device_type: str) -> bool:
    """Whether a backend that works on ``device_type`` can take ``tensor`` as it is."""
    on_device = tensor.is_cpu if device_type == "cpu" else tensor.device.type == device_type
    return on_device and tensor.is_contiguous()


class Staged:
    """A tensor and the memory that stands in for it; the same memory where none is needed."""

    def __init__(self, tensor: Tensor, device_type: str) -> None:
        self.tensor = self.memory = tensor
        if not is_native(tensor, device_type):
            on_cuda = tensor.is_cuda and device_type == "cpu"
            device = "cpu" if on_cuda else tensor.device
            self.memory = torch.empty(tensor.shape, dtype=tensor.dtype, device=device, pin_memory=on_cuda)
        # Recorded in the thread that owns the tensor: the copy may run in another one.
        self._ready = torch.cuda.current_stream(tensor.device).record_event() if tensor.is_cuda else None

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
