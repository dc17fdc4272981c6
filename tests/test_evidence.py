"""The evidence pipeline: its dvc.yaml, its baselines on tiny data, and the runner that reuses what is current."""

from __future__ import annotations

import ast
import copy
import importlib
import json
import os
import re
from pathlib import Path

import pytest
import yaml
from clones import Clone, run_in_process
from conftest import ROOT
from test_pipeline import ORDER, SECTIONS, is_property, keys_behind, names, outs, transitive_imports

from lego.artifacts import ArtifactError, read_json
from lego.evaluation import MODEL_KEYS
from lego.harness import StageError
from lego.params import Params, load_params
from lego.scratch import fingerprint, pipeline_entry
from stages.evidence import graph, run
from stages.evidence.graph import changed, load_suites, stage_of, task_of
from stages.evidence.records import Records, results

ENTRIES = yaml.safe_load((ROOT / "stages/evidence/dvc.yaml").read_text())["stages"]
SCRIPTS = {"joint": "evidence/train_joint", "block2": "evidence/train_block2", "report": "evidence/report"}
VALUES = yaml.safe_load((ROOT / "params.yaml").read_text())
RUN_HERE = {
    "joint": ["deep_supervision", "shallow_wide", "grow_copy"],
    "block2": ["frozen_all", "random", "reducible_loss", "expected_gain", "unfrozen_end", "leaky_validation"],
}


def entry_of(group: str) -> dict:
    return ENTRIES[group].get("do", ENTRIES[group])


@pytest.mark.parametrize("group", SCRIPTS)
def test_deps_equal_the_transitive_imports(group):
    code = {dep for dep in entry_of(group)["deps"] if dep.endswith(".py")}
    assert code == transitive_imports(SCRIPTS[group])
    assert entry_of(group)["wdir"] == "../.."


@pytest.mark.parametrize("group", ["joint", "block2"])
def test_every_file_a_baseline_reads_or_writes_is_declared(group):
    source = (ROOT / "stages" / f"{SCRIPTS[group]}.py").read_text()
    mentioned = {path.replace("{name}", "${key}") for path in re.findall(r'f?"((?:data|metrics)/[\w./{}]+)"', source)}
    entry = entry_of(group)
    written = {name for kind in ("outs", "metrics", "plots") for name in names(entry[kind])}
    read = {dep for dep in entry["deps"] if dep.startswith(("data/", "metrics/"))}
    assert written - {"metrics/timing/${key}.json"} <= mentioned
    for path in mentioned:
        assert any(path == known or path.startswith(known + "/") for known in read | written), path


@pytest.mark.parametrize("group", ["joint", "block2"])
def test_declared_params_are_those_that_are_read(group):
    """Of the sections that are passed on whole, all; of the others each key that the script names."""
    source = (ROOT / "stages" / f"{SCRIPTS[group]}.py").read_text()
    attributes = [ast.unparse(node) for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Attribute)]
    named = {found[1] for text in attributes if (found := re.search(r"\bashem\.(\w+)$", text))}
    behind = {name for name in named if is_property("ashem", name)}
    behind |= {"grown"} if "grown(one.ashem" in source else set()
    keys = {f"ashem.{name}" for name in named & SECTIONS["ashem"]}.union(*(keys_behind("ashem", n) for n in behind))
    read = {key.removeprefix("ashem.") for key in keys}
    declared = {key.removeprefix("ashem.") for key in entry_of(group)["params"] if key.startswith("ashem.")}
    assert read == declared
    assert f"baselines.{group}.${{key}}" in entry_of(group)["params"]
    assert not any(key == "baselines" for key in entry_of(group)["params"])  # a change to one reruns that one alone


def test_a_baselines_files_are_nobody_elses():
    params = load_params(ROOT / "params.yaml")
    known = {out for stage in ORDER for out in outs(stage)}
    for group in ("joint", "block2"):
        for name in getattr(params.baselines, group):
            mine = set(graph.written(pipeline_entry(f"{group}@{name}")))
            assert not mine & known
            known |= mine


