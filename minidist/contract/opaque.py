"""Keeps torch.compile out of communication: what it traced once would otherwise be replayed without the other ranks."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from types import FunctionType
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def opaque(function: Callable[P, R]) -> Callable[P, R]:
    """Return ``function`` as one that compiled code calls as it is, with all that it calls; elsewhere nothing changes.

    `torch.compiler.disable` does this, and loads the compiler, which takes as long as torch itself. Programs that
    never compile do not pay for it here.
    """
    disabled: Callable[P, R] | None = None

    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        nonlocal disabled
        if "torch._dynamo" not in sys.modules:
            return function(*args, **kwargs)
        if disabled is None:
            disabled = torch.compiler.disable(function)  # type: ignore[no-untyped-call]
        return disabled(*args, **kwargs)

    # A code of its own: of one that all share, compiled code would soon have more variants than it may.
    call.__code__ = call.__code__.replace(co_name=function.__name__)
    return functools.wraps(function)(call)


def opaque_methods(kind: type) -> None:
    """Make the public methods that the class itself defines opaque."""
    for name, member in list(vars(kind).items()):
        if isinstance(member, FunctionType) and not name.startswith("_"):
            setattr(kind, name, opaque(member))
