"""The path of a gradient: that the program which follows it misses nothing, and that the path is short."""

from __future__ import annotations

import ast
import importlib
import queue
import re
import shutil
import subprocess
import sys
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import pytest

from experiments.measuring.sources import lines_of_code
from experiments.measuring.trail import Stop, Trail
from tests.test_commands import ROOT, TIMEOUT_S, environment, only_run, run

README = (ROOT / "README.md").read_text().split("## The path of one gradient")[1].split("\n## ")[0]
MAX_LINES = 400
TOTAL = re.compile(r"(\d+) functions, (\d+) lines of code in (\d+) files")
ROW = re.compile(r"(?P<file>\S+):(?P<line>\d+) +(?P<name>\S+) +(?P<count>\d+)  (?P<purpose>.*)")
LANDMARKS = (
    "Listener.__call__",
    "DistributedDataParallel._on_gradient",
    "Bucket.put",
    "Communicator.all_reduce",
    "Agreement.compare",
    "GlooCommunicator._isend",
)
pytestmark = pytest.mark.timeout(300)


@dataclass(frozen=True)
class Row:
    """A line of what is printed."""

    file: str
    line: int
    depth: int
    name: str
    count: int
    purpose: str


@dataclass(frozen=True)
class Followed:
    """What one command printed and wrote."""

    directory: Path
    rows: list[Row]
    total: tuple[int, ...]

    def names(self) -> list[str]:
        return [row.name for row in self.rows]