@pytest.fixture(scope="module")
def ran(tmp_path_factory) -> Path:
    """The root pipeline and some baselines of each kind, with tiny parameters."""
    clone = Clone.of_this_tree(tmp_path_factory.mktemp("evidence"))
    run_in_process(clone.folder, ORDER)
    here = os.getcwd()
    os.chdir(clone.folder)
    try:
        for group, models in RUN_HERE.items():
            for name in models:
                importlib.import_module(f"stages.{SCRIPTS[group].replace('/', '.')}").main(name)
    finally:
        os.chdir(here)
    return clone.folder


def test_every_model_reports_the_same_keys_and_keeps_its_budget(ran):
    for file in [ran / "metrics/evaluate_routing.json", *sorted((ran / "metrics/baseline").glob("*.json"))]:
        metrics = read_json(file)
        assert set(metrics) == set(MODEL_KEYS), file
        assert abs(metrics["distance_from_budget"]) <= 0.02, file
        assert metrics["leaky"] == (file.stem == "leaky_validation")


def test_the_two_budgets_are_kept_apart(ran):
    phase1 = read_json(ran / "metrics/train_phase1.json")["train_macs"]
    added = read_json(ran / "metrics/added_macs.json")["added_macs"]
    for name in ("deep_supervision", "shallow_wide"):
        metrics = read_json(ran / f"metrics/baseline/{name}.json")
        assert metrics["budget_macs"] == phase1 + added
        assert metrics["train_macs"] == pytest.approx(phase1 + added, rel=0.02)
        assert metrics["added_macs"] is None
    for name in ("grow_copy", *RUN_HERE["block2"]):
        metrics = read_json(ran / f"metrics/baseline/{name}.json")
        assert metrics["budget_macs"] == added
        assert metrics["added_macs"] == metrics["train_macs"] - phase1 == pytest.approx(added, rel=0.02)


def test_selections_leave_block_1_as_it_was_and_the_historical_protocol_does_not(ran):
    ashem = read_json(ran / "metrics/evaluate_routing.json")
    for name in ("frozen_all", "random", "reducible_loss", "expected_gain"):
        metrics = read_json(ran / f"metrics/baseline/{name}.json")
        assert metrics["shallow_ppl"] == pytest.approx(ashem["shallow_ppl"], rel=1e-6)
        assert metrics["shallow_ratio"] == ashem["shallow_ratio"]
    unfrozen = read_json(ran / "metrics/baseline/unfrozen_end.json")
    assert unfrozen["hard_ppl_before"] == pytest.approx(ashem["hard_ppl_before"], rel=1e-6)  # the same tokens
    spent = run.table(ran / "metrics/curves/unfrozen_end.csv")["macs"]
    assert 0.05 < (spent[-1] - spent[-2]) / unfrozen["budget_macs"] < 0.12  # the end, less the pass for its threshold
    leaky = read_json(ran / "metrics/baseline/leaky_validation.json")
    assert leaky["shallow_ppl"] != pytest.approx(ashem["shallow_ppl"], rel=1e-3)
    claimed = leaky["val_hard_ppl_after"] / leaky["val_hard_ppl_before"]
    true = leaky["hard_ppl_after"] / leaky["hard_ppl_before"]
    assert claimed < 0.6 * true  # it was trained on the tokens it is scored on
    shares = {name: read_json(ran / f"metrics/baseline/{name}.json")["hard_share"] for name in RUN_HERE["block2"]}
    assert shares["frozen_all"] == 1.0
    assert shares["random"] == shares["reducible_loss"] == ashem["hard_share"]


def test_losses_by_document_add_up_to_the_perplexity(ran):
    for name in ("ashem", "shallow_continued", "deep_supervision", "random", "leaky_validation"):
        rows = run.table(ran / f"metrics/documents/{name}.csv")
        file = "evaluate_routing" if name == "ashem" else f"baseline/{name}"
        metrics = read_json(ran / f"metrics/{file}.json")
        tokens = sum(rows["tokens"])
        assert tokens == read_json(ran / "metrics/tokenize.json")["test_tokens"]
        assert 2.718281828 ** (sum(rows["nll"]) / tokens) == pytest.approx(metrics["ppl"], rel=1e-4)
        after = 2.718281828 ** (sum(rows["nll_hard"]) / sum(rows["hard_tokens"]))
        if name in ("shallow_continued", "random"):  # all of block 1's hard tokens go deep
            assert after == pytest.approx(metrics["hard_ppl_after"], rel=1e-4)


