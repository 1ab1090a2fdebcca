"""Who may import whom: the dependencies point one way, in all folders, lazy and type-only imports included."""

from __future__ import annotations

import ast
import graphlib
import pkgutil
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("minidist", "backends", "experiments")
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for package in PACKAGES
    for path in sorted((ROOT / package).rglob("*.py"))
}
MAX_LINES = 400
HOOKS = {
    "_isend",
    "_irecv",
    "_collective",
    "_agree",
    "_whole",
    "_dispatch",
    "_split",
    "_gone",
    "_standings",
    "_recorders",
    "_translate",
    "_progress",
    "_root",
}
PUBLIC = (
    "backends.shm.ShmCommunicator",
    "backends.ring.RingCommunicator",
    "backends.torch_dist.GlooCommunicator",
    "backends.torch_dist.NcclCommunicator",
    "minidist.hooks.BFloat16",
    "minidist.network.Flat",
    "experiments.models.cnn",
    "experiments.sweep.SweepTable",
)
"""Dotted paths that stand in users' configurations, wherever the code lies."""


def imported(path: Path) -> Iterator[str]:
    """Yield every dotted name that a file imports anywhere, a name out of a package as ``package.name``."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def modules_of(path: Path) -> set[str]:
    """Return the project's modules that a file imports; not the packages that they lie in, which only list them."""
    names = {name if name in FILES else name.rpartition(".")[0] for name in imported(path)}
    return {name for name in names if name in FILES}


def roots_of(path: Path) -> set[str]:
    return {name.partition(".")[0] for name in imported(path)}


@pytest.mark.parametrize("name", [name for name in FILES if name.startswith("minidist")])
def test_minidist_knows_no_backend_and_only_config_knows_hydra(name: str) -> None:
    forbidden = {"backends", "experiments", "tests", "mpi4py"}
    assert not roots_of(FILES[name]) & (forbidden | ({"hydra", "omegaconf"} if name != "minidist.config" else set()))


@pytest.mark.parametrize("name", [name for name in FILES if name.startswith("backends")])
def test_backends_know_only_minidist(name: str) -> None:
    assert not roots_of(FILES[name]) & {"experiments", "hydra", "omegaconf", "tests"}


def test_entry_points_do_not_import_each_other() -> None:
    entries = {f"experiments.{path.stem}" for path in (ROOT / "experiments").glob("*.py")}
    users = {name: modules_of(path) & entries - {name} for name, path in FILES.items() if "experiments" in name}
    assert not {name: found for name, found in users.items() if found}


def hooks_read(path: Path) -> set[str]:
    """Return the hooks of communicators that a file reads of others than its own classes' objects."""
    tree = ast.parse(path.read_text())
    defined = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    own = ("self", "cls", "self._comm")  # the last one: a Work's communicator, which has made it
    reads = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr in HOOKS - defined]
    return {node.attr for node in reads if ast.unparse(node.value) not in own}


def test_only_inner_reads_the_hooks_of_another_communicator(tmp_path: Path) -> None:
    """What one may use of another has names of its own, in minidist/contract/inner.py."""
    assert {name for name, path in FILES.items() if hooks_read(path)} == {"minidist.contract.inner"}
    (tmp_path / "module.py").write_text("def f(comm):\n    comm._isend()\n    return comm._gone()\n")
    assert hooks_read(tmp_path / "module.py") == {"_isend", "_gone"}


def test_no_circle() -> None:
    graph = {name: modules_of(path) - {name} for name, path in FILES.items() if path.name != "__init__.py"}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


def test_every_import_is_seen(tmp_path: Path) -> None:
    """Also where it is lazy, or for types alone."""
    for_types = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from minidist.ddp import Wrapper\n"
    lazy = "def f():\n    from minidist import engine\n    import backends.ring\n"
    (tmp_path / "module.py").write_text(for_types + lazy)
    assert modules_of(tmp_path / "module.py") == {"minidist.ddp", "minidist.engine", "backends.ring"}


@pytest.mark.parametrize("name", FILES)
def test_no_file_is_long(name: str) -> None:
    assert len(FILES[name].read_text().splitlines()) <= MAX_LINES


@pytest.mark.parametrize("path", PUBLIC)
def test_dotted_paths_of_users_stay_valid(path: str) -> None:
    assert callable(pkgutil.resolve_name(path))
