"""What a wrapper was made for: the modules, and of their parameters what its buckets depend on.

A model can be changed after it was wrapped: a layer replaced or unfrozen, a state loaded with ``assign=True``, a
parametrization added, a dtype changed. Its buckets then hold the gradients of what is no longer trained, and the
replicas drift apart without an error. So each forward that will communicate compares; it costs one to two microseconds
per module and per parameter (81 for a ResNet-18).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from minidist.contract.checks import spell
from minidist.gradients.backward import Listener
from minidist.gradients.buckets import Bucket, layout

AGAIN = "wrap the module again on every rank, and give the optimizer the parameters that it has now"


class Structure:
    """A module as it was when its buckets were made.

    Args:
        module: the whole of it.
        buckets: of its parameters.
        listeners: what was registered on the parameters in the buckets, in their order.
    """

    def __init__(self, module: nn.Module, buckets: Sequence[Bucket], listeners: Sequence[Listener]) -> None:
        self._remember(module)
        trained = [parameter for bucket in buckets for parameter in bucket.parameters]
        in_buckets = set(map(id, trained))
        self._trained = [(p, _place(p), own) for p, own in zip(trained, listeners, strict=True)]
        self._frozen = [parameter for parameter in module.parameters() if id(parameter) not in in_buckets]

    def _remember(self, module: nn.Module) -> None:
        self._root = module
        self._modules = [(each, _members(each)) for each in module.modules()]
        self._names = {id(parameter): name for name, parameter in module.named_parameters()}

    def change(self, module: nn.Module, may_miss_gradients: bool) -> str | None:
        """Return what is no longer as it was, and what to do about it.

        Parameters that are all frozen for now, as those of a discriminator while its generator learns, are no change:
        nothing is communicated then. Neither are other modules around the same parameters.

        Args:
            module: what is wrapped now.
            may_miss_gradients: whether some parameters may be frozen now.
        """
        if module is not self._root or any(_members(each) != members for each, members in self._modules):
            if change := self._changed_parameters(module):
                return f"{change}; {AGAIN}"
            self._remember(module)
        if thawed := [parameter for parameter in self._frozen if parameter.requires_grad]:
            return f"{self._name(thawed[0])} was frozen when it was wrapped and is not any more; {AGAIN}"
        num_frozen = 0
        for parameter, before, own in self._trained:
            if _place(parameter) != before:
                now = f"{_spell(_place(parameter))} now and was {_spell(before)} when it was wrapped"
                return f"{self._name(parameter)} is {now}; {AGAIN}"
            if complaint := own.complaint(parameter):
                return f"{self._name(parameter)} {complaint}"
            num_frozen += not parameter.requires_grad
        if num_frozen in (0, len(self._trained)) or may_miss_gradients:
            return None
        frozen = next(parameter for parameter, *_ in self._trained if not parameter.requires_grad)
        return f"{self._name(frozen)} was frozen after it was wrapped; {AGAIN}, or use find_unused_parameters=True"

    def _name(self, parameter: nn.Parameter) -> str:
        return f"parameter {self._names[id(parameter)]}"

    def _changed_parameters(self, module: nn.Module) -> str | None:
        now = {id(parameter): name for name, parameter in module.named_parameters()}
        if new := [name for parameter, name in now.items() if parameter not in self._names]:
            return f"parameter {new[0]} was added or replaced after it was wrapped"
        if gone := [name for parameter, name in self._names.items() if parameter not in now]:
            return f"parameter {gone[0]} was removed after it was wrapped"
        return None


def _members(module: nn.Module) -> tuple[list[int], list[int]]:
    """Return which modules and parameters are directly in a module; they are kept alive by `Structure`."""
    return list(map(id, module._modules.values())), list(map(id, module._parameters.values()))


def _place(parameter: nn.Parameter) -> tuple[Any, ...]:
    """Return what its place in a bucket depends on."""
    return parameter.dtype, parameter.device, parameter.shape, layout(parameter)


def _spell(place: tuple[Any, ...]) -> str:
    dtype, device, shape, strides = place
    laid_out = "" if strides is None else f" with strides {strides}"
    return f"{spell(dtype)} {tuple(shape)} on {device}{laid_out}"
