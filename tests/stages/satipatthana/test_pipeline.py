"""Satipatthana's pipeline: deps equal imports, which change reruns what, all stages through real dvc at test size."""

from __future__ import annotations

import importlib
import math
import re
import shutil
import sys
from functools import partial

import pytest
import yaml

from lego.base.artifacts import read_json
from lego.satipatthana import EXPOSED
from lego.satipatthana.sections import PARAMS, SatipatthanaParams, changed, load
from lego.satipatthana.store import load as load_system
from stages.satipatthana.prepare import TABLES, unwatched
from tests.conftest import ROOT, Clone
from tests.conftest import ran as ran_by_dvc
from tests.stages.conftest import code_deps, code_lines, names

STAGES = yaml.safe_load((ROOT / "stages/satipatthana/dvc.yaml").read_text())["stages"]
BRIDGE = yaml.safe_load((ROOT / "stages/satipatthana/ashem/dvc.yaml").read_text())["stages"]
TASKS = {
    name: entry.get("do", entry)
    for name, entry in yaml.safe_load((ROOT / "stages/satipatthana/tasks/dvc.yaml").read_text())["stages"].items()
}
ENTRIES = {name: entry.get("do", entry) for name, entry in STAGES.items()}
SCRIPTS = {name: re.sub(r"\d$", "", name) for name in (*STAGES, *BRIDGE)} | {name: f"tasks/{name}" for name in TASKS}
TINY = {
    "seeds": 2,
    "workers": 1,
    "task.name": "wine",
    "test.kinds": ["uniform", "noisy_0.5"],
    "peers.names": ["msp", "mahalanobis"],
    "peers.epochs": 2,
    "ablations.seeds": 1,
    "ablations.batches": 3,
    "ablations.epochs": 2,
    "system.dim": 8,
    "adapter.hidden": 16,
    "vipassana.prototypes": 6,
    **{f"stage{number}.epochs": 2 for number in range(4)},
}


def declared(entry: dict, file: str = PARAMS.as_posix()) -> list[str]:
    return [key for one in entry["params"] for key in one.get(file, [])]


@pytest.mark.parametrize(
    ("file", "watched"),
    [
        (None, True),
        ("tables/a.csv", True),
        ("./tables/b/a.parquet", True),
        ("tables/../a.csv", False),
        ("a.csv", False),
    ],
)
def test_a_table_outside_of_the_folder_that_dvc_watches_is_told_of(file, watched):
    assert str(TABLES) in STAGES["prepare"]["deps"]
    for key in ("file", "strangers"):
        told = unwatched(load(ROOT / PARAMS).task.model_copy(update={key: file}))
        assert told == ([] if watched else [f"task.{key}"])


@pytest.mark.parametrize("stage", SCRIPTS)
def test_deps_equal_the_transitive_imports(stage):
    entry = (ENTRIES | BRIDGE | TASKS)[stage]
    assert code_deps(entry) == code_lines(f"satipatthana/{SCRIPTS[stage]}", guest=stage != "bridge")
    expected = f"python -m stages.satipatthana.{SCRIPTS[stage].replace('/', '.')}"
    assert entry["cmd"].startswith(expected)


def test_the_bridge_reads_what_the_root_makes_and_no_stage_waits_for_it():
    root = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    made = {name for entry in root.values() for name in names(entry["outs"])}
    bridge = BRIDGE["bridge"]
    assert {dep for dep in bridge["deps"] if dep.startswith(("data/", "metrics/"))} <= made
    assert declared(bridge, "params.yaml") == ["seed", "evaluation.batch_size", "routing"]
    assert not any("ashem" in dep for entry in ENTRIES.values() for dep in entry["deps"])


