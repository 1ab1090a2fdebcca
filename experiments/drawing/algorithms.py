"""The schedules of the group comm by name, for those who look at an algorithm without running it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import hydra
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from backends.scheduled import ScheduledCommunicator
from experiments.running.build import build
from minidist.communicator import Work
from minidist.config import CHECKED
from minidist.errors import ConfigError
from minidist.schedule import Schedule


def schedule_of(name: str, collective: str, world_size: int, overrides: Sequence[str] = ()) -> Schedule:
    """Return what ``comm=name`` runs for a collective on so many ranks; see `schedules_of`."""
    return schedules_of(name, collective, overrides)(world_size)


def schedules_of(name: str, collective: str, overrides: Sequence[str] = ()) -> Callable[[int], Schedule]:
    """Return what gives the schedule of ``comm=name`` for a number of ranks; Hydra has to be initialized.

    Args:
        name: a choice of the group comm that stands on a transport.
        collective: one of COLLECTIVES.
        overrides: of the algorithm's settings, as on the command line: ``["comm.ranks_per_host=2"]``.

    Raises:
        ConfigError: there is no such choice, or it has no schedules; what is returned raises it where the algorithm
            refuses its settings on so many ranks, or has no schedule for the collective.
    """
    choices = GlobalHydra.instance().config_loader().get_group_options("comm")
    if name not in choices:
        raise ConfigError(f"algorithm must be one of {', '.join(choices)}, got {name}")
    settings = OmegaConf.to_container(hydra.compose("config", overrides=[f"comm={name}", *overrides]).comm)
    assert isinstance(settings, dict)
    if any(isinstance(schedule, list) for schedule in settings.get("schedules", {}).values()):
        raise ConfigError(f"algorithm={name} chooses between algorithms; choose one of them")
    settings.pop(CHECKED, None)  # nothing runs on paper
    if settings.pop("transport", None) is None:
        raise ConfigError(f"algorithm={name} is a transport and has no schedules of its own; choose ring or another")

    def on(world_size: int) -> Schedule:
        schedules = build(DictConfig(settings), f"algorithm={name}", transport=_OnPaper(world_size)).schedules
        if collective not in schedules:
            raise ConfigError(f"algorithm={name} has no schedule for {collective}; it has {', '.join(schedules)}")
        found: Schedule = schedules[collective]
        return found

    return on


class _OnPaper(ScheduledCommunicator):
    """Rank 0 of any number of ranks that are not there; what they have to agree on, they agree on."""

    def __init__(self, world_size: int) -> None:
        super().__init__(0, world_size, timeout_s=1.0)

    def _all_gather(self, output: Tensor, input: Tensor, timeout_s: float) -> None:
        output.view(self.world_size, -1)[:] = input.view(-1)

    def _isend(self, tensor: Tensor, dst: int, tag: int, timeout_s: float) -> Work:
        raise AssertionError("nothing is sent on paper")

    def _irecv(self, tensor: Tensor, src: int, tag: int, timeout_s: float) -> Work:
        raise AssertionError("nothing is received on paper")
