"""The files of ranks, whoever wrote them: minidist's, or torch's flight recorder."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from minidist.contract.records import FORMAT
from minidist.contract.standing import Call, Standing
from minidist.doctor import flight_recorder
from minidist.doctor.group import Told
from minidist.errors import ConfigError

PATTERN = "records-rank*.json"


def files_in(paths: Iterable[str]) -> list[Path]:
    """Return the files, and those that minidist has written into the folders, among ``paths``."""
    found: list[Path] = []
    for path in map(Path, paths):
        found += sorted(path.glob(PATTERN)) if path.is_dir() else [path]
    return found


def read(path: Path) -> list[Told]:
    """Return what a file tells, of each communicator of its rank.

    Raises:
        ConfigError: it cannot be read, or is neither minidist's nor torch's; the message names it.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    try:
        if data.startswith(b"{"):
            return _told(json.loads(data))
        return flight_recorder.told(data, path)
    except (ArithmeticError, AttributeError, LookupError, MemoryError, RecursionError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{path}: is neither a record of minidist ({PATTERN}) nor a dump of torch's flight recorder: {error}"
        ) from error


def _told(whole: dict[str, Any]) -> list[Told]:
    if whole.get("format") != FORMAT:
        raise ValueError(f"its format is {whole.get('format')!r}, not {FORMAT!r}")
    return [_of_communicator(section) for section in whole["communicators"]]


def _to_world(call: Call, ranks: tuple[int, ...]) -> Call:
    if call.peer is None or call.peer < 0:
        return call
    peer = ranks[call.peer]
    return replace(call, peer=peer, what=call.what.replace(f" rank {call.peer} with tag", f" rank {peer} with tag"))


def _of_communicator(section: dict[str, Any]) -> Told:
    """Return it with the ranks called as the world calls them."""
    ranks = tuple(section["ranks"])
    standing, *heard = (
        replace(one, rank=ranks[one.rank], calls=tuple(_to_world(call, ranks) for call in one.calls))
        for one in map(Standing.of_json, (section["standing"], *section["heard"]))
    )
    return Told(section["name"], ranks, standing, tuple(heard))