def test_every_section_is_declared_and_every_declared_key_exists():
    keys = {key for entry in (ENTRIES | BRIDGE | TASKS).values() for key in declared(entry)}
    assert {key.split(".")[0] for key in keys} == set(SatipatthanaParams.model_fields) - {"workers"}  # changes nothing
    values = yaml.safe_load((ROOT / PARAMS).read_text())
    for key in keys:
        section, _, last = key.partition(".")
        assert section in values
        assert not last or last in values[section], key
    run = {key for name, entry in (ENTRIES | BRIDGE | TASKS).items() if name != "report" for key in declared(entry)}
    leaves = [f"{section}.{key}" for section, inner in values.items() if isinstance(inner, dict) for key in inner]
    # which peers there are decides foreach, not a command
    assert {leaf for leaf in leaves if leaf not in run and leaf.split(".")[0] not in run} == {"peers.names"}


def test_what_a_stage_reads_an_earlier_one_writes_and_timing_is_no_dependency():
    made: set[str] = set()
    for entry in ENTRIES.values():
        data = {dep for dep in entry["deps"] if dep.startswith(("data/", "metrics/"))}
        assert data <= made | {"metrics/satipatthana/peers"}
        assert not any("timing" in dep for dep in data)
        made |= set(names(entry["outs"]))


@pytest.mark.parametrize(
    ("key", "stages"),
    [
        ("stage0.lr", {"train_stage0"}),
        ("stage1.weight_recon", {"train_stage1"}),
        ("vicara.rho", {"train_stage1"}),
        ("stage2.lr", {"train_stage2", "evaluate"}),
        ("vipassana.hidden", {"train_stage2"}),
        ("paths.void", {"train_stage2"}),
        ("stage3.epochs", {"train_stage3"}),
        ("reject.wanted", {"evaluate"}),
        ("seed", {"train_stage0", "train_stage1", "train_stage2", "train_stage3", "evaluate", "plain", "peers"}),
        ("peers.lr", {"plain", "peers"}),
        ("peers.exposure", {"peers"}),
    ],
)
def test_a_key_reruns_its_stage_and_nothing_before(key, stages):
    found = {
        stage
        for stage, entry in ENTRIES.items()
        if any(one in (key, key.split(".")[0]) for one in declared(entry))
        and stage not in ("report", "compat", "ablations")
    }
    assert found == stages


