"""Checkpoints that a kill at any moment leaves either whole or absent.

A file is written under a temporary name, forced to disk, and renamed; the older ones go only after that.
Rank 0 alone touches the directory: it gathers from the other ranks and broadcasts to them, so no file
system has to be shared. What went wrong there is raised on every rank.
"""

from __future__ import annotations

import io
import os
import re
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from minidist.communicator import Communicator
from minidist.contract.call_site import call_site
from minidist.errors import CheckpointError
from minidist.launch import counted_ranks
from minidist.training.storable import original, storable

_KEYS = {"step", "signature", "shared", "locals", "world_size"}
Signature = dict[str, str]
"""What a checkpoint has to have in common with the training that it goes on in: name of a part, kind of it."""


@dataclass(frozen=True)
class State:
    """What a checkpoint holds, as one rank sees it: what `minidist.training.storable` takes.

    Attributes:
        step: optimizer steps so far; names the file.
        signature: has to be that of the training that resumes.
        shared: what is the same on all ranks; rank 0's is kept.
        local: what is this rank's own; empty where there were fewer ranks, and this was none of them.
        ranks_before: how many ranks there were, if that was another number, otherwise 0.
        first: what was rank 0's own, if there was another number of ranks.
    """

    step: int
    signature: Signature
    shared: dict[str, Any]
    local: dict[str, Any]
    ranks_before: int = 0
    first: dict[str, Any] = field(default_factory=dict)


