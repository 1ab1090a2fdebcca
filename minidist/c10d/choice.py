"""Which communicator a process group runs on, and how it is made.

A *spec* names it: ``shm``, ``ring/mpi``, ``halving_doubling/gloo``, ``my_package.MyComm``, ``my_package.MyComm/shm``.
Names are those of the files in conf/comm, which are read as they are; what follows the slash is the transport, or what
joins the hosts beneath ``hierarchical``.
"""

from __future__ import annotations

import functools
import inspect
import pkgutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
import yaml

from minidist.communicator import Communicator
from minidist.contract.place import Place, from_everyone
from minidist.errors import BackendUnavailableError, ConfigError

Factory = Callable[[Place], Communicator]
Choice = str | Communicator | Factory
"""What a user may give: a spec, a communicator of this group, or what makes one of a `Place`."""
BENEATH = {"transport", "intra", "inter"}
"""Settings that are communicators themselves."""
_ROOT = Path(__file__).parent.parent.parent


def made(choice: Choice | None, place: Place, timeout_s: float) -> Communicator:
    """Return the communicator of a group.

    Args:
        choice: None for the fastest: shared memory on one host, across hosts two levels, and Gloo where neither can be.
        place: this rank's in the group.
        timeout_s: the communicator's.

    Raises:
        ConfigError: there is no such communicator, or it cannot be made of a place.
        CommError: what the communicator raises.
    """
    if choice is None:
        choice = _fastest(place, timeout_s)
    if isinstance(choice, str):
        return _build(_section(choice), place, timeout_s)
    comm = choice if isinstance(choice, Communicator) else choice(place)
    if not isinstance(comm, Communicator):
        raise ConfigError(f"{choice!r} has to make a Communicator of a Place, but made {comm!r}")
    if (comm.rank, comm.world_size) != (place.rank, place.world_size):
        raise ConfigError(
            f"rank {place.rank} of {place.world_size} of the process group was given {comm!r}; give one communicator "
            "of the same ranks to one group, or a spec such as 'ring/shm' for groups of any ranks"
        )
    return comm


def _fastest(place: Place, timeout_s: float) -> str:
    """Return what is made of shared memory where all ranks can use it, and some of them share a host."""
    try:
        pkgutil.resolve_name(_section("shm")["_target_"]).check_machine()
    except BackendUnavailableError:
        mine = 0
    else:
        mine = place.num_here
    store = dist.PrefixStore("shm", place.store)
    sharing = [int(num) for num in from_everyone(store, place.rank, place.world_size, str(mine), timeout_s)]
    if 0 in sharing or max(sharing) == 1 < place.world_size:
        return "gloo"
    return "shm" if place.one_host else "hierarchical"


def _section(spec: str) -> dict[str, Any]:
    """Return the settings that a spec names, with its transport's."""
    name, _, transport = spec.partition("/")
    if "." in name:
        section: dict[str, Any] = {"_target_": name}
    else:
        section = _read(name)
    named = {
        key: value
        for default in section.pop("defaults", [])
        if isinstance(default, dict)
        for key, value in default.items()
    }
    for key in named.keys() & BENEATH:
        section[key] = _section(transport if transport and key != "intra" else named[key])
    if transport and not named.keys() & BENEATH:
        if "." not in name:
            raise ConfigError(f"{spec}: {name} takes no transport; leave out /{transport}")
        section["transport"] = _section(transport)
    return section


def _read(name: str) -> dict[str, Any]:
    """Return a file of conf/comm, which lies beside the packages, or in a wheel inside of experiments/."""
    folder = next(path for path in (_ROOT / "conf/comm", _ROOT / "experiments/conf/comm") if path.is_dir())
    file = folder / f"{name}.yaml"
    if not file.is_file():
        names = ", ".join(sorted(path.stem for path in folder.glob("*.yaml")))
        raise ConfigError(f"there is no communicator {name}; choose one of {names}, or give the path of a class")
    section: dict[str, Any] = yaml.safe_load(file.read_text())
    return section


def _build_at(section: dict[str, Any], timeout_s: float, place: Place) -> Communicator:
    return _build(section, place, timeout_s)


def _build(section: dict[str, Any], place: Place, timeout_s: float) -> Communicator:
    settings = {name: value for name, value in section.items() if name != "_target_"}
    target = section["_target_"]
    try:
        kind = pkgutil.resolve_name(target)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"{target} cannot be imported: {error}") from error
    if "transport" in settings:
        transport = _build(settings.pop("transport"), place, timeout_s)
        comm = kind(transport, **settings)
    elif "inter" in settings:
        intra = functools.partial(_build_at, settings.pop("intra"), timeout_s)
        comm = kind(intra, _build(settings.pop("inter"), place, timeout_s), **settings)
    elif "place" in inspect.signature(kind).parameters:
        comm = kind(**settings | {"place": place, "timeout_s": timeout_s})
    elif place.world_size == 1:
        comm = kind(**settings)
    else:
        raise ConfigError(
            f"{target} cannot join ranks that torch.distributed has started: its constructor takes no place; take "
            "place: Place and hand it on, or give torch.distributed a factory"
        )
    if not isinstance(comm, Communicator):
        raise ConfigError(f"{target} is not a Communicator; derive it from Communicator")
    return comm
