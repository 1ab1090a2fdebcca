"""What hooks that compress have in common: the state of each bucket, checkpoints of it, and seeded random numbers.

A compressor gets a bucket's gradients, divided by the world size, and leaves in their place something near their sum,
the same on all ranks. How near, and in how many bytes, is its own matter.
docs/your_first_compressor.md writes one.
"""

from __future__ import annotations

import hashlib
import inspect
import weakref
from abc import ABC, abstractmethod
from types import FunctionType
from typing import Any, final

import torch
from torch import Tensor

from minidist.communicator import Communicator, Work
from minidist.gradients.buckets import Bucket

State = dict[str, Any]
"""What a compressor keeps of one bucket: tensors and numbers by name."""


class Compressor(ABC):
    """A hook that sends a bucket in fewer bytes; see `minidist.gradients.hooks`.

    It has state of the model that it serves, so every wrapped model needs its own.

    Attributes:
        states: what is kept of each bucket, by its index.
        is_asked: whether somebody will ask for what was `sent`.
    """

    def __init__(self) -> None:
        self.states: dict[int, State] = {}
        self.is_asked = False
        self._served: dict[int, weakref.ref[Bucket]] = {}
        self._parts: dict[int, Any] = {}

    @final
    def __call__(self, bucket: Bucket, comm: Communicator) -> Work:
        values, state = real(bucket.flat), self.state_of(bucket)
        self._ensure_own(bucket, values, state, comm)
        return self.start(bucket, values, state, comm)

    @abstractmethod
    def start(self, bucket: Bucket, values: Tensor, state: State, comm: Communicator) -> Work:
        """Start to reduce a bucket; called once for each in every pass that communicates, in the same order everywhere.

        Args:
            bucket: whose gradients they are.
            values: the gradients of this rank over the world size, 1-d and real; their sum is wanted in their place.
            state: what is kept of this bucket from one pass to the next, at first its numel alone; for checkpoints too.
            comm: what they travel over, by whatever it can do.

        Returns:
            What is waited for at the end of the backward pass.
        """

    @abstractmethod
    def sent(self, bucket: Bucket, values: Tensor, state: State, comm: Communicator) -> Tensor:
        """Return what this rank has added to the sum, in the shape of ``values``, which hold the sum now.

        Added up over the ranks, it has to be the sum, to rounding. Called after the Work of `start` was waited for.
        """

    def state_of(self, bucket: Bucket) -> State:
        """Return what is kept of a bucket."""
        return self.states.setdefault(bucket.index, {})

    def lay_by(self, bucket: Bucket, parts: Any) -> None:
        """Keep what `sent` needs until it takes it, if anybody is going to ask."""
        if self.is_asked:
            self._parts[bucket.index] = parts

    def laid_by(self, bucket: Bucket) -> Any:
        """Return what was laid by in this pass."""
        return self._parts.pop(bucket.index)

    def describe(self) -> str:
        """Return the class and the arguments that it was made with, which a state that is loaded has to agree with."""
        return described(self)

    def _ensure_own(self, bucket: Bucket, values: Tensor, state: State, comm: Communicator) -> None:
        """Raise RuntimeError if the bucket is of another model than those before, or its state of another bucket."""
        if state.setdefault("numel", len(values)) != len(values):
            raise RuntimeError(
                f"{comm.who(type(self).__name__)}: the hook's state is of a bucket of {state['numel']} numbers, and "
                f"this one has {len(values)}; go on with the bucket_cap_mb of before"
            )
        served = self._served.setdefault(bucket.index, weakref.ref(bucket))
        if served() is not bucket:
            raise RuntimeError(
                f"{comm.who(type(self).__name__)}: the hook has served another model and has its state; give each "
                "wrapped model a hook of its own"
            )

    def state_dict(self) -> dict[str, Any]:
        """Return what is kept, for a checkpoint: the tensors themselves, this rank's own."""
        return {
            str(index): {name: value.cpu() if isinstance(value, Tensor) else value for name, value in state.items()}
            for index, state in self.states.items()
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a state of the same rank, number of ranks, model and settings."""
        self.states = {int(index): _copy(state) for index, state in state_dict.items()}

    def __deepcopy__(self, memo: dict[int, Any]) -> Compressor:
        """Return the hook of a wrapper's copy, which goes on from the same state."""
        memo[id(self)] = other = self.__class__.__new__(self.__class__)
        vars(other).update(vars(self))
        other.states = {index: _copy(state) for index, state in self.states.items()}
        other._served, other._parts = {}, {}
        return other


def described(made: object) -> str:
    """Return the class of an object and the arguments that it was made with, as far as it keeps them by their names."""
    names = inspect.signature(type(made).__init__).parameters
    settings = {name: vars(made)[name] for name in names if name in vars(made)}
    return f"{type(made).__name__}({', '.join(f'{name}={_spelled(value)}' for name, value in settings.items())})"


def real(flat: Tensor) -> Tensor:
    """Return the same memory as real numbers, 1-d: a complex one is two of them."""
    return torch.view_as_real(flat).view(-1) if flat.is_complex() else flat


def draws(device: torch.device, *what: object) -> torch.Generator:
    """Return random numbers that depend on ``what`` alone, such as a seed, a bucket and a step.

    So nothing of a generator has to be kept in checkpoints, and ranks draw alike or apart as they please.
    """
    digest = hashlib.blake2b(repr(what).encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little") >> 1)


def counted(state: State) -> int:
    """Return how often this was called for a bucket before."""
    state["step"] = step = int(state.get("step", -1)) + 1
    return step


def kept_on(state: State, name: str, device: torch.device) -> Tensor | None:
    """Return a tensor of the state on ``device``, where a checkpoint may have brought it from another one."""
    tensor: Tensor | None = state.get(name)
    if tensor is not None and tensor.device != device:
        state[name] = tensor = tensor.to(device)
    return tensor


def _copy(state: State) -> State:
    return {name: value.clone() if isinstance(value, Tensor) else value for name, value in state.items()}


def _spelled(value: object) -> str:
    """Return a setting in words that are the same in every process."""
    if value is None or isinstance(value, bool | int | float | str):
        return str(value)
    if isinstance(value, FunctionType):
        return value.__qualname__
    return value.describe() if hasattr(value, "describe") else type(value).__name__
