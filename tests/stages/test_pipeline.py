"""dvc.yaml against the code: deps equal imports, params equal what is read, and which key reruns which stage."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from lego.evaluation.metrics import SUMMARY_KEYS
from tests.conftest import ROOT, committed
from tests.stages.conftest import (
    KEYS,
    ORDER,
    PIPELINE,
    SECTIONS,
    code_deps,
    code_lines,
    declared_keys,
    is_property,
    keys_behind,
    outs,
    reads,
    reruns,
)
from tests.test_packages import GUESTS
from tests.test_packages import ORDER as PACKAGES

DVC_FILES = [ROOT / "dvc.yaml", *sorted((ROOT / "stages").rglob("dvc.yaml"))]


def test_the_stages_are_these_and_each_has_its_script():
    assert list(PIPELINE) == ORDER
    for stage, entry in PIPELINE.items():
        assert entry["cmd"] == f"python -m stages.{stage}"
        assert not any(Path(dep) == Path("lego") for dep in entry["deps"])


@pytest.mark.parametrize("stage", ORDER)
def test_deps_equal_the_transitive_imports(stage):
    assert code_deps(PIPELINE[stage]) == code_lines(stage)


def test_a_changed_package_reruns_the_stages_that_use_it():
    found = {
        package: [stage for stage in ORDER if f"lego/{package}" in PIPELINE[stage]["deps"]] for package in PACKAGES
    }
    trained = ["train_phase1", "train_phase2", "train_shallow_continued"]
    assert found == {
        "base": ORDER,
        "tokens": ORDER,
        "text": ["tokenize"],
        "model": ORDER[1:],
        "training": trained,
        "mining": ["compute_threshold", "collect_hard", "train_phase2", "evaluate_routing"],
        "routing": ["train_phase2", "train_shallow_continued", "evaluate_routing"],
        "growing": ["train_phase2"],
        "evaluation": ["train_shallow_continued", "evaluate_routing"],
        "hub": ["evaluate_routing"],
        "report": [],
    }
    for entry in PIPELINE.values():
        assert not any(f"lego/{guest}" in entry["deps"] for guest in GUESTS)


def test_pipelines_are_short_enough_to_read():
    lines = {file: len(file.read_text().splitlines()) for file in DVC_FILES}
    assert lines[ROOT / "dvc.yaml"] <= 200
    assert sum(lines.values()) <= 1100


def test_metrics_and_plots_are_declared_once_at_the_top_and_are_few():
    declared = {}
    for file in DVC_FILES:
        pipeline = yaml.safe_load(file.read_text())
        entries = [entry.get("do", entry) for entry in pipeline["stages"].values()]
        assert not any(kind in entry for entry in entries for kind in ("metrics", "plots")), file
        for plot in pipeline.get("plots", []):
            (options,) = plot.values()
            assert {"title", "x", "y", "y_label"} <= set(options), plot
        declared[file.parent.relative_to(ROOT).as_posix()] = pipeline.get("metrics", [])
    assert {place: found for place, found in declared.items() if found} == {
        ".": ["metrics/summary.json", "metrics/yardstick.json"],
        "stages/evidence": ["../../metrics/baseline"],
        "stages/cvfp": ["../../metrics/cvfp/summary.json"],
        "stages/satipatthana": ["../../metrics/satipatthana/summary.json"],
    }


def test_what_is_declared_has_few_keys_of_five_digits_and_no_times():
    """As committed: a run rewrites the work tree."""
    shown = subprocess.run(["git", "ls-files", "metrics"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    files = shown.split()
    assert not [file for file in files if "timing" in file]
    baselines = [file for file in files if file.startswith("metrics/baseline/")]
    keys = {}
    for file in [
        "metrics/summary.json",
        "metrics/yardstick.json",
        *baselines,
        *(f"metrics/{g}/summary.json" for g in GUESTS),
    ]:
        values = json.loads(committed(file))
        keys[file] = set(values)
        assert len(values) <= 8
        for value in values.values():
            assert value == float(f"{value:.5g}"), file
    assert all(keys[file] - {"leaky"} == set(SUMMARY_KEYS) for file in keys if file.split("/")[1] not in GUESTS)


@pytest.mark.parametrize("stage", ORDER)
def test_every_file_read_is_a_dep_and_every_file_written_an_out(stage):
    source = (ROOT / "stages" / f"{stage}.py").read_text()
    mentioned = {path.rstrip("/") for path in re.findall(r'"((?:data|metrics)/[\w./]+)"', source)}
    deps = {dep for dep in PIPELINE[stage]["deps"] if dep.startswith(("data/", "metrics/"))}
    known = deps | outs(stage)
    for path in mentioned:
        assert any(path == entry or path.startswith(entry + "/") for entry in known), f"{path} is not in dvc.yaml"
    for entry in known:
        assert any(path == entry or path.startswith(entry + "/") for path in mentioned), f"{entry} is never mentioned"
    earlier = {out for other in ORDER[: ORDER.index(stage)] for out in outs(other)}
    for dep in deps:
        assert any(out == dep or out.startswith(f"{dep}/") for out in earlier), dep
    later = {out for other in ORDER[ORDER.index(stage) :] for out in outs(other)}
    assert not any(reads(PIPELINE[stage], out) for out in later)


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


def test_the_ratio_reruns_the_threshold_and_what_follows():
    direct, following = reruns("ashem.hard_example_ratio")
    assert direct == ["compute_threshold"]
    assert following == ["collect_hard", "train_phase2", "train_shallow_continued", "evaluate_routing"]


def test_phase_2s_rate_reruns_phase_2_and_the_evaluation_and_can_reach_the_yardstick_only_through_its_budget():
    direct, following = reruns("ashem.phase2_lr")
    assert direct == ["train_phase2"]
    assert following == ["train_shallow_continued", "evaluate_routing"]
    read = {out for out in outs("train_phase2") if reads(PIPELINE["train_shallow_continued"], out)}
    assert read == {"data/facts/added_macs.json"}


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


def test_times_are_what_no_stage_of_any_pipeline_depends_on_or_is_known_by():
    """An out that neither git nor the cache has would make every clone run its stage again."""
    for file in DVC_FILES:
        assert "timing" not in file.read_text()


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


def test_what_is_committed_fits_a_screen(tmp_path):
    """Metrics of all pipelines side by side, as a fresh clone has them."""
    subprocess.run(["git", "clone", "-q", str(ROOT), str(tmp_path / "clone")], check=True)
    command = [sys.executable, "-m", "dvc", "metrics", "show"]
    done = subprocess.run(command, cwd=tmp_path / "clone", capture_output=True, text=True, check=True)
    shown = done.stdout.splitlines()
    assert len(shown) <= 25
    assert max(map(len, shown)) <= 200
    assert sum(line.startswith("metrics/") for line in shown) == len(shown) - 1
