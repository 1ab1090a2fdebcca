"""The dumps of torch's flight recorder: what torch.distributed has recorded of NCCL, Gloo and others.

A dump is a pickle of a dict of lists, texts and numbers, one for each rank, in a file whose name ends in the rank's
number; see torch/distributed/flight_recorder. Pickles can run code: this reads none that names anything to call.
"""

from __future__ import annotations

import io
import json
import math
import pickle
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from minidist.contract.call_site import CallSite, is_library
from minidist.contract.standing import DONE, QUEUED, WAITING, Call, Standing
from minidist.doctor.group import Told

BY_OUTPUT = ("scatter", "recv")
"""What has its size on all ranks in its output: the input is the root's, or there is none."""
PEER = re.compile(r"(?:->|<-)(\d+)")
Entry = Mapping[str, Any]


class _PlainUnpickler(pickle.Unpickler):
    """Reads what is made of Python's own kinds alone."""

    def find_class(self, module: str, name: str) -> NoReturn:
        raise ValueError(f"it is a pickle that calls {module}.{name}, and so no dump")


def told(data: bytes, path: Path) -> list[Told]:
    """Return what a dump tells, of each process group.

    Raises:
        ValueError: it is no dump, or its name does not end in a rank.
    """
    try:
        dump = _PlainUnpickler(io.BytesIO(data)).load()
    except (pickle.UnpicklingError, EOFError) as error:
        raise ValueError(f"no pickle: {error}") from error
    if not isinstance(dump, dict) or "entries" not in dump or "pg_config" not in dump:
        raise ValueError("no entries in it")
    number = re.search(r"(\d+)$", path.stem)
    if number is None:
        raise ValueError("its name does not end in the number of its rank, as in trace_rank0")
    rank, dumped_ns = int(number.group()), path.stat().st_mtime_ns
    groups: dict[str, list[Entry]] = {}
    for entry in dump["entries"]:
        groups.setdefault(entry["process_group"][0], []).append(entry)
    return [
        Told(f"group {name}", _ranks(dump["pg_config"], name), _standing(rank, entries, dumped_ns))
        for name, entries in groups.items()
    ]


def _ranks(config: Mapping[str, Any], name: str) -> tuple[int, ...]:
    """Return the ranks of a group; none where torch has not written them, as of Gloo's default group."""
    return tuple(json.loads(config[name]["ranks"])) if name in config else ()


def _standing(rank: int, entries: Sequence[Entry], dumped_ns: int) -> Standing:
    unfinished = [entry["record_id"] for entry in entries if not _is_done(entry)]
    first = min(unfinished, default=None)  # a group's run in their order, so all after it are queued
    calls = tuple(_call(entry, entry["record_id"] == first, dumped_ns) for entry in entries)
    return Standing(rank, max((call.number or 0 for call in calls), default=0), calls)


def _is_done(entry: Entry) -> bool:
    """Whether it is over; a backend that does not time its work only retires it."""
    return bool(entry["state"] == "completed" or entry["retired"])


def _call(entry: Entry, is_first: bool, dumped_ns: int) -> Call:
    state = DONE if _is_done(entry) else WAITING if is_first else QUEUED
    name = str(entry["profiling_name"]).partition(":")[2]
    peer = PEER.search(name)
    number = None if entry["is_p2p"] or state == QUEUED else int(entry["collective_seq_id"])
    return Call(
        number,
        _what(entry, name),
        _where(entry.get("frames", ())),
        state,
        round((dumped_ns - entry["time_created_ns"]) / 1e9, 6),
        peer=int(peer.group(1)) if entry["is_p2p"] and peer else None,
    )


def _what(entry: Entry, name: str) -> str:
    way = "output" if name.startswith(BY_OUTPUT) else "input"
    sizes, dtypes = entry[f"{way}_sizes"], entry[f"{way}_dtypes"]
    numel = sum(math.prod(size) for size in sizes)
    return f"{name} of {numel} {dtypes[0].lower()}" if dtypes else name


def _where(frames: Sequence[Mapping[str, Any]]) -> str:
    """Return the innermost line of the user's; frames come with the innermost one first."""
    for frame in frames:
        if not is_library[frame["filename"]] and "/torch/" not in frame["filename"]:
            return str(CallSite(frame["filename"], frame["line"], frame["name"], 0))
    return ""
