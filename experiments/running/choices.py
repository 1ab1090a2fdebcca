"""Settings that choose: one name, or several as a list; what is wrong is said with what there is to choose."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, ListConfig, OmegaConf

from minidist.errors import ConfigError


def composed() -> DictConfig:
    """Return the whole configuration that Hydra composed, its own section included; a job gets a copy without that."""
    section = cast(DictConfig, HydraConfig.get())  # typed as the dataclass behind it
    return cast(DictConfig, section._get_parent())


def several(cfg: DictConfig, key: str, allowed: Sequence[str] | None = None) -> list[Any]:
    """Return the list that ``key`` is; one value alone is a list of one.

    Args:
        cfg: the configuration.
        key: a setting at its top.
        allowed: what can stand in the list; None for anything.

    Raises:
        ConfigError: it is empty, holds something twice, or something else than values that are allowed.
    """
    given = cfg[key]
    values = list(given) if isinstance(given, ListConfig) else [given]
    example = f"; write {key}=[{','.join(allowed[:2])}]" if allowed else ""
    if not values or any(value is None or OmegaConf.is_config(value) for value in values):
        raise ConfigError(f"{key} must be a list of one or more values, got {given}{example}")
    for value in values:
        if allowed is not None and value not in allowed:
            raise ConfigError(f"{key} must be of {', '.join(allowed)}, got {value}")
        if values.count(value) > 1:
            raise ConfigError(f"{key} has {value} twice: [{', '.join(map(str, values))}]")
    return values


def at_least(cfg: DictConfig, **least: float) -> None:
    """Refuse settings that are too small, or no numbers, alone or in a list; whole ones where the bound is an int.

    Raises:
        ConfigError: naming the setting and what it has to be.
    """
    for key, bound in least.items():
        for value in several(cfg, key) if isinstance(cfg[key], ListConfig) else [cfg[key]]:
            if isinstance(value, bool) or not isinstance(value, int if isinstance(bound, int) else int | float):
                kind = "whole number" if isinstance(bound, int) else "number"
                raise ConfigError(f"{key} must be a {kind} of at least {bound}, got {value}")
            if not value >= bound:
                raise ConfigError(f"{key} must be at least {bound}, got {value}")


def check_groups() -> None:
    """Refuse a list for a section of the configuration: Hydra would merge its choices into one that nobody meant.

    Raises:
        ConfigError: naming the group.
    """
    hydra = HydraConfig.get()
    for override in OverridesParser.create().parse_overrides(list(hydra.overrides.task)):
        group = override.key_or_group
        names = override.value()
        section = OmegaConf.select(composed(), override.package or group.replace("/", "."))
        if isinstance(names, list) and isinstance(section, DictConfig):
            given = ",".join(map(str, names))
            key = override.get_key_element()
            raise ConfigError(f"{key} must be one choice, got [{given}]; to run each of them: -m {key}={given}")
