"""Functions as their source shows them: where one stands, what it is for, and how many lines of code it has."""

from __future__ import annotations

import ast
import functools
import io
import sys
import tokenize
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

_NO_CODE = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
_Def = ast.FunctionDef | ast.AsyncFunctionDef
_Scope = _Def | ast.ClassDef


@dataclass(frozen=True)
class Function:
    """A function, with everything that is written inside of it.

    Attributes:
        path: of its file.
        name: with its classes and the functions around it, as in ``Pending.wait``.
        start: the first line, which is that of its first decorator.
        line: that of its ``def``.
        end: the last line.
    """

    path: Path
    name: str
    start: int
    line: int
    end: int

    @property
    def file(self) -> str:
        """The path from the directory that its package lies in."""
        package = self.path.parent
        while (package.parent / "__init__.py").exists():
            package = package.parent
        return self.path.relative_to(package.parent).as_posix()

    @property
    def source(self) -> str:
        """Its lines as they stand in the file."""
        return "\n".join(_text(self.path).splitlines()[self.start - 1 : self.end])

    @property
    def around(self) -> Function | None:
        """The function that it is defined in."""
        defs = [node for node in _defs(self.path) if _start(node) < self.start and _end(node) >= self.end]
        return _function(self.path, defs[-1]) if defs else None

    @property
    def purpose(self) -> str:
        """The first line of its docstring.

        Where it has none, of the method that it overrides or implements, else of its class, else of the function
        or the file that it is in.
        """
        around = self.around
        for doc in _docs(self.path, self.name):
            if doc:
                return doc.strip().splitlines()[0]
        return around.purpose if around else ""

    def lines(self, others: Collection[Function] = ()) -> int:
        """Return how many lines of code it has; those of ``others`` inside of it are theirs."""
        own = set(range(self.start, self.end + 1))
        for other in others:
            if other.path == self.path and self.start < other.start <= self.end:
                own -= set(range(other.start, other.end + 1))
        return len(own & _code_lines(_text(self.path)))


class Called(NamedTuple):
    """What Python says of code that it runs: its file, its first line, and its qualified name."""

    file: str
    line: int
    name: str


@functools.cache
def function_of(called: Called) -> Function:
    """Return the function that was called, or of which that is a part, as a lambda or a comprehension is."""
    path = Path(called.file)
    line = called.line
    around = [node for node in _defs(path) if _start(node) <= line <= _end(node)]
    if around:
        return _function(path, around[-1])
    (statement,) = (node for node in _tree(path).body if node.lineno <= line <= _end(node))
    return Function(path, called.name, statement.lineno, line, _end(statement))


def lines_of_code(source: str) -> int:
    """Return how many lines have a token of code on them: no blank lines, no comments, no docstrings."""
    return len(_code_lines(source))


@functools.cache
def _code_lines(source: str) -> frozenset[int]:
    docstrings: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | _Scope) and ast.get_docstring(node) is not None:
            docstrings.update(range(node.body[0].lineno, _end(node.body[0]) + 1))
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    code = {line for t in tokens if t.type not in _NO_CODE for line in range(t.start[0], t.end[0] + 1)}
    return frozenset(code - docstrings)


@functools.cache
def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


@functools.cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(_text(path))


@functools.cache
def _names(path: Path) -> dict[_Scope, str]:
    """Return what every class and function of a file is called, what is outside before what is inside of it."""

    def scopes(node: ast.AST, prefix: str) -> Iterator[tuple[_Scope, str]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, _Scope):
                yield child, prefix + child.name
                yield from scopes(child, f"{prefix}{child.name}.")
            else:
                yield from scopes(child, prefix)

    return dict(scopes(_tree(path), ""))


def _defs(path: Path) -> list[_Def]:
    return [node for node in _names(path) if isinstance(node, _Def)]


def _function(path: Path, node: _Def) -> Function:
    return Function(path, _names(path)[node], _start(node), node.lineno, _end(node))


def _start(node: _Def) -> int:
    return min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])


def _end(node: ast.stmt) -> int:
    return node.end_lineno or node.lineno


def _docs(path: Path, name: str) -> Iterator[str | None]:
    """Yield the docstrings that can say what a function is for, the nearest first."""
    docs = {name: ast.get_docstring(node) for node, name in _names(path).items()}
    yield docs.get(name)
    owner, _, method = name.rpartition(".")
    found = functools.reduce(
        lambda part, word: getattr(part, word, None), filter(None, owner.split(".")), _module(path)
    )
    if isinstance(found, type):
        overridden = [vars(base).get(method) for base in found.__mro__[1:-1]]  # what object says of __init__ is nothing
        yield from (getattr(member, "__doc__", None) for member in overridden if member is not None)
        yield docs.get(owner)
    if isinstance(found, type | ModuleType):
        yield ast.get_docstring(_tree(path))


def _module(path: Path) -> object:
    return next((module for module in list(sys.modules.values()) if getattr(module, "__file__", "") == str(path)), None)
