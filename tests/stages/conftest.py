"""What tests of pipelines share: the stages of dvc.yaml against the code they name, and a finished run."""

from __future__ import annotations

import ast
import fcntl
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from lego.base.params import Params
from tests.conftest import ROOT, Clone, ran, run_in_process

PIPELINE = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
ORDER = [
    "tokenize",
    "train_phase1",
    "compute_threshold",
    "collect_hard",
    "train_phase2",
    "train_shallow_continued",
    "evaluate_routing",
]
SECTIONS = {name: set(field.annotation.model_fields) for name, field in Params.model_fields.items() if name != "seed"}
KEYS = ["seed", *(f"{section}.{key}" for section, keys in SECTIONS.items() for key in sorted(keys))]


def imported_files(path: Path) -> set[Path]:
    """Files of this repository that a module imports by name, packages' __init__ included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            parts = name.split(".")
            candidates = [ROOT.joinpath(*parts[:n], "__init__.py") for n in range(1, len(parts) + 1)]
            candidates.append(ROOT.joinpath(*parts).with_suffix(".py"))
            found |= {file for file in candidates if file.exists()}
    return found


def transitive_imports(script: str) -> set[str]:
    """Files of this repository that a stage's script consists of, packages' __init__ apart.

    Args:
        script: below stages/, such as `tokenize` or `evidence/train_joint`.
    """
    todo, seen = [ROOT / "stages" / f"{script}.py"], set()
    while todo:
        path = todo.pop()
        if path not in seen:
            seen.add(path)
            todo += imported_files(path)
    return {path.relative_to(ROOT).as_posix() for path in seen if path.stem != "__init__"}


def code_lines(script: str, guest: bool = False) -> set[str]:
    """What a dvc.yaml must name of them: own files, and packages of lego/; of training a guest needs steps alone."""
    lines = set()
    for file in transitive_imports(script):
        package = "/".join(file.split("/")[:2])
        lines.add(package if file.startswith("lego/") and not (guest and package == "lego/training") else file)
    return lines


def names(entries: list) -> list[str]:
    """DVC entries are a path, or a path with options."""
    return [next(iter(entry)) if isinstance(entry, dict) else entry for entry in entries]


def outs(stage: str) -> set[str]:
    return set(names(PIPELINE[stage]["outs"]))


def reads(entry: dict, out: str) -> bool:
    """Whether a stage names a file or folder among its deps, or the folder it lies in."""
    return any(out == dep or out.startswith(f"{dep}/") for dep in entry["deps"])


def code_deps(entry: dict) -> set[str]:
    """Of a stage: its own files and packages."""
    return {dep for dep in entry["deps"] if dep.startswith("lego/") or dep.endswith(".py")}


def is_property(section: str, name: str) -> bool:
    """Or a method of the section's own."""
    own = vars(Params.model_fields[section].annotation).get(name)
    return isinstance(own, property) or callable(own)


def keys_behind(section: str, name: str) -> set[str]:
    """Keys of a section that a property of it reads, or a function of lego.growing.phase2 that takes it whole."""
    module = Params.model_fields[section].annotation.__module__ if name != "grown" else "lego.growing.phase2"
    tree = ast.parse(ROOT.joinpath(*module.split(".")).with_suffix(".py").read_text())
    function = next(node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == name)
    keys = set()
    for node in ast.walk(function):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("self", section):
            keys |= {f"{section}.{node.attr}"} if node.attr in SECTIONS[section] else keys_behind(section, node.attr)
    return keys


def declared_keys(stage: str) -> set[str]:
    keys = set()
    for entry in PIPELINE[stage]["params"]:
        keys |= {f"{entry}.{key}" for key in SECTIONS[entry]} if entry in SECTIONS else {entry}
    return keys


def reruns(key: str) -> tuple[list[str], list[str]]:
    """Stages that name the key, and those that may follow because an input of theirs may change."""
    direct = [stage for stage in ORDER if key in declared_keys(stage)]
    changed: set[str] = set()
    following = []
    for stage in ORDER:  # topological
        if stage in direct or any(reads(PIPELINE[stage], out) for out in changed):
            changed |= outs(stage)
            following += [stage] if stage not in direct else []
    return direct, following


@pytest.fixture(scope="session")
def reproduced(tmp_path_factory) -> Path:
    """A clone in which `dvc repro` ran, made once for all workers, and what it printed beside it; see `copy_of`."""
    shared = tmp_path_factory.getbasetemp()
    shared = shared.parent if "PYTEST_XDIST_WORKER" in os.environ else shared
    folder, printed = shared / "reproduced", shared / "reproduced.txt"
    with (shared / "reproduced.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not printed.exists():
            folder.mkdir()
            output = Clone.of_this_tree(folder).run("dvc", "repro")
            assert ran(output) == ORDER
            printed.write_text(output)
    return folder


def copy_of(folder: Path, target: Path) -> Clone:
    """Of a clone, with its cache and the links into it."""
    subprocess.run(["cp", "-a", str(folder), str(target)], check=True)
    return Clone(target)


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> Clone:
    """A run of all stages, made once a worker: tests read it, or damage a copy."""
    clone = Clone.of_this_tree(tmp_path_factory.mktemp("clone"))
    run_in_process(clone.folder, ORDER)
    return clone


@pytest.fixture
def folder(finished, tmp_path, monkeypatch) -> Path:
    """A copy of a finished run that a test may damage; the working folder."""
    target = tmp_path / "run"
    shutil.copytree(finished.folder, target, ignore=shutil.ignore_patterns(".git", ".dvc", "lego", "stages"))
    monkeypatch.chdir(target)
    return target
