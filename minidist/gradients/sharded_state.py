"""The state of an optimizer in shares: put together to that of whole parameters, and cut for any number of ranks."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from minidist.communicator import Communicator
from minidist.gradients.buckets import shaped
from minidist.gradients.sharding import ShardedBucket, Sharding

ONE_PER_PARAMETER = ("step", "mu_product", "eta", "mu")
"""What torch's optimizers keep once per parameter and not per element; the shape of one without dimensions hides it."""
State = dict[str, Any]


def consolidated(sharding: Sharding, own: Mapping[Tensor, State], comm: Communicator) -> dict[Tensor, State]:
    """Return the state of each whole parameter on every rank. Collective.

    Args:
        sharding: the parameters.
        own: the state of this rank's pieces, by their values.
        comm: the ranks that have the other pieces.
    """
    outlines: dict[int, State] = {}
    for theirs in reversed(comm.all_gather_object(_outlines(sharding, own))):  # the first rank's counts
        outlines |= theirs
    states: dict[Tensor, State] = {}
    index = 0
    for bucket in sharding.buckets:
        num_slots = len(bucket.pieces)
        slots = {slot: outlines[index + slot] for slot in range(num_slots) if index + slot in outlines}
        index += num_slots
        states |= {bucket.bucket.parameters[slot]: dict(outline) for slot, outline in slots.items()}
        _fill(bucket, slots, states, own, comm)
    return states


def cut(state: State, parameter: nn.Parameter, part: slice) -> State:
    """Return the state of some elements of a parameter, in the order of its memory."""
    return {name: _cut(name, value, parameter, part) for name, value in state.items()}


def _cut(name: str, value: Any, parameter: nn.Parameter, part: slice) -> Any:
    if not _is_per_element(name, value, parameter.shape):
        return copy.deepcopy(value)  # a step is counted in place
    flat = value.new_empty(parameter.numel())
    shaped(flat, parameter).copy_(value)
    return flat[part].clone()


def _is_per_element(name: str, value: Any, shape: torch.Size) -> bool:
    return isinstance(value, Tensor) and name not in ONE_PER_PARAMETER and value.shape == shape


def _outlines(sharding: Sharding, own: Mapping[Tensor, State]) -> dict[int, State]:
    """Return the state of this rank's pieces by number of the parameter; for values per element only their dtype."""
    pieces = [piece for bucket in sharding.buckets for piece in bucket.pieces]
    return {
        number: {
            name: value.dtype if _is_per_element(name, value, piece.values.shape) else value
            for name, value in own[piece.values].items()
        }
        for number, piece in enumerate(pieces)
        if piece is not None and piece.values in own
    }


def _fill(
    sharded: ShardedBucket,
    outlines: Mapping[int, State],
    states: Mapping[Tensor, State],
    own: Mapping[Tensor, State],
    comm: Communicator,
) -> None:
    """Gather the values per element of a bucket, one name after the other, into ``states``."""
    entries = [(name, dtype) for outline in outlines.values() for name, dtype in outline.items()]
    for name, dtype in dict.fromkeys(entry for entry in entries if isinstance(entry[1], torch.dtype)):
        whole = comm.empty(sharded.values.numel(), dtype, sharded.values.device).zero_()
        numel = sharded.share.numel()
        share = whole[comm.rank * numel : (comm.rank + 1) * numel]
        places = sharded.bucket.places(whole)
        having = [slot for slot, outline in outlines.items() if outline.get(name) is dtype]
        for slot in having:
            if (piece := sharded.pieces[slot]) is not None:
                offset = piece.values.storage_offset() - sharded.share.storage_offset()
                share[offset : offset + piece.values.numel()] = own[piece.values][name]
        comm.all_gather(whole, share)
        for slot in having:
            states[sharded.bucket.parameters[slot]][name] = places[slot].clone()
