"""What ``_target_`` names: whether it is there and can run here, what starts its ranks, and the object itself."""

from __future__ import annotations

import pkgutil
from collections.abc import Iterator
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from backends.checked import CheckedCommunicator
from minidist.communicator import Communicator
from minidist.config import CHECKED, OPEN_SECTIONS
from minidist.errors import CommError, ConfigError


def check_available(comm: DictConfig) -> None:
    """Refuse what cannot run on this machine, or under this launcher, before anything is started.

    Raises:
        ConfigError: ``comm`` does not name communicators.
        BackendUnavailableError: one of them lacks something here.
    """
    for kind, joins_all in _classes(OmegaConf.to_container(comm, resolve=True), "comm"):
        kind.check_available() if joins_all else kind.check_machine()


def launcher(comm: DictConfig) -> str:
    """Return what starts ranks of ``comm``: that of the communicators that move its bytes.

    Raises:
        ConfigError: they do not agree.
    """
    classes = _classes(OmegaConf.to_container(comm, resolve=True), "comm")
    launchers = {kind.launcher: kind.__name__ for kind, is_transport in classes if is_transport}
    if len(launchers) > 1:
        needs = " and ".join(f"{name} needs {launcher}" for launcher, name in launchers.items())
        raise ConfigError(f"comm: {needs}, but one job has one launcher; choose transports that share one")
    return next(iter(launchers))


def check_importable(cfg: DictConfig) -> None:
    """Refuse targets and schedules that do not exist, before anything is started.

    Raises:
        ConfigError: one of them cannot be imported.
    """
    for key in OPEN_SECTIONS:
        target(cfg, key)
    for key, path in _schedules(OmegaConf.to_container(cfg.comm, resolve=True), "comm"):
        _object(path, key)


def communicator(section: DictConfig, key: str = "comm") -> Communicator:
    """Return the communicator of ``section``, within a `CheckedCommunicator` if its ``checked`` says so.

    Raises:
        ConfigError, CommError: see `build`.
    """
    # Resolved first: what a section takes from elsewhere, as the network of paced, a copy of it would not find.
    settings = DictConfig(OmegaConf.to_container(section, resolve=True))
    every = int(settings.pop(CHECKED, 0))
    comm: Communicator = build(settings, key)
    return CheckedCommunicator(comm, every) if every else comm


def build(section: DictConfig, key: str, *args: Any, **kwargs: Any) -> Any:
    """Return what the ``_target_`` of ``section`` makes of its settings.

    Raises:
        ConfigError: the target does not exist, or does not take these settings.
        CommError: what a communicator raised.
    """
    try:
        return instantiate(section, *args, **kwargs)
    except InstantiationException as error:
        cause: BaseException = error  # the own error of the target, beneath one or more of Hydra's
        while isinstance(cause, InstantiationException) and cause.__cause__ is not None:
            cause = cause.__cause__
        if isinstance(cause, CommError):
            raise cause from None
        raise ConfigError(f"{key}: {' '.join(str(cause).split())}; check its _target_ and settings") from error


def target(cfg: DictConfig, key: str) -> Any:
    """Return the object that the ``_target_`` of a section names.

    Raises:
        ConfigError: it cannot be imported.
    """
    return _object(OmegaConf.select(cfg, key)._target_, f"{key}._target_")


def _classes(node: Any, key: str) -> Iterator[tuple[type[Communicator], bool]]:
    """Yield every communicator class, and whether it joins all ranks by itself: on no other, and not some of them."""
    children = node.items() if isinstance(node, dict) else ()
    nested = [(f"{key}.{name}", child) for name, child in children if name != "network"]  # the model of one
    inner = [found for name, child in nested for found in _classes(child, name)]
    yield from inner
    if isinstance(node, dict) and "_target_" in node:
        yield _class(node["_target_"], key), not inner and not node.get("_partial_", False)


def _class(target: str, key: str) -> type[Communicator]:
    found = _object(target, f"{key}._target_")
    if not isinstance(found, type) or not issubclass(found, Communicator):
        raise ConfigError(f"{key}._target_={target} is not a Communicator class; derive it from Communicator")
    return found


def _schedules(node: Any, key: str) -> Iterator[tuple[str, str]]:
    """Yield the key and the dotted path of every schedule: of one, or of each of several, for a collective."""
    for name, child in node.items() if isinstance(node, dict) else ():
        if name == "schedules" and isinstance(child, dict):
            for collective, paths in child.items():
                some = paths if isinstance(paths, list) else [paths]
                yield from ((f"{key}.schedules.{collective}", path) for path in some if path is not None)
        else:
            yield from _schedules(child, f"{key}.{name}")


def _object(path: str, key: str) -> Any:
    """Return what the setting ``key`` names by its dotted path."""
    try:
        return pkgutil.resolve_name(path)
    except (ImportError, AttributeError, ValueError) as error:
        why = f"{key}={path} cannot be imported: {error}"
        raise ConfigError(f"{why}; check the name, or set PYTHONPATH to where it lies") from error
