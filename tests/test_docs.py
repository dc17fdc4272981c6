"""What the pages tell users to type is checked: every `-S key=value` gives a valid params.yaml, every path exists."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from importlib import import_module
from typing import Any

import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser

from lego.base.params import Params
from lego.cvfp import sections as cvfp
from lego.evaluation.metrics import comparison_lines
from lego.satipatthana import sections as satipatthana
from stages.evidence.records import nested
from stages.evidence.summary import Suite
from stages.evidence.tables import short_table
from stages.extend.settings import Settings
from tests.conftest import ROOT, committed
from tests.workflow import LINES

TRACKED = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS = sorted(
    {
        line.strip()
        for page in PAGES
        for line in re.findall(r"^dvc exp run .*-S.*$", page.read_text().replace("\\\n", " "), re.M)
    }
)
SHAPES: dict[str, Any] = {
    "params.yaml": Params,
    str(cvfp.PARAMS): cvfp.CvfpParams,
    str(satipatthana.PARAMS): satipatthana.SatipatthanaParams,
    "stages/extend/extend.yaml": Settings,
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_experiment_in_the_pages_is_valid(command):
    words = shlex.split(command, comments=True)
    by_file = dict[str, list[str]]()
    for override in (words[i + 1] for i, word in enumerate(words) if word == "-S"):
        file, found, key = override.partition(".yaml:")
        by_file.setdefault(f"{file}.yaml" if found else "params.yaml", []).append(key if found else override)
    assert by_file
    for file, overrides in by_file.items():
        valid_overrides(file, overrides)


def valid_overrides(file: str, overrides: list[str]) -> None:
    values = yaml.safe_load((ROOT / file).read_text())
    rest = yaml.safe_load((ROOT / cvfp.ROOT_PARAMS).read_text())["data"] if file == str(cvfp.PARAMS) else {}

    def valid() -> Any:
        return SHAPES[file].model_validate(values | ({"data": rest | values["data"]} if rest else {}))

    for override in OverridesParser.create().parse_overrides(overrides):
        *path, key = override.key_or_group.split(".")
        section = values
        for part in path:
            section = section[part]
        assert key in section, override.key_or_group
        choices = [*override.value().list] if override.is_sweep_override() else [override.value()]
        for choice in choices:
            section[key] = getattr(choice, "text", choice)  # a quoted string
            if len(choices) > 1:
                valid()
    params = valid()
    params = params.root if file.endswith("extend.yaml") else params
    if any("split_on" in override for override in overrides):
        assert re.match(params.data.split_on or "", " = Title = ")


def test_the_readme_shows_the_numbers_of_the_committed_metrics():
    routed, yardstick = (json.loads(committed(f"metrics/details/{n}.json")) for n in ("ashem", "shallow_continued"))
    readme = (ROOT / "README.md").read_text()
    for line in comparison_lines(routed, yardstick):
        assert line in readme, line


def test_the_readme_shows_every_model_of_the_core_suite():
    suite = Suite.of("core", nested(json.loads(committed("metrics/evidence/core.json"))["records"]))
    header, rows, _ = short_table(suite, "default")
    readme = (ROOT / "README.md").read_text()
    for row in (header, *rows):
        assert "| " + " | ".join(row) + " |" in readme, row


def test_the_workflow_script_runs_every_line_of_the_page():
    page = (ROOT / "docs/evidence.md").read_text().split("## Daily work with experiments")[1]
    shown = [line for block in re.findall(r"```bash\n(.*?)```", page, re.S) for line in block.splitlines()]
    assert len(shown) > 15
    assert [line for line in shown if line not in LINES] == []


def test_the_pages_link_to_files_that_exist():
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_package_of_the_tree_stands_in_the_readme_in_twelve_lines():
    tree = next(part for part in (ROOT / "README.md").read_text().split("```\n") if part.startswith("params.yaml"))
    assert len(tree.splitlines()) <= 12
    for path in [*(ROOT / "lego").glob("*/__init__.py"), *(ROOT / "stages").glob("*/__init__.py")]:
        place = path.parent.relative_to(ROOT).as_posix()
        assert re.search(rf"\b{place}\b" if place.startswith("lego/") else rf"\b{path.parent.name}/", tree), place
    for path in {name.split("/")[0] for name in TRACKED if "/" in name and not name.startswith(".")}:
        assert re.search(rf"\b{path}/", tree), path


def test_every_module_and_name_of_lego_that_pages_and_code_speak_of_exists():
    """Written as `lego.package.module.name`; results.md is a dated log and keeps the names it had."""
    code = [name for name in TRACKED if name.endswith((".py", ".yaml", ".toml")) and not name.startswith("tests/")]
    for file in [*PAGES, *(ROOT / name for name in code)]:
        if file.name == "results.md":
            continue
        for name in re.findall(r"(?<![\w./-])lego(?:\.[a-zA-Z_]\w*)+", file.read_text()):
            if not name.endswith((".md", ".py", ".yaml")):
                assert exists(name), f"{file.relative_to(ROOT)}: {name}"


def exists(name: str) -> bool:
    """Whether a dotted name is a module, or what one holds."""
    found, *parts = name.split(".")
    holder: Any = import_module(found)
    for part in parts:
        found = f"{found}.{part}"
        try:
            holder = import_module(found)
        except ImportError:
            if not hasattr(holder, part):
                return False
            holder = getattr(holder, part)
    return True
