"""Which files of this tree a program consists of: what its results depend on, package folders being coarser."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]  # where the code and dvc.yaml are; data lies in the working folder


@cache
def imported(file: Path) -> frozenset[Path]:
    """Modules of this tree that a module imports, wherever in it the import stands.

    Args:
        file: of this tree.

    Raises:
        ValueError: it has a relative import.
    """
    found = set[Path]()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                raise ValueError(f"{file}:{node.lineno}: a relative import; name the module in full")
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        found |= {one for name in names if (one := _file(name)) is not None}
    return frozenset(found)


def _file(name: str) -> Path | None:
    """The module of this tree that a dotted name means, or lies in."""
    parts = name.split(".")
    for length in (len(parts), len(parts) - 1):
        file = ROOT.joinpath(*parts[:length]).with_suffix(".py")
        if length and file.is_file():
            return file
    return None


@cache
def code_of(module: str) -> tuple[Path, ...]:
    """The file of a module and all those of this tree that it needs, sorted.

    A package's `__init__` is not among them: it computes nothing here, which tests/test_packages.py holds.

    Args:
        module: a dotted name, such as `stages.tokenize`.

    Raises:
        ValueError: there is no such module, or one of those it needs has a relative import.
    """
    if (start := _file(module)) is None:
        raise ValueError(f"{module} is no module of {ROOT}")
    todo, seen = [start], set[Path]()
    while todo:
        file = todo.pop()
        if file not in seen:
            seen.add(file)
            todo += imported(file)
    return tuple(sorted(seen))
