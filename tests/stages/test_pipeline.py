"""dvc.yaml against the code: deps equal imports, params equal what is read, and which key reruns which stage."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from lego.base.params import Params
from tests.conftest import ROOT

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


def transitive_imports(stage: str) -> set[str]:
    """Of a stage's script: `tokenize`, or `evidence/train_joint`."""
    script = ROOT / "stages" / f"{stage}.py"
    todo, seen = [script, script.parent / "__init__.py", ROOT / "stages" / "__init__.py"], set()
    while todo:
        path = todo.pop()
        if path not in seen:
            seen.add(path)
            todo += imported_files(path)
    return {path.relative_to(ROOT).as_posix() for path in seen}


def names(entries: list) -> list[str]:
    """DVC entries are a path, or a path with options."""
    return [next(iter(entry)) if isinstance(entry, dict) else entry for entry in entries]


def outs(stage: str) -> set[str]:
    return {name for kind in ("outs", "metrics", "plots") for name in names(PIPELINE[stage].get(kind, []))}


def code_deps(stage: str) -> set[str]:
    return {dep for dep in PIPELINE[stage]["deps"] if dep.endswith(".py")}


def test_the_stages_are_these_and_each_has_its_script():
    assert list(PIPELINE) == ORDER
    for stage, entry in PIPELINE.items():
        assert entry["cmd"] == f"python -m stages.{stage}"
        assert not any(Path(dep) == Path("lego") for dep in entry["deps"])


@pytest.mark.parametrize("stage", ORDER)
def test_deps_equal_the_transitive_imports(stage):
    assert code_deps(stage) == transitive_imports(stage)


@pytest.mark.parametrize("stage", ORDER)
def test_every_file_read_is_a_dep_and_every_file_written_an_out(stage):
    source = (ROOT / "stages" / f"{stage}.py").read_text()
    mentioned = {path.rstrip("/") for path in re.findall(r'"((?:data|metrics)/[\w./]+)"', source)}
    deps = {dep for dep in PIPELINE[stage]["deps"] if dep.startswith(("data/", "metrics/"))}
    known = deps | outs(stage)
    for path in mentioned:
        assert any(path == entry or path.startswith(entry + "/") for entry in known), f"{path} is not in dvc.yaml"
    for entry in known - {f"metrics/timing/{stage}.json"}:
        assert any(path == entry or path.startswith(entry + "/") for path in mentioned), f"{entry} is never mentioned"
    earlier = {out for other in ORDER[: ORDER.index(stage)] for out in outs(other)}
    assert deps <= earlier


def is_property(section: str, name: str) -> bool:
    return isinstance(getattr(Params.model_fields[section].annotation, name, None), property)


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


def read_keys(stage: str) -> set[str]:
    """Keys that a stage script reads from `params`: a whole section where it passes one on."""
    tree = ast.parse((ROOT / "stages" / f"{stage}.py").read_text())
    sections = {"params": ""}  # local names of params and of its sections
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign):
            targets = node.targets[0].elts if isinstance(node.targets[0], ast.Tuple) else node.targets
            values = node.value.elts if isinstance(node.value, ast.Tuple) else [node.value]
            for target, value in zip(targets, values, strict=False):
                if isinstance(value, ast.Attribute) and ast.unparse(value.value) == "params" and value.attr in SECTIONS:
                    sections[target.id] = value.attr
    own_functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    parents = {child: parent for parent in ast.walk(tree) for child in ast.iter_child_nodes(parent)}
    keys = set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.Name) or node.id not in sections or not isinstance(node.ctx, ast.Load):
            continue
        chain, top = [sections[node.id]] if sections[node.id] else [], node
        while isinstance(parents[top], ast.Attribute):
            top = parents[top]
            chain.append(top.attr)
        if not chain:  # all of params goes to a function of this script, which reads it by the same name
            call = parents[node]
            assert isinstance(call, ast.Call)
            assert ast.unparse(call.func) in own_functions
        elif chain[0] == "seed" or (len(chain) > 1 and chain[1] in SECTIONS[chain[0]]):
            keys.add(".".join(chain[:2]) if chain[0] != "seed" else "seed")
        elif len(chain) > 1 and is_property(*chain[:2]):
            keys |= keys_behind(*chain[:2])
        elif isinstance(call := parents[top], ast.Call) and ast.unparse(call.func) == "grown":
            keys |= keys_behind(chain[0], "grown")
        elif not isinstance(parents[top], ast.Assign | ast.Tuple):
            keys |= {f"{chain[0]}.{key}" for key in SECTIONS[chain[0]]}  # the section as a whole
    return keys


