"""The order of the packages: what each may import."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.stages.conftest import imported_files

ORDER = ["base", "tokens", "text", "model", "training", "mining", "routing", "growing", "evaluation", "hub", "report"]
"""Packages of lego/, each importing only itself and those before it."""

FRONTS = {"generate": "routing", "hf": "hub", "params": "base", "compare": "evaluation"}
"""Modules of lego/ itself: names that users type, and the package that each hands on."""

GUESTS = {
    "cvfp": {"base", "tokens", "text", "training/steps", "report"},
    "satipatthana": {"base", "training/steps", "report"},
}
"""Systems beside ASHEM, and what of the house they stand on: none of its method."""

BRIDGES = {ROOT / "stages/satipatthana/bridge.py"}  # whose task it is to know both


def rooms(package: str) -> list[Path]:
    return sorted((ROOT / "lego" / package).rglob("*.py"))


def imports(file: Path) -> list[Path]:
    """Modules of lego/ that a file imports, as paths below it; a package's own __init__ does not count."""
    found = [one.relative_to(ROOT / "lego") for one in imported_files(file) if one.is_relative_to(ROOT / "lego")]
    return [one for one in found if one.stem != "__init__"]


def test_the_tree_has_these_packages_and_each_says_what_it_is_for():
    assert {path.parent.name for path in (ROOT / "lego").glob("*/__init__.py")} == {*ORDER, *GUESTS}
    assert {path.stem for path in (ROOT / "lego").glob("*.py")} == {"__init__", *FRONTS}
    for package in [*ORDER, *GUESTS]:
        said = ast.get_docstring(ast.parse((ROOT / "lego" / package / "__init__.py").read_text()))
        assert said is not None, package
        assert said.splitlines()[0].endswith("."), package


@pytest.mark.parametrize("package", ORDER)
def test_a_package_imports_only_those_before_it(package):
    allowed = set(ORDER[: ORDER.index(package) + 1])
    for file in rooms(package):
        assert {one.parts[0] for one in imports(file)} <= allowed, file
        assert not any(one.is_relative_to(ROOT / "stages") for one in imported_files(file)), file


def test_no_module_imports_itself_by_a_detour():
    files = [file for package in [*ORDER, *GUESTS] for file in rooms(package)]
    TopologicalSorter({file: [ROOT / "lego" / one for one in imports(file)] for file in files}).prepare()


def test_no_module_takes_a_name_from_a_package_itself():
    """A stage's code is what its imports say: they name modules, and an `__init__` only hands on."""
    for file in [*(ROOT / "lego").rglob("*.py"), *(ROOT / "stages").rglob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and ROOT.joinpath(*str(node.module).split(".")).is_dir():
                place = ROOT.joinpath(*str(node.module).split("."))
                assert all((place / f"{alias.name}.py").exists() for alias in node.names), f"{file}: {node.module}"


def test_an_init_computes_nothing():
    """So that pipelines and fingerprints need not name it; two hand on public names, and one refuses a wrong Python."""
    handing = {ROOT / "lego/__init__.py", ROOT / "lego/satipatthana/__init__.py", ROOT / "stages/__init__.py"}
    for file in {*(ROOT / "lego").rglob("__init__.py"), *(ROOT / "stages").rglob("__init__.py")} - handing:
        assert len(ast.parse(file.read_text()).body) == 1, file  # its docstring


@pytest.mark.parametrize("front", FRONTS)
def test_a_front_hands_on_one_package_and_no_module_imports_it(front):
    assert {one.parts[0] for one in imports(ROOT / f"lego/{front}.py")} == {FRONTS[front]}
    files = [*(ROOT / "lego").rglob("*.py"), *(ROOT / "stages").rglob("*.py")]
    assert [file for file in files if ROOT / f"lego/{front}.py" in imported_files(file)] == []


@pytest.mark.parametrize("guest", GUESTS)
def test_a_guest_stands_on_the_house_and_the_house_not_on_it(guest):
    for file in {*rooms(guest), *(ROOT / "stages" / guest).rglob("*.py")} - BRIDGES:
        for one in imports(file):
            if one.parts[0] != guest:
                known = {one.parts[0], one.with_suffix("").as_posix()}
                assert known & GUESTS[guest], f"{file} imports lego/{one}"
    for package in [*ORDER, *(other for other in GUESTS if other != guest)]:
        for file in rooms(package):
            assert guest not in {one.parts[0] for one in imports(file)}, file


def test_an_optimizer_step_needs_no_model():
    """Guests train with lego/training/steps.py, so it must not bring them a Transformer."""
    assert {one.parts[0] for one in imports(ROOT / "lego/training/steps.py")} == {"base"}


@pytest.mark.parametrize("guest", GUESTS)
def test_what_a_guest_stands_on_stands_on_nothing_more(guest):
    for known in GUESTS[guest]:
        for file in rooms(known) or [ROOT / f"lego/{known}.py"]:
            assert {one.parts[0] for one in imports(file)} <= GUESTS[guest], file
