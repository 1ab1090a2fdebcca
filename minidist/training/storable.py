"""What a checkpoint can hold: what torch reads back without running anybody's code, and NumPy's values besides.

``torch.load(weights_only=True)`` takes numbers, strings, tensors, and plain containers of them. Schedulers and
optimizers also hold what users give them, such as a learning rate of NumPy's. `storable` spells those as plain values,
`original` makes them what they were, to the type and the bit, so that a resumed training computes as before.
"""

from __future__ import annotations

import copy
import io
from collections import Counter, OrderedDict
from typing import Any

import numpy as np
import torch

from minidist.errors import CheckpointError

_PLAIN = (type(None), bool, int, float, complex, str, torch.Tensor, torch.nn.Parameter, torch.dtype)
_MAPPINGS = (dict, OrderedDict, Counter)
_SEQUENCES = (list, tuple)
_NUMPY = "minidist.numpy"
"""The key by which a value of NumPy's is recognised."""


def storable(value: Any, name: str = "") -> Any:
    """Return ``value``, or a copy of its containers in which values of NumPy's are spelled out.

    Args:
        value: what is to be stored.
        name: where it stands, as in ``optimizer.param_groups.0.lr``.

    Raises:
        CheckpointError: it could not be read back; names the entry.
    """
    kind = type(value)
    if kind in _PLAIN:
        return value
    if kind in _MAPPINGS:
        return _mapping(value, name)
    if kind in _SEQUENCES:
        parts = [storable(part, _below(name, index)) for index, part in enumerate(value)]
        return value if _unchanged(parts, value) else kind(parts)
    if isinstance(value, np.generic) or kind is np.ndarray:
        return _spelled(value, name)
    _ensure_reads_back(value, name)
    return value


def original(value: Any) -> Any:
    """Return what `storable` was given."""
    kind = type(value)
    if kind in _MAPPINGS:
        if _NUMPY in value:
            return _numpy(*value[_NUMPY])
        return _refilled(value, {key: original(part) for key, part in value.items()})
    if kind in _SEQUENCES:
        parts = [original(part) for part in value]
        return value if _unchanged(parts, value) else kind(parts)
    return value


def _mapping(value: Any, name: str) -> Any:
    # A key of NumPy's is found by its Python number, and the other way round.
    keys = [key.item() if isinstance(key, np.generic) else storable(key, f"a key of {name}") for key in value]
    return _refilled(
        value, {key: storable(part, _below(name, key)) for key, part in zip(keys, value.values(), strict=True)}
    )


def _refilled(value: Any, items: dict[Any, Any]) -> Any:
    """Return ``value`` with other items, or itself where they are the same; attributes, as of a state dict, stay."""
    if _unchanged(items, value) and _unchanged(items.values(), value.values()):
        return value
    other = copy.copy(value)
    other.clear()
    other.update(items)
    return other


def _unchanged(parts: Any, before: Any) -> bool:
    return all(left is right for left, right in zip(parts, before, strict=True))


def _spelled(value: Any, name: str) -> dict[str, Any]:
    spelling = value.dtype.str
    if value.dtype.hasobject or np.dtype(spelling) != value.dtype:
        raise CheckpointError(_refusal(value, name, f"of dtype {value.dtype}"))
    return {_NUMPY: (spelling, value.shape if isinstance(value, np.ndarray) else None, value.tobytes().hex())}


def _numpy(spelling: str, shape: tuple[int, ...] | None, data: str) -> Any:
    array = np.frombuffer(bytes.fromhex(data), np.dtype(spelling))
    return array[0] if shape is None else array.reshape(shape).copy()


def _ensure_reads_back(value: Any, name: str) -> None:
    """Refuse what torch cannot write and read; what it can, a program may have told it."""
    buffer = io.BytesIO()
    try:
        torch.save(value, buffer)
        buffer.seek(0)
        torch.load(buffer, weights_only=True)
    except Exception as error:  # a class of anybody's may raise anything here
        raise CheckpointError(_refusal(value, name, "which could not be read back")) from error


def _refusal(value: Any, name: str, why: str) -> str:
    kind = f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
    return (
        f"{name} is a {kind}, {why}; a checkpoint holds numbers, strings and tensors, and lists and dicts of them: "
        "turn it into those, or allow its class by torch.serialization.add_safe_globals"
    )


def _below(name: str, key: Any) -> str:
    return f"{name}.{key}" if name else str(key)