class Checkpoints:
    """The checkpoints of one run, ``step_00000120.pt`` and so on in ``directory``.

    Every rank constructs it and calls its methods together with the others.

    Args:
        directory: where the files lie, on rank 0's machine; made if need be.
        comm: the ranks that train.
        every_steps: save after each so many optimizer steps, besides the end of each epoch; 0: then only.
        keep: how many files stay.
        resume: go on from the newest one, if there is one; without it, those of an earlier run are refused.
        elastic: whether to go on from one of another number of ranks.

    Raises:
        ValueError: ``every_steps`` below 0, or ``keep`` below 1.
        CheckpointError: the directory cannot be written; on every rank.
    """

    def __init__(
        self,
        directory: Path,
        comm: Communicator,
        every_steps: int = 0,
        keep: int = 2,
        resume: bool = False,
        elastic: bool = False,
    ) -> None:
        if every_steps < 0 or keep < 1:
            raise ValueError(
                f"Checkpoints: every_steps must be at least 0 and keep at least 1, got {every_steps} and {keep}"
            )
        self.directory = Path(directory)
        self.every_steps = every_steps
        self.keep = keep
        self.resume = resume
        self.elastic = elastic
        self._comm = comm
        self._on_rank_0("Checkpoints", self._prepare)

    @property
    def is_writer(self) -> bool:
        """Whether this rank is the one that touches the directory."""
        return self._comm.rank == 0

    def due(self, step: int) -> bool:
        """Return whether ``every_steps`` asks for a checkpoint after ``step``."""
        return self.every_steps > 0 and step % self.every_steps == 0

    def save(self, state: State) -> Path:
        """Write ``state``, then delete the oldest files; returns the new one's path once it is safe on disk.

        Raises:
            CheckpointError: it could not be written, or holds what could not be read back; on every rank. The
                older checkpoints are untouched.
        """
        path = self.directory / f"step_{state.step:08d}.pt"
        content = self._content(state, "Checkpoints.save")
        self._on_rank_0("Checkpoints.save", lambda: self._write(path, content))
        return path

    def ensure_storable(self, state: State) -> None:
        """Raise what `save` would raise of this state before it writes: now, instead of after an hour of training."""
        self._storable(state, "Checkpoints")

    def load(self, signature: Signature) -> State | None:
        """Return the newest state that is whole, if it has this ``signature``; None where there is none.

        Files that were cut or damaged are passed over with a warning that names them.

        Raises:
            CheckpointError: it is of another model, optimizer or world size, or cannot be read, or there are
                files and all of them are damaged; on every rank.
        """
        data = self._on_rank_0("Checkpoints.load", self._read_newest)
        if data is None:
            return None
        content = _load(data)
        self._ensure_fits(content, signature)
        before, rank = content["world_size"], self._comm.rank
        local = original(content["locals"][rank]) if rank < before else {}
        state = State(content["step"], signature, original(content["shared"]), local)
        if before == self._comm.world_size:
            return state
        return replace(state, ranks_before=before, first=original(content["locals"][0]))

    def refuse_existing(self) -> None:
        """Raise CheckpointError, on every rank, if the directory holds checkpoints of an earlier run."""
        self._on_rank_0("Checkpoints", self._refuse_existing)

    def _content(self, state: State, operation: str) -> dict[str, Any]:
        """Return what goes into the file, where every rank's part of it can be read back."""
        shared, local = self._storable(state, operation)
        return {
            "step": state.step,
            "signature": state.signature,
            "shared": shared,
            "locals": self._comm.all_gather_object(local),
            "world_size": self._comm.world_size,
        }

    def _storable(self, state: State, operation: str) -> tuple[Any, Any]:
        """Return what all ranks share, on rank 0, and this rank's own, both as they can be stored."""
        shared = None
        local = None
        problem = ""
        try:
            shared = storable(state.shared) if self._comm.rank == 0 else None
            local = storable(state.local)
        except CheckpointError as error:
            problem = str(error)
        for rank, found in enumerate(self._comm.all_gather_object(problem)):
            if found:
                raise CheckpointError(f"{self._comm.who(operation)}: on rank {rank}, {found}")
        return shared, local

    def _ensure_fits(self, content: dict[str, Any], given: Signature) -> None:
        who = f"{self._comm.who('Checkpoints.load')}: the checkpoint of step {content['step']} in {self.directory}"
        if content["world_size"] != self._comm.world_size and not self.elastic:
            raise CheckpointError(
                f"{who} is of {counted_ranks(content['world_size'])}, this run has {self._comm.world_size}; "
                "start as many ranks as before, go on with elastic=true, or choose another directory"
            )
        saved = content["signature"]
        for name in [*saved, *given]:
            if saved.get(name) != given.get(name):
                raise CheckpointError(
                    f"{who} is of another training: {name} is {saved.get(name, 'missing')} there and "
                    f"{given.get(name, 'missing')} here; give what was trained, or another directory"
                )

    # On rank 0 --------------------------------------------------------------------------------

    def _on_rank_0(self, operation: str, action: Callable[[], Any]) -> Any:
        """Return what ``action`` returned there, or raise what went wrong there, on every rank."""
        result = None
        problem = ""
        if self._comm.rank == 0:
            # An error that rank 0 alone raised would leave the others waiting in the next collective.
            try:
                result = action()
            except (OSError, CheckpointError) as error:
                problem = str(error)
        result, problem = self._comm.broadcast_object((result, problem), src=0)
        if problem:
            raise CheckpointError(f"{self._comm.who(operation)}: {problem} (called at {call_site()})")
        return result

    def _prepare(self) -> None:
        probe = self.directory / "probe.tmp"
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            probe.touch()
        except OSError as error:
            raise CheckpointError(
                f"the directory {self.directory} cannot be written ({error.strerror}); choose another one"
            ) from error
        # A kill in the middle of a write leaves one, which nobody would rename any more.
        for left_over in self.directory.glob("*.tmp"):
            left_over.unlink()

    def _paths(self) -> list[Path]:
        """Return the files, oldest first."""
        return sorted(path for path in self.directory.iterdir() if re.fullmatch(r"step_\d{8,}\.pt", path.name))

    def _write(self, path: Path, content: dict[str, Any]) -> None:
        # In memory first: torch wraps the error of a full disk in one of its own, without a number that says so.
        buffer = io.BytesIO()
        torch.save(content, buffer)
        temporary = path.with_suffix(".tmp")
        try:
            with open(temporary, "wb") as file:
                file.write(buffer.getbuffer())
                file.flush()
                # Before the rename, or a power cut could leave the new name with nothing behind it.
                os.fsync(file.fileno())
            os.replace(temporary, path)
            # And before old files go, or it could leave neither the new name nor the old ones.
            _sync_directory(self.directory)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise CheckpointError(
                f"{path} cannot be written by rank 0 ({error.strerror}); free space or choose another directory; "
                "the checkpoints before it are whole"
            ) from error
        # A later one is a damaged one that was passed over: it must not push a whole one out.
        for old in [other for other in self._paths() if other <= path][: -self.keep]:
            old.unlink()

    def _read_newest(self) -> bytes | None:
        paths = self._paths()
        for place, path in reversed(list(enumerate(paths))):
            data = path.read_bytes()
            # Whole but of no use is an error: going on from an older one would throw away days of training silently.
            if _is_whole(data):
                _ensure_loads(data, path)
                return data
            if place:
                warnings.warn(f"the checkpoint {path} is damaged or cut short; using the one before it", stacklevel=2)
        if paths:
            raise CheckpointError(
                f"{paths[0]} is damaged or cut short, and there is no whole checkpoint in {self.directory} "
                f"({len(paths)} damaged); bring one back, or move them away to begin again from step 0"
            )
        return None

    def _refuse_existing(self) -> None:
        if paths := self._paths():
            raise CheckpointError(
                f"{self.directory} holds checkpoints of an earlier run ({paths[-1].name}); "
                "go on from them with resume=true, or choose another directory"
            )


def _is_whole(data: bytes) -> bool:
    """Return whether nothing of ``data`` was cut or changed, by its checksums, which loading does not look at."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            return archive.testzip() is None
    except Exception:  # bytes can be wrong in many ways, and nearly each has its own exception
        return False


def _ensure_loads(data: bytes, path: Path) -> None:
    """Say why a file that is whole cannot be used: it was written by something else, or by an older version."""
    try:
        missing = _KEYS - _load(data).keys()
    except Exception as error:  # whatever a pickle may raise
        found = re.search(r"WeightsUnpickler error: (.*?)(\. |$)", str(error), re.MULTILINE)
        reason = found[1] if found else next(iter(str(error).splitlines()), type(error).__name__)
        raise CheckpointError(
            f"{path} is whole, but cannot be loaded: {reason}; it was not written by this version of minidist. "
            "Move it away to go on from the one before it"
        ) from error
    if missing:
        raise CheckpointError(f"{path} is no checkpoint of minidist: it has no {min(missing)}; move it away")


def _load(data: bytes) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    return content


def _sync_directory(directory: Path) -> None:
    """Force a rename to disk."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