def test_all_stages_in_one_process(tmp_path, monkeypatch):
    """The same scripts without dvc, which test_the_pipeline_runs_once uses."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "stages/satipatthana").mkdir(parents=True)
    values = changed(load(ROOT / PARAMS), TINY, "tiny").model_dump()
    (tmp_path / PARAMS).write_text(yaml.safe_dump(values, sort_keys=False))
    shutil.copy(ROOT / "stages/satipatthana/profiles.yaml", tmp_path / "stages/satipatthana/profiles.yaml")
    for name, entry in ENTRIES.items():
        words = entry["cmd"].split()[3:]
        for argument in values["peers"]["names"] if words == ["${item}"] else words or [None]:
            monkeypatch.setattr(sys, "argv", ["stage"] + ([argument] if argument else []))
            importlib.import_module(f"stages.satipatthana.{SCRIPTS[name]}").main()
    found = read_json("metrics/satipatthana/evaluate.json")
    assert 0 <= found["accuracy"] <= 1
    assert all(isinstance(value, float) and not math.isinf(value) for value in found.values())
    page = (tmp_path / "metrics/satipatthana/report.html").read_text()
    assert page.count("<img") == 4
    parts = read_json("metrics/satipatthana/ablations.json")
    assert set(parts["means"]) == {"all_features", "without_log", "latent", "recon_error", "without_vicara"}
    width = 13 * 16 + 16 * 16 + 16 * 8  # of the plain network: its layers are counted exactly
    assert parts["macs"]["ensemble"] == 5 * parts["macs"]["plain"]
    assert parts["macs"]["satipatthana"] > width
    system, use = load_system("data/satipatthana/system")
    assert system.aux is None
    assert len(use.columns) == 13


def test_compat_declares_what_its_profile_leaves_to_the_parameters():
    own = {"tasks", "bridge", "workers"}  # of other pipelines, and what changes nothing
    wanted = set(SatipatthanaParams.model_fields) - {"task", "test", "peers", "ablations"} - own
    assert set(declared(ENTRIES["compat"])) == wanted | {"task.job"}
    assert set(declared(ENTRIES["report"])) >= set(SatipatthanaParams.model_fields) - {"threads"} - own


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Clone:
    """A clone of this tree with tiny parameters, whose pipeline has run."""
    clone = Clone.of_this_tree(tmp_path_factory.mktemp("satipatthana"))
    values = changed(load(ROOT / PARAMS), TINY | {"workers": 2}, "tiny").model_dump()
    (clone.folder / PARAMS).write_text(yaml.safe_dump(values, sort_keys=False))
    clone.run("dvc", "init", "-q", "-f")
    clone.output = clone.run("dvc", "repro", "stages/satipatthana/dvc.yaml")  # type: ignore[attr-defined]
    return clone


ran = partial(ran_by_dvc, pipeline="stages/satipatthana/dvc.yaml")


@pytest.mark.slow
def test_the_pipeline_runs_once_and_a_parameter_of_stage_2_reruns_what_follows(clone):
    everything = {name for name in STAGES if name != "peers"} | {"peers@msp", "peers@mahalanobis"}
    assert set(ran(clone.output)) == everything
    assert ran(clone.run("dvc", "repro", "stages/satipatthana/dvc.yaml")) == []
    found = clone.json("metrics/satipatthana/evaluate.json")
    assert 0 <= found["accuracy"] <= 1
    assert all(isinstance(value, float) and not math.isinf(value) for value in found.values())
    page = (clone.folder / "metrics/satipatthana/report.html").read_text()
    assert page.count("<img") == 4
    assert "http" not in page.replace("http://www.w3.org", "")
    assert not (clone.folder / "data/tokens").exists()  # the root's pipeline did not run
    before = (clone.folder / "data/satipatthana/stage1/seed_0/system.safetensors").read_bytes()
    file = clone.folder / PARAMS
    file.write_text(file.read_text().replace("  trust_limit: 6.0", "  trust_limit: 3.0"))
    again = ran(clone.run("dvc", "repro", "stages/satipatthana/dvc.yaml"))
    assert set(again) == {"train_stage2", "train_stage3", "evaluate", "compat", "ablations", "report"}
    assert (clone.folder / "data/satipatthana/stage1/seed_0/system.safetensors").read_bytes() == before
    alone = [clone.folder / f"data/satipatthana/stage1/seed_{seed}/system.safetensors" for seed in range(2)]
    together = [one.read_bytes() for one in alone]
    file.write_text(file.read_text().replace("workers: 2", "workers: 1"))
    assert ran(clone.run("dvc", "repro", "stages/satipatthana/dvc.yaml")) == []  # as it changes nothing:
    clone.run("python", "-m", "stages.satipatthana.train_stage", "1")
    assert [one.read_bytes() for one in alone] == together
    (clone.folder / "tables/rows.csv").write_text("a,b\n1,2\n")
    assert "modified:           tables" in clone.run("dvc", "status", "stages/satipatthana/dvc.yaml:prepare")
    options = clone.run("python", "-m", "stages.satipatthana.profile", "compat").split()
    assert "stages/satipatthana/params.yaml:vicara.inject=false" in options
    assert "error: give the number of a stage, 0 to 3" in clone.run(
        "python", "-m", "stages.satipatthana.train_stage", "7", fails=True
    )


def test_r11_1_the_package_exposes_what_scores_a_system():
    import lego.satipatthana

    assert EXPOSED == ("evaluate", "Protocol")
    assert lego.satipatthana.evaluate is lego.satipatthana.evaluation.evaluate
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = lego.satipatthana.nothing
