"""A job on its way to its ranks: the configuration as it was composed, and the script that composed it.

The one who starts ranks has composed already, with everything that was said about it on the command line. So ranks do
not compose again: they run the same script with the same arguments, and `experiments.running.run.main` gives it the
configuration out of a file, whose interpolations each rank resolves for itself. No path and no value is
spelled as an override on the way.
"""

from __future__ import annotations

import copy
import json
import os
import pickle
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import configure_log, setup_globals
from omegaconf import DictConfig, open_dict, read_write

from backends.processes.rendezvous import run_id
from experiments.running.choices import composed
from minidist import config
from minidist.errors import ConfigError
from minidist.launch import detect

# A launcher of Hydra's may run the job in another process, whose own command line says nothing.
COMMAND = "MINIDIST_COMMAND"
JOB = "MINIDIST_JOB"


def note_command() -> None:
    """Keep how this script was started for `command`; before a job changes the working directory."""
    os.environ[COMMAND] = json.dumps([*_script(), *sys.argv[1:]])


def command() -> list[str]:
    """Return the script and the arguments of this job, to be run by Python.

    Raises:
        ConfigError: `experiments.running.run.main` did not run the script, and would not on ranks.
    """
    if COMMAND not in os.environ:
        raise ConfigError(
            "launch.nproc needs a script that ends with main(...) of experiments.running.run, as mnist.py"
        )
    words: list[str] = json.loads(os.environ[COMMAND])
    return words


@contextmanager
def handed_over() -> Iterator[dict[str, str]]:
    """Keep the job in a file for as long as this is entered; yields the variables with which ranks find it."""
    with tempfile.NamedTemporaryFile(prefix="minidist-job-", suffix=".pickle") as file:
        pickle.dump((composed(), run_id()), file)
        file.flush()
        yield {JOB: file.name} | _import_path()


def taken_over() -> DictConfig | None:
    """Return the configuration of the job that this process is a rank of, and set Hydra up for it; None without one."""
    path = os.environ.pop(JOB, None)  # what this rank may start is no rank of the job
    if path is None:
        return None
    setup_globals()
    whole, name = pickle.loads(Path(path).read_bytes())
    config.register_resolvers(run_id=lambda: str(name), rank=lambda: detect().rank)
    HydraConfig.instance().set_config(whole)
    configure_log(whole.hydra.job_logging, whole.hydra.verbose)
    cfg: DictConfig = copy.deepcopy(whole)
    with read_write(cfg), open_dict(cfg):  # as hydra.main hands it to a job: without Hydra's own section
        del cfg["hydra"]
    return cfg


def _script() -> list[str]:
    """Return what follows ``python`` to run this script again: its path, or -m and its module."""
    spec = sys.modules["__main__"].__spec__
    path = os.path.abspath(sys.argv[0])
    if spec is None or spec.origin is None or os.path.realpath(spec.origin) != os.path.realpath(path):
        return [path]
    return ["-m", spec.name.removesuffix(".__main__")]


def _import_path() -> dict[str, str]:
    """A module is looked for where Python was started, which a job may have left."""
    paths = [sys.path[0], os.environ.get("PYTHONPATH", "")] if command()[0] == "-m" else []
    return {"PYTHONPATH": os.pathsep.join(filter(None, paths))} if paths else {}
