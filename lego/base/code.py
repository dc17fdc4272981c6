"""Which files of this tree a program consists of: what its results depend on, package folders being coarser."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]  # where the code and dvc.yaml are; data lies in the working folder


@cache
def imported(file: Path) -> frozenset[Path]:
    """Modules of this tree that a module imports, wherever in it the import stands.

    Args:
        file: of this tree. Its imports are absolute.
    """
    found = set[Path]()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {file for alias in node.names for file in _files(alias.name)}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {file for alias in node.names for file in _files(f"{node.module}.{alias.name}")}
    return frozenset(found)


def _files(name: str) -> Iterator[Path]:
    """The module that a dotted name means, or lies in."""
    parts = name.split(".")
    for length in (len(parts), len(parts) - 1):
        file = ROOT.joinpath(*parts[:length]).with_suffix(".py")
        if length and file.is_file():
            yield file
            return


@cache
def code_of(module: str) -> tuple[Path, ...]:
    """The file of a module and all those of this tree that it needs, sorted.

    A package's `__init__` is not among them: here it hands on names and computes nothing.

    Args:
        module: a dotted name, such as `stages.tokenize`.
    """
    todo, seen = list(_files(module)), set[Path]()
    while todo:
        file = todo.pop()
        if file not in seen:
            seen.add(file)
            todo += imported(file)
    return tuple(sorted(seen))
