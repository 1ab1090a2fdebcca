"""Errors that a user can do something about, as one line on stderr; all others keep their traceback.

HYDRA_FULL_ERROR=1 shows the traceback of these, too.
"""

from __future__ import annotations

import logging
import os
import shlex
import sys
from itertools import pairwise
from typing import NoReturn

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, InterpolationKeyError, OmegaConfBaseException

from minidist.errors import BackendUnavailableError, CheckpointError, CommError, ConfigError
from minidist.launch import detect

log = logging.getLogger(__name__)
FULL_ERROR = "HYDRA_FULL_ERROR"
TRACEBACKS = os.environ.get(FULL_ERROR, "0") not in ("", "0")
"""Whether the user asked for tracebacks; read once, because `experiments.running.run.main` then sets it for Hydra."""
REFUSALS = (ConfigError, CheckpointError, CommError, HydraException, OmegaConfBaseException, FloatingPointError)
# These are the same on every rank of a machine, so that one of them is enough to say it.
_SHARED = (ConfigError, CheckpointError, BackendUnavailableError, HydraException, OmegaConfBaseException)
_MISTAKES = (ConfigError, HydraException, OmegaConfBaseException)
_SLURM = "hydra/launcher/submitit_"


def refuse(error: Exception) -> NoReturn:
    """Say what is wrong and exit: with 2 if the command is wrong, with 1 if the run went wrong."""
    if log.handlers:  # once conf/hydra/job_logging has given it this rank's file, and only that
        log.error("%s", error, exc_info=error)
    if detect().local_rank == 0 or not isinstance(error, _SHARED):
        print(f"error: {explain(error)}", file=sys.stderr, flush=True)
    raise SystemExit(2 if isinstance(error, _MISTAKES) else 1)


def explain(error: Exception) -> str:
    """Return one line that names the setting at fault and what can stand there."""
    node = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    if isinstance(node, ConfigKeyError | ConfigAttributeError):
        return _unknown_key(node)
    if isinstance(node, InterpolationKeyError):
        group = str(node).split("'")[1]
        return (
            f"{node.full_key} is what is chosen for {group}, and nothing is; write {group}=<name>, one of conf/{group}"
        )
    if isinstance(node, OmegaConfBaseException):
        return f"{node.full_key}: {_first_line(node)}"
    if isinstance(error, OverrideParseException):
        return _unreadable(error.override)
    if isinstance(error, MissingConfigException) and str(error.missing_cfg_file).startswith(_SLURM):
        what = f"{error.missing_cfg_file} comes with Hydra's launcher for Slurm, which is not installed"
        return f"{what}; pip install '.[slurm]'"
    if isinstance(error, MissingConfigException) and error.options:
        group, _, choice = str(error.missing_cfg_file).rpartition("/")
        return f"{group}={choice} is not there to choose; {group} is one of {', '.join(error.options)}"
    if _first_line(error).startswith("Ambiguous value for argument"):  # a,b without -m
        return f"{_first_line(error)}; add -m to run each of them, or write a list: [a,b]"
    return str(error) if isinstance(error, CommError | ConfigError) else _first_line(error)


def _unknown_key(error: ConfigKeyError | ConfigAttributeError) -> str:
    section = str(error.full_key).rpartition(".")[0] or "the configuration"
    choices = ", ".join(str(key) for key in error.parent_node or () if key != "hydra" and not str(key).startswith("_"))
    return f"{error.full_key} is not a setting; {section} has {choices}"


def _unreadable(override: str) -> str:
    """Return what to write in the place of what Hydra's grammar does not take, tried on that grammar itself."""
    name, _, value = (part.strip() for part in override.partition("=" if "=" in override else " "))
    if not value and (value := _word_after(override)):
        override = f"{override} {value}"
    if not value:
        return f"{override} has no value; write {name}=<value>"
    if _is_readable(plain := f"{name}={value}"):
        return f"{override}: a setting and its value are one word, joined by =; write {shlex.quote(plain)}"
    escaped = value.replace('"', r"\"")
    if _is_readable(quoted := f'{name}="{escaped}"'):
        return f"{override}: text with such characters wants quotes inside of the shell's; write {shlex.quote(quoted)}"
    return f"{override} is not a setting; write one as name=value"


def _word_after(word: str) -> str:
    """Return what follows a word on the command line, unless that is a setting or an option of its own."""
    for before, after in pairwise(sys.argv):
        if before == word and "=" not in after and not after.startswith("-"):
            return after
    return ""


def _is_readable(override: str) -> bool:
    try:
        OverridesParser.create().parse_override(override)
    except HydraException:
        return False
    return True


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