def test_the_curve_ends_at_what_training_cost(ran):
    for name in ("deep_supervision", "grow_copy", "random", "expected_gain", "unfrozen_end"):
        macs = run.table(ran / f"metrics/curves/{name}.csv")["macs"]
        assert macs == sorted(macs)
        assert macs[-1] == pytest.approx(read_json(ran / f"metrics/baseline/{name}.json")["train_macs"], rel=1e-6)


def test_unknown_baselines_and_given_models_are_refused_in_one_sentence(ran, monkeypatch):
    monkeypatch.chdir(ran)
    for group in ("joint", "block2"):
        module = importlib.import_module(f"stages.{SCRIPTS[group].replace('/', '.')}")
        for name in ("", "nonsense", "../x"):
            with pytest.raises(StageError, match=rf"baselines\.{group} must have"):
                module.main(name)
    phase1 = Path("metrics/train_phase1.json")
    before = phase1.read_text()
    phase1.write_text(json.dumps(read_json(phase1) | {"train_macs": 0}))
    try:
        with pytest.raises(StageError, match="block 1 was given"):
            importlib.import_module("stages.evidence.train_joint").main("dense")
    finally:
        phase1.write_text(before)


def test_the_fingerprint_of_a_baseline_is_found_by_its_name(ran, monkeypatch):
    monkeypatch.chdir(ran)
    assert fingerprint("joint@dense") != fingerprint("joint@static_mid")


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


def test_code_counts_by_what_it_does(tmp_path, monkeypatch):
    monkeypatch.setattr(graph, "ROOT", tmp_path)
    texts = {
        "a": '"""Doc."""\nx = 1  # why\n\n\ndef f():\n    """Doc."""\n    return x\n',
        "b": "x = 1\ndef f():\n    return x\n",
        "c": "x = 2\ndef f():\n    return x\n",
    }
    for name, text in texts.items():
        (tmp_path / f"{name}.py").write_text(text)
    assert graph.code_digest("a.py") == graph.code_digest("b.py") != graph.code_digest("c.py")


def test_the_runner_makes_what_is_missing_reuses_what_is_current_and_goes_on_after_a_failure(
    tmp_path, monkeypatch, capsys
):
    clone = Clone.of_this_tree(tmp_path)
    monkeypatch.chdir(clone.folder)
    suite = graph.Suite(seeds=1, search=[1.0], settings={"tiny": {}}, models=["block1"])
    monkeypatch.setattr(run, "load_suites", lambda: {"small": suite, "other": suite})
    monkeypatch.setitem(graph.PIPELINE_MODELS, "block1", "train_phase1")  # the shortest way to a model
    monkeypatch.setattr(run, "record", lambda one: made(run.STORE / one.task.label / "metrics/train_phase1.json"))
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
    run.drop_stale("small", suite)
    assert "small: 1 models of other parameters, code or text are dropped" in capsys.readouterr().out
    assert read_json("metrics/evidence/small.json") == {"tiny": {"block1": {}}}


def test_a_record_holds_what_the_report_reads(ran, tmp_path, monkeypatch):
    monkeypatch.setattr(graph, "text_digest", lambda data: "text")
    monkeypatch.setattr(run, "STORE", tmp_path)
    records = {}
    for model, stage in graph.PIPELINE_MODELS.items():
        task = task_of(stage, VALUES, {})
        for one in task.ancestors():
            (tmp_path / one.label).unlink(missing_ok=True)
            (tmp_path / one.label).symlink_to(ran)
        found = run.record(run.Wanted("small", "tiny", model, 0, task))
        assert len(found["documents"]["nll"]) == len(found["documents"]["tokens"]) > 1
        assert found["curve"]["macs"] == sorted(found["curve"]["macs"])
        records[model] = {"0": {"fingerprint": task.fingerprint, "revision": "x"} | found}
    Records.model_validate({"tiny": records})
    assert {"phase1", "phase1_curve", "shallow_documents", "criteria", "sweep"} <= records["ashem"]["0"].keys()


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
    found = run.factors_found({"x": records}, "x", models, params.model_dump())
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