def declared_keys(stage: str) -> set[str]:
    keys = set()
    for entry in PIPELINE[stage]["params"]:
        keys |= {f"{entry}.{key}" for key in SECTIONS[entry]} if entry in SECTIONS else {entry}
    return keys


READ_BY_NAME = {  # what the scripts reach through getattr or model_dump
    "tokenize": {f"data.max_{split}_tokens" for split in ("train", "validation", "calibration", "test")},
}
UNUSED_IN_GROUP = {  # declared with their whole group, which is one choice
    "tokenize": {"data.source", "data.tokenizer"},
    "train_phase1": {"model.seq_len"},
}


@pytest.mark.parametrize("stage", ORDER)
def test_declared_params_equal_those_read(stage):
    read = read_keys(stage) | READ_BY_NAME.get(stage, set())
    assert read - declared_keys(stage) == set()
    assert declared_keys(stage) - read - UNUSED_IN_GROUP.get(stage, set()) == set()


def reruns(key: str) -> tuple[list[str], list[str]]:
    """Stages that name the key, and those that may follow because an input of theirs may change."""
    direct = [stage for stage in ORDER if key in declared_keys(stage)]
    changed: set[str] = set()
    following = []
    for stage in ORDER:  # topological
        if stage in direct or changed & set(PIPELINE[stage]["deps"]):
            changed |= outs(stage)
            following += [stage] if stage not in direct else []
    return direct, following


def test_the_order_is_topological():
    made: set[str] = set()
    for stage in ORDER:
        assert {dep for dep in PIPELINE[stage]["deps"] if dep.startswith(("data/", "metrics/"))} <= made
        made |= outs(stage)


def test_the_ratio_reruns_the_threshold_and_what_follows():
    direct, following = reruns("ashem.hard_example_ratio")
    assert direct == ["compute_threshold"]
    assert following == ["collect_hard", "train_phase2", "train_shallow_continued", "evaluate_routing"]


def test_phase_2s_rate_reruns_phase_2_and_the_evaluation_and_can_reach_the_yardstick_only_through_its_budget():
    direct, following = reruns("ashem.phase2_lr")
    assert direct == ["train_phase2"]
    assert following == ["train_shallow_continued", "evaluate_routing"]
    assert set(PIPELINE["train_shallow_continued"]["deps"]) & outs("train_phase2") == {"metrics/added_macs.json"}


def test_the_readme_table_says_what_dvc_yaml_does():
    rows = re.findall(r"^\| `([\w., `*]+)` \| ([\w, ]+) \| ([\w, ]+) \|$", (ROOT / "README.md").read_text(), re.M)
    table = {}
    for keys, direct, following in rows:
        for key in re.findall(r"[\w.*]+", keys.replace("`", "")):
            section = key.removesuffix(".*")
            expanded = [k for k in KEYS if k.startswith(section + ".")] if key.endswith("*") else [key]
            for one in expanded:
                if key.endswith("*") and one in table:
                    continue  # a row of its own stands above
                table[one] = tuple([] if cell == "none" else cell.split(", ") for cell in (direct, following))
    assert set(table) == set(KEYS)
    for key in KEYS:
        assert table[key] == reruns(key), key


def test_timing_files_are_dependencies_of_no_stage():
    for stage in ORDER:
        assert not any("timing" in dep for dep in PIPELINE[stage]["deps"])
        assert f"metrics/timing/{stage}.json" in outs(stage)


def test_every_dvc_yaml_of_the_tree_parses():
    """One that does not breaks `dvc repro` at the root."""
    from dvc.repo import Repo

    with Repo(str(ROOT)) as repo:
        stages = {stage.name for stage in repo.index.stages}
    assert set(ORDER) <= stages
    assert {"joint@dense", "block2@random", "report"} <= stages


def test_the_readme_shows_the_graph_as_dvc_draws_it():
    command = [sys.executable, "-m", "dvc", "dag", "--md", "evaluate_routing"]  # without it the evidence pipeline too
    drawn = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert drawn.stdout.strip() in (ROOT / "README.md").read_text()


def test_stage_scripts_are_short():
    for stage in ORDER:
        source = (ROOT / "stages" / f"{stage}.py").read_text()
        for function in ast.walk(ast.parse(source)):
            if isinstance(function, ast.FunctionDef):
                lines = function.end_lineno - function.lineno + 1
                assert lines <= 50, f"{stage}.{function.name} has {lines} lines"
        assert source.startswith('"""')
        assert f"dvc repro {stage}" in source.split('"""')[1]
