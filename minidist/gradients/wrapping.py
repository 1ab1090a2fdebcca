"""What cannot be trained data-parallel, said by name and on every rank before anything is sent."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from minidist.contract import checks


def complaint(module: nn.Module, bucket_cap_mb: float, wrapper: type[nn.Module]) -> str | None:
    """Return the first thing that stands against wrapping ``module`` in a ``wrapper``, and what to do about it."""
    return next(_complaints(module, bucket_cap_mb, wrapper), None)


def _complaints(module: nn.Module, bucket_cap_mb: float, wrapper: type[nn.Module]) -> Iterator[str]:
    if not (bucket_cap_mb > 0 and math.isfinite(bucket_cap_mb)):
        yield f"bucket_cap_mb must be > 0, got {bucket_cap_mb}"
    for name, each in module.named_modules():
        if why := _of_module(each, wrapper):
            yield f"module {name or '(the whole)'} is a {type(each).__name__}, {why}"
    for name, parameter in module.named_parameters():
        if why := _of_tensor(parameter) or (_of_trained(parameter) if parameter.requires_grad else None):
            yield f"parameter {name} {why}"
    for name, buffer in module.named_buffers():
        if why := _of_tensor(buffer):
            yield f"buffer {name} {why}"


def _of_module(module: nn.Module, wrapper: type[nn.Module]) -> str | None:
    """Name what reduces gradients itself, and what would leave the replicas different.

    What asks torch's default process group would run unsynchronised where nobody made one.
    """
    if isinstance(module, nn.parallel.DistributedDataParallel | wrapper):
        return "which reduces gradients itself; wrap its .module"
    if (
        isinstance(module, nn.Embedding | nn.EmbeddingBag)
        and module.max_norm is not None
        and module.weight.requires_grad
    ):
        return (
            "whose max_norm shortens the rows that a rank looks up on that rank alone, so that replicas drift apart; "
            "use max_norm=None, and torch.renorm() of the whole weight after each step"
        )
    if "process_group" not in vars(module) or (dist.is_available() and dist.is_initialized()):
        return None
    if isinstance(module, nn.SyncBatchNorm):
        fix = "make it one of ours with minidist.sync_batch_norm.convert_sync_batchnorm(module, comm)"
    else:
        fix = "replace it, or call torch.distributed.init_process_group()"
    return f"which asks torch's process group, and there is none; {fix}"


def _of_tensor(tensor: Tensor) -> str | None:
    if is_lazy(tensor):
        return "is lazy and has no shape yet; run one batch through the module before you wrap it"
    if tensor.is_meta:
        return "is on the meta device and has no memory; give it some with module.to_empty(device=...)"
    if tensor.is_inference():
        return "was made in inference mode, and cannot be changed outside of it; replace it by its .clone()"
    if tensor.layout is not torch.strided:
        return f"is not dense but {tensor.layout}; make it dense with to_dense()"
    if tensor.is_quantized or torch.utils._python_dispatch.is_traceable_wrapper_subclass(tensor):
        return f"is a {type(tensor).__name__} of {tensor.dtype} that is not plain memory; use a plain tensor"
    if tensor.numel() and tensor.untyped_storage().nbytes() == 0:
        return "has no memory, as it was freed; give it some before you wrap the module"
    if checks.overlaps_itself(tensor):
        return "has elements that share memory (is it expanded?); give each its own with .clone()"
    return None


def _of_trained(parameter: Tensor) -> str | None:
    if parameter.dtype in checks.DTYPES:
        return None
    choices = ", ".join(checks.spell(dtype) for dtype in checks.DTYPES if dtype.is_floating_point)
    return f"has dtype {parameter.dtype}, in which gradients cannot be reduced; use one of {choices}, or freeze it"
