"""Suites of the evidence pipeline: what they name, when a record is current, and the runner that makes the rest."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import yaml

from lego.base.artifacts import ArtifactError, read_json
from lego.base.harness import StageError
from lego.base.params import Params, load_params
from stages.evidence import graph, run, wanted
from stages.evidence.graph import changed, load_suites, stage_of, task_of
from stages.evidence.records import results
from tests.conftest import ROOT, Clone

VALUES = yaml.safe_load((ROOT / "params.yaml").read_text())


def test_the_suites_name_models_and_keys_that_there_are():
    for name, suite in load_suites().items():
        for setting, changes in suite.settings.items():
            params = Params.model_validate(changed(VALUES, changes))
            for model in suite.models:
                assert stage_of(model, params), (name, setting)
    with pytest.raises(StageError, match="no model nonsense"):
        stage_of("nonsense", load_params(ROOT / "params.yaml"))
    with pytest.raises(StageError, match=r"model\.nonsense is no key"):
        changed(VALUES, {"model.nonsense": 1})


def test_a_fingerprint_changes_with_what_a_result_follows_from_and_with_nothing_else(monkeypatch):
    monkeypatch.setattr(graph, "text_digest", lambda data: "text")

    def digest(stage: str, **changes) -> str:
        values = changed(VALUES, {key.replace("__", "."): value for key, value in changes.items()})
        return task_of(stage, values, {}).fingerprint

    for stage in ("evaluate_routing", "joint@dense", "block2@random"):
        same = digest(stage)
        assert digest(stage) == same
        for key, value in (
            ("data__vocab_size", 999),
            ("ashem__phase1_lr", 1e-4),
            ("seed", 5),
            ("search__lr_factors", [3.0]),
        ):
            assert digest(stage, **{key: value}) != same, (stage, key)
    assert digest("joint@dense", yardstick__lr=0.5) == digest("joint@dense")
    assert digest("joint@dense", baselines__joint__static_mid={"lr": 1.0}) == digest("joint@dense")
    values = copy.deepcopy(VALUES)
    assert task_of("joint@dense", values, {"joint@dense": [0.5]}).fingerprint != digest("joint@dense")
    assert task_of("joint@dense", values, {"joint@static_mid": [0.5]}).fingerprint == digest("joint@dense")
    changes = task_of("evaluate_routing", values, {"train_phase2": [0.5]}).fingerprint
    assert changes != digest("evaluate_routing")  # through what it reads
    monkeypatch.setattr(graph, "text_digest", lambda data: "other text")
    assert digest("joint@dense") != task_of("joint@dense", values, {}).inputs[0][1].fingerprint


def test_code_counts_by_what_it_does(tmp_path):
    texts = {
        "a": '"""Doc."""\nx = 1  # why\n\n\ndef f():\n    """Doc."""\n    return x\n',
        "b": "x = 1\ndef f():\n    return x\n",
        "c": "x = 2\ndef f():\n    return x\n",
    }
    for name, text in texts.items():
        (tmp_path / f"{name}.py").write_text(text)
    a, b, c = (graph.code_digest(tmp_path / f"{name}.py") for name in "abc")
    assert a == b != c


@pytest.mark.slow
def test_the_runner_makes_what_is_missing_reuses_what_is_current_and_goes_on_after_a_failure(
    tmp_path, monkeypatch, capsys
):
    clone = Clone.of_this_tree(tmp_path)
    monkeypatch.chdir(clone.folder)
    suite = graph.Suite(seeds=1, search=[1.0], settings={"tiny": {}}, models=["block1"])
    for room in (run, wanted):
        monkeypatch.setattr(room, "load_suites", lambda: {"small": suite, "other": suite})
    monkeypatch.setitem(graph.PIPELINE_MODELS, "block1", "train_phase1")  # the shortest way to a model
    monkeypatch.setattr(run, "record", lambda one: made(run.STORE / one.task.label / "data/facts/train_phase1.json"))
    asked, execute = ["--suite", "small", "--workers", "2"], run.execute

    def made(file: Path) -> dict:
        return {"metrics": read_json(file), "documents": {}, "curve": {}}

    def failing(task: graph.Task) -> float:
        if task.stage == "train_phase1":
            raise StageError("train_phase1: no room")
        return execute(task)

    monkeypatch.setattr(run, "execute", failing)
    with pytest.raises(StageError, match="1 stages failed, the first: train_phase1: no room"):
        run.main(asked)
    assert "1 models to make, 2 stages to run on 2 workers" in capsys.readouterr().out
    monkeypatch.setattr(run, "execute", execute)
    run.main(asked)
    assert "1 models to make, 1 stages to run on 2 workers" in capsys.readouterr().out
    assert read_json("metrics/evidence/small.json")["tiny"]["block1"]["0"]["metrics"]["val_ppl"] > 1
    run.main(asked)
    assert "1 of 1 models are current" in capsys.readouterr().out
    run.main(["--suite", "other"])
    assert "other tiny block1 seed 0: made before, for another suite" in capsys.readouterr().out
    assert read_json("metrics/evidence/other.json") == read_json("metrics/evidence/small.json")
    path = clone.folder / "params.yaml"
    path.write_text(path.read_text().replace("grad_clip: 1.0", "grad_clip: 0.5"))
    run.main([*asked, "--dry-run"])
    assert "0 of 1 models are current" in capsys.readouterr().out
    wanted.drop_stale("small", suite)
    assert "small: 1 models of other parameters, code or text are dropped" in capsys.readouterr().out
    assert read_json("metrics/evidence/small.json") == {"tiny": {"block1": {}}}


def test_wrong_requests_and_parameters_that_are_not_comparable_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "params.yaml").read_text()
    for change, sentence in (
        (("hard_split: train", "hard_split: validation"), r"ashem\.hard_split must be train"),
        (("criterion: max_prob", "criterion: gain"), "routing must be max_prob"),
        (("hard_ratio: null", "hard_ratio: 0.2"), "routing must be max_prob"),
    ):
        assert text.count(change[0]) == 1
        Path("params.yaml").write_text(text.replace(*change))
        with pytest.raises(StageError, match=sentence):
            run.main(["--dry-run"])
    Path("params.yaml").write_text(text)
    for asked, sentence in (
        (["--suite", "none"], "suites.yaml has core"),
        (["--setting", "none"], "these suites have default"),
        (["--seeds", "0"], "must be at least 1"),
    ):
        with pytest.raises(StageError, match=sentence):
            run.main(asked)


def test_later_seeds_take_the_factor_that_the_first_one_took():
    params = Params.model_validate(changed(VALUES, {"search.lr_factors": [0.5, 1.0, 2.0]}))
    rates = {"ashem": 0.5 * params.ashem.phase2_lr, "dense": 2 * params.baselines.joint["dense"].lr, "random": 1e-9}
    records = {model: {"0": {"metrics": {"lr": lr}}} for model, lr in rates.items()}
    models = ["ashem", "dense", "random", "shallow_continued"]
    found = wanted.factors_found({"x": records}, "x", models, params.model_dump())
    assert found == {"train_phase2": [0.5], "joint@dense": [2.0]}  # random's belongs to no factor, and one is missing


def test_folders_that_are_named_count_by_their_content(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(graph, "text_digest", lambda data: "text")
    Path("llama").mkdir()
    (tmp_path / "llama/config.json").write_text("{}")
    values = changed(VALUES, {"model.init_from": "llama"})
    before = task_of("train_phase1", values, {}).fingerprint
    (tmp_path / "llama/config.json").write_text("{ }")
    assert task_of("train_phase1", values, {}).fingerprint != before


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("a: [", "is not valid YAML"),
        ("", "must hold suites"),
        ("a: 3", "a: Input should be"),
        ("a: {seeds: 1, search: [1.0], settings: {b: {seed: 3}}, models: [ashem]}", "must not change seed"),
        ("a: {seeds: 1, search: [1.0], settings: {b: {search.lr_factors: [2.0]}}, models: [ashem]}", "must not change"),
        ("a: {seeds: 1, search: [1.0], settings: {b: {}}, models: [ashem, ashem]}", "models has ashem twice"),
        ("a: {seeds: 1, search: [1.0], settings: {}, models: [ashem]}", "a: settings: "),
    ],
)
def test_damaged_suites_are_refused_in_a_sentence(text, sentence, tmp_path, monkeypatch):
    (tmp_path / "suites.yaml").write_text(text)
    monkeypatch.setattr(graph, "__file__", str(tmp_path / "graph.py"))
    with pytest.raises(StageError, match=sentence) as error:
        load_suites()
    assert "\n" not in str(error.value)


def test_settings_that_reach_into_values_are_no_keys():
    for key in ("seed.x", "data.path.x", "ashem", "nonsense.y.z"):
        if key != "ashem":
            with pytest.raises(StageError, match="is no key of params"):
                changed(VALUES, {key: 1})


@pytest.mark.parametrize("damage", [[], {"a": []}, {"a": {"m": {"x": {}}}}, {"a": {"m": {"0": {"metrics": {}}}}}, "{"])
def test_damaged_records_are_named_and_left_alone(damage, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "metrics/evidence/core.json"
    file.parent.mkdir(parents=True)
    file.write_text(damage if isinstance(damage, str) else json.dumps(damage))
    before = file.read_bytes()
    with pytest.raises(ArtifactError, match=r"evidence/core\.json.* git checkout"):
        results("core")
    assert file.read_bytes() == before


def test_later_seeds_wait_for_the_first_and_killed_stages_are_named(tmp_path, monkeypatch):
    clone = Clone.of_this_tree(tmp_path)
    monkeypatch.chdir(clone.folder)
    suite = graph.Suite(seeds=2, search=[1.0], settings={"tiny": {}}, models=["shallow_continued"])
    monkeypatch.setattr(run, "load_suites", lambda: {"small": suite})
    script, started, execute = clone.folder / "killed.py", [], run.execute
    script.write_text("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    monkeypatch.setattr(run, "pipeline_entry", lambda stage: {"cmd": f"python {script}"})
    monkeypatch.setattr(run, "execute", lambda task: started.append(task.stage) or execute(task))
    with pytest.raises(StageError, match="1 stages failed, the first: tokenize: was killed by SIGKILL"):
        run.main(["--suite", "small", "--workers", "1"])
    assert started == ["tokenize"]  # nothing of seed 1, whose rates the first one finds


def test_a_suite_whose_text_is_missing_says_so():
    with pytest.raises(StageError, match=r"data\.path nowhere is missing"):
        graph.text_digest(json.dumps(graph.text_keys(VALUES["data"] | {"source": "text", "path": "nowhere"})))
