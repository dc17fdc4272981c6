"""What the pages tell users to type is checked: every `-S key=value` gives a valid params.yaml, every path exists."""

from __future__ import annotations

import re
import shlex

import pytest
import yaml
from conftest import ROOT
from hydra.core.override_parser.overrides_parser import OverridesParser

from lego.artifacts import read_json
from lego.evaluation import comparison_lines
from lego.params import Params

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS = sorted(
    {line.strip() for page in PAGES for line in re.findall(r"^dvc exp run .*-S.*$", page.read_text(), re.M)}
)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_experiment_in_the_pages_is_valid(command):
    values = yaml.safe_load((ROOT / "params.yaml").read_text())
    words = shlex.split(command, comments=True)
    overrides = [words[i + 1] for i, word in enumerate(words) if word == "-S"]
    assert overrides
    for override in OverridesParser.create().parse_overrides(overrides):
        section, key = override.key_or_group.split(".")
        assert key in values[section], override.key_or_group
        values[section][key] = override.value()
        if hasattr(values[section][key], "text"):  # a quoted string
            values[section][key] = values[section][key].text
    params = Params.model_validate(values)
    if "split_on" in command:
        assert re.match(params.data.split_on or "", " = Title = ")


def test_the_readme_shows_the_numbers_of_the_committed_metrics():
    routed, yardstick = (
        read_json(ROOT / f"metrics/{n}.json") for n in ("evaluate_routing", "baseline/shallow_continued")
    )
    readme = (ROOT / "README.md").read_text()
    for line in comparison_lines(routed, yardstick):
        assert line in readme, line


def test_the_pages_link_to_files_that_exist():
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_file_of_the_tree_stands_in_the_readme():
    readme = (ROOT / "README.md").read_text()
    for path in [*(ROOT / "lego").glob("*.py"), *(ROOT / "stages").glob("*.py")]:
        if path.stem != "__init__":
            assert re.search(rf"\b{path.name}\b", readme), path.name