def read(stdout: str, directory: Path) -> Followed:
    found = [ROW.fullmatch(line) for line in stdout.split("\n\n")[0].splitlines()]
    assert all(found), stdout
    matches = [match for match in found if match is not None]
    left = min(match.start("name") for match in matches)
    rows = [
        Row(m["file"], int(m["line"]), (m.start("name") - left) // 2, m["name"], int(m["count"]), m["purpose"])
        for m in matches
    ]
    total = TOTAL.search(stdout)
    assert total is not None, stdout
    return Followed(directory, rows, tuple(map(int, total.groups())))


@pytest.fixture(scope="module")
def followed(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Followed]:
    """What following a gradient gives, run once for each kind."""
    known: dict[tuple[str, ...], Followed] = {}

    def follow(*settings: str, launch: tuple[str, ...] = ("python",)) -> Followed:
        command = (*launch, str(ROOT / "experiments" / "follow.py"), *settings)
        if command not in known:
            directory = tmp_path_factory.mktemp("follow")
            done = run(directory, *command)
            assert done.returncode == 0, done.stderr
            known[command] = read(done.stdout, only_run(directory))
            assert done.stdout.startswith((only_run(directory) / "path.txt").read_text())
        return known[command]

    return follow


TORCHRUN = ("torchrun", "--nproc-per-node=2")


@pytest.mark.parametrize(
    ("settings", "launch"),
    [
        (("comm=ring",), ("python",)),
        (("comm=thread",), ("python",)),
        (("comm=shm",), ("python",)),
        pytest.param(("comm=gloo",), TORCHRUN, marks=pytest.mark.slow),
        pytest.param(("comm=mpi",), ("python",), marks=pytest.mark.slow),
        pytest.param(("comm=ring", "comm/transport=mpi"), ("mpirun", "-n", "2", "python"), marks=pytest.mark.slow),
        pytest.param(("comm=ring", "comm/transport=thread", "launch.nproc=3"), ("python",), marks=pytest.mark.slow),
        pytest.param(("comm=serial", "launch.nproc=1"), ("python",), marks=pytest.mark.slow),
    ],
    ids=lambda value: " ".join(value),
)
def test_a_gradient_is_followed_on(
    settings: tuple[str, ...], launch: tuple[str, ...], followed: Callable[..., Followed]
) -> None:
    path = followed(*settings, launch=launch)
    assert path.total == (len(path.rows), sum(row.count for row in path.rows), len({row.file for row in path.rows}))
    assert len({(row.file, row.line) for row in path.rows}) == len(path.rows)
    assert all(row.purpose for row in path.rows)
    assert [name for name in path.names() if name in LANDMARKS[:4]] == list(LANDMARKS[:4])


def test_the_path_of_a_gradient_is_short(followed: Callable[..., Followed]) -> None:
    """Over a ring; all that is entered counts."""
    num_functions, num_lines, num_files = followed("comm=ring").total
    figures = f"a gradient enters {num_functions} functions with {num_lines} lines of code in {num_files} files"
    assert num_lines < MAX_LINES, figures


def test_the_path_passes_its_landmarks_in_order(followed: Callable[..., Followed]) -> None:
    passed = [row for row in followed("comm=ring").rows if row.name in LANDMARKS]
    assert [row.name for row in passed] == list(LANDMARKS)
    names = followed("comm=ring").names()
    assert names.index("Executor._run") < names.index("GlooCommunicator._isend") < names.index("store")
    assert all(caller.depth < called.depth for caller, called in pairwise(passed))


def test_the_readme_says_what_is_printed(followed: Callable[..., Followed]) -> None:
    """The figures, and functions of the path in its order, each under its file."""
    path = followed("comm=ring")
    printed = [(row.file, row.name) for row in path.rows]
    shown = re.findall(r"^((?:minidist|backends)/\S+\.py) +(\S+)", README, re.MULTILINE)
    assert TOTAL.findall(README) == [tuple(map(str, path.total))], f"the true figures are {path.total}"
    assert len(shown) > 10
    assert [place for place in printed if place in shown] == shown


class Text(HTMLParser):
    """The text of each line of code on a page, by the section that it is in; and what the page would load."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: dict[str, dict[int, str]] = defaultdict(dict)
        self.loads: list[str] = []
        self._section, self._line = "", 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag == "section":
            self._section = values["id"] or ""
        if "data-line" in values:
            self._line = int(values["data-line"] or 0)
            self.lines[self._section][self._line] = ""
        self.loads += [str(values[key]) for key in ("src", "href") if key in values]

    def handle_endtag(self, tag: str) -> None:
        if tag == "pre":
            self._line = 0

    def handle_data(self, data: str) -> None:
        if self._line:
            self.lines[self._section][self._line] += data


def test_the_page_shows_every_line_of_every_function(followed: Callable[..., Followed]) -> None:
    path, page = followed("comm=ring"), Text()
    page.feed((path.directory / "path.html").read_text())
    assert len(page.lines) == len(path.rows)
    for number, row in enumerate(path.rows, start=1):
        source = (ROOT / row.file).read_text().splitlines()
        node = definition(row, ROOT)
        first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
        expected = {line: source[line - 1].strip() for line in range(first, (node.end_lineno or 0) + 1)}
        assert {line: text.strip() for line, text in page.lines[f"f{number}"].items()} == expected, row
    anchors = {f"#f{number}" for number in range(1, len(path.rows) + 1)}
    assert set(page.loads) == anchors | {"#list"}  # and nothing from anywhere else


# Nothing is missed -------------------------------------------------------------------------------

TOUCHED = ("Listener.__call__", "Bucket.put", "Communicator.all_reduce", "Executor._run", "store")
BEYOND = ("GlooCommunicator._isend", "GlooCommunicator._irecv")


def definition(row: Row, root: Path) -> ast.FunctionDef:
    tree = ast.parse((root / row.file).read_text())
    (node,) = (n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.lineno == row.line)
    return node


def add_calls(rows: list[Row], root: Path) -> None:
    """Let each of the functions call one more, which is new, before anything else; the last in a file first."""
    for row in sorted(rows, key=lambda row: row.line, reverse=True):
        node, path = definition(row, root), root / row.file
        first = node.body[ast.get_docstring(node) is not None]
        text, name = path.read_text().splitlines(), f"_added_to_{row.name.replace('.', '_')}"
        text.insert(first.lineno - 1, f"{' ' * first.col_offset}{name}()")
        text += ["", "", f"def {name}():", "    return sum(number for number in (1, 2))"]
        path.write_text("\n".join(text) + "\n")


def test_a_function_that_is_added_to_the_path_is_seen(followed: Callable[..., Followed], tmp_path: Path) -> None:
    """In the thread of backward and in the one that communicates; what the transport calls is beyond the path."""
    before = followed("comm=ring")
    for name in ("minidist", "backends", "experiments", "conf"):
        shutil.copytree(ROOT / name, tmp_path / "copy" / name, ignore=shutil.ignore_patterns("__pycache__"))
    add_calls([row for row in before.rows if row.name in TOUCHED + BEYOND], tmp_path / "copy")
    variables = {**environment(), "PYTHONPATH": str(tmp_path / "copy")}
    command = [sys.executable, str(tmp_path / "copy" / "experiments" / "follow.py"), "comm=ring"]
    done = subprocess.run(
        command, cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    assert done.returncode == 0, done.stderr
    after = read(done.stdout, only_run(tmp_path))
    added = [f"_added_to_{name.replace('.', '_')}" for name in TOUCHED]
    assert [name for name in after.names() if name not in before.names()] == added
    assert [name for name in after.names() if name not in added] == before.names()
    num_lines = before.total[1] + 3 * len(TOUCHED) + len(BEYOND)  # of a new function two, and its call
    assert after.total == (before.total[0] + len(TOUCHED), num_lines, before.total[2])


WALKED = '''"""A package to walk through."""

import threading


class Base:
    """A base."""

    def own(self):
        """Say what is overridden."""


class Way(Base):
    """A way."""

    def own(self):
        return self.length

    @property
    def length(self):
        return sorted([2, 1], key=called_back)

    def _isend(self):
        return beyond()

    def undocumented(self):
        return 1


class Wrapper:
    def __init__(self, inner):
        self.inner = inner

    def _isend(self):
        counted()
        return self.inner._isend()


def called_back(value):
    """Be called by C."""
    return value


def beyond(): ...


def counted(): ...


def numbers():
    yield from (square(number) for number in [1, 2])


def square(number):
    return number * number


def make():
    before()
    return lambda: [square(number) for number in [3]]


def before(): ...


def serve(jobs, done):
    while (job := jobs.get()) is not None:
        job()
        done.put(None)


def hand_over(jobs, done):
    """Hand a job over."""

    def job():
        worked()

    jobs.put(job)
    finish(done)


def worked():
    helper()


def helper(): ...


def finish(done):
    done.get()
'''


@pytest.fixture
def walked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    (tmp_path / "walked").mkdir()
    (tmp_path / "walked" / "__init__.py").write_text("")
    (tmp_path / "walked" / "code_.py").write_text(WALKED)
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("walked.code_")
    for name in ("walked.code_", "walked"):
        del sys.modules[name]


def trail_of(job: Callable[[], object]) -> list[Stop]:
    trail = Trail(importlib.import_module("walked"))
    with trail.installed():
        with trail.recording():
            job()
        job()  # not recorded
    return trail.stops()


def shape(stops: list[Stop]) -> list[tuple[int, str]]:
    return [(stop.depth, stop.function.name) for stop in stops]


def test_methods_properties_and_callbacks_are_seen(walked: ModuleType) -> None:
    stops = trail_of(walked.Way().own)
    assert shape(stops) == [(0, "Way.own"), (1, "Way.length"), (2, "called_back")]
    assert [stop.function.file for stop in stops] == ["walked/code_.py"] * 3
    source = WALKED.splitlines()
    assert [source[stop.function.line - 1].split("(")[0].split()[-1] for stop in stops] == [
        "own",
        "length",
        "called_back",
    ]
    assert [stop.function.purpose for stop in stops] == ["Say what is overridden.", "A way.", "Be called by C."]
    assert [stop.function.lines() for stop in stops] == [2, 3, 2]


def test_comprehensions_lambdas_and_generators_are_a_part_of_their_function(walked: ModuleType) -> None:
    assert shape(trail_of(lambda: list(walked.numbers()))) == [(0, "numbers"), (1, "square")]
    made = walked.make()
    assert shape(trail_of(made)) == [(0, "make"), (1, "square")]


def test_a_transport_is_the_end_and_what_wraps_it_is_not(walked: ModuleType) -> None:
    wrapper = walked.Wrapper(walked.Wrapper(walked.Way()))
    assert shape(trail_of(wrapper._isend)) == [(0, "Wrapper._isend"), (1, "counted"), (1, "Way._isend")]


def test_what_is_before_and_after_is_not_recorded(walked: ModuleType) -> None:
    trail = Trail(importlib.import_module("walked"))
    with trail.installed():
        walked.before()
        with trail.recording():
            walked.helper()
        walked.counted()
    assert shape(trail.stops()) == [(0, "helper")]


@pytest.mark.parametrize("name", ["minidist-rank0", "any"])
def test_another_thread_is_followed_from_where_its_job_was_made(name: str, walked: ModuleType) -> None:
    """Its loop was entered long before, and is on the path as well."""
    assert shape(beside(walked, name)) == [
        (0, "hand_over"),
        (1, "finish"),
        (1, "serve"),
        (2, "hand_over.job"),
        (3, "worked"),
        (4, "helper"),
    ]


def test_a_thread_of_another_rank_is_not_followed(walked: ModuleType) -> None:
    assert shape(beside(walked, "minidist-rank10")) == [(0, "hand_over"), (1, "finish")]


def beside(walked: ModuleType, name: str) -> list[Stop]:
    jobs: queue.SimpleQueue[object] = queue.SimpleQueue()
    done: queue.SimpleQueue[None] = queue.SimpleQueue()
    trail = Trail(importlib.import_module("walked"))
    with trail.installed():
        worker = threading.Thread(target=walked.serve, args=(jobs, done), name=name)
        worker.start()
        walked.hand_over(jobs, done)
        with trail.recording():
            walked.hand_over(jobs, done)
        jobs.put(None)
        worker.join()
    return trail.stops()


def test_a_line_is_counted_once(walked: ModuleType) -> None:
    functions = [stop.function for stop in beside(walked, "any")]
    counts = {function.name: function.lines(functions) for function in functions}
    assert (counts["hand_over"], counts["hand_over.job"]) == (3, 2)
    assert functions[0].lines() == 5


def test_lines_of_code_are_counted_right() -> None:
    source = '"""A\nB"""\n\n# c\nx = (1,\n     2)  # d\ndef f():\n    """E"""\n    return x\ndef g(): ...\n'
    assert lines_of_code(source) == 5
