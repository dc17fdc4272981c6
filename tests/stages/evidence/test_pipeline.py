"""The evidence pipeline: its dvc.yaml, and its baselines on tiny data."""

from __future__ import annotations

import ast
import importlib
import json
import os
import re
from pathlib import Path

import pytest
import yaml

from lego.base.artifacts import read_json
from lego.base.harness import StageError
from lego.base.params import load_params
from lego.base.scratch import fingerprint, pipeline_entry
from lego.evaluation.metrics import MODEL_KEYS
from lego.model.checkpoint import load_model
from lego.model.cost import Ledger
from stages.evidence import current
from stages.evidence.gather import numbers, table
from stages.evidence.records import Record
from tests.conftest import ROOT, Clone, run_in_process
from tests.stages.conftest import ORDER, SECTIONS, code_deps, code_lines, is_property, keys_behind, names, outs

ENTRIES = yaml.safe_load((ROOT / "stages/evidence/dvc.yaml").read_text())["stages"]
SCRIPTS = {"joint": "evidence/train_joint", "block2": "evidence/train_block2", "report": "evidence/report"}
RUN_HERE = {
    "joint": ["deep_supervision", "shallow_wide", "grow_late_exits", "grow_copy"],
    "block2": ["frozen_all", "random", "reducible_loss", "expected_gain", "unfrozen_end", "leaky_validation"],
}


def entry_of(group: str) -> dict:
    return ENTRIES[group].get("do", ENTRIES[group])


@pytest.mark.parametrize("group", SCRIPTS)
def test_deps_equal_the_transitive_imports(group):
    assert code_deps(entry_of(group)) == code_lines(SCRIPTS[group])
    assert entry_of(group)["wdir"] == "../.."


@pytest.mark.parametrize("group", ["joint", "block2"])
def test_every_file_a_baseline_reads_or_writes_is_declared(group):
    source = (ROOT / "stages" / f"{SCRIPTS[group]}.py").read_text()
    mentioned = {path.replace("{name}", "${key}") for path in re.findall(r'f?"((?:data|metrics)/[\w./{}]+)"', source)}
    entry = entry_of(group)
    written = set(names(entry["outs"]))
    read = {dep for dep in entry["deps"] if dep.startswith(("data/", "metrics/"))}
    assert written <= mentioned
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
            mine = set(names(pipeline_entry(f"{group}@{name}")["outs"]))
            assert not mine & known
            known |= mine


@pytest.fixture(scope="module")
def ran(tmp_path_factory) -> Path:
    """The root pipeline and some baselines of each kind, with tiny parameters; all route at the threshold of mining."""
    clone = Clone.of_this_tree(tmp_path_factory.mktemp("evidence"))
    params = (clone.folder / "params.yaml").read_text()
    for key, value in (("criterion", "max_prob"), ("hard_ratio", "null")):
        params, count = re.subn(rf"(?m)^(  {key}: )\S+", rf"\g<1>{value}", params)
        assert count == 1, key
    (clone.folder / "params.yaml").write_text(params)
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


def columns(file: Path) -> dict[str, list]:
    text = file.read_text()
    return table(text, *text.splitlines()[0].split(","))


def test_every_model_reports_the_same_keys_and_keeps_its_budget(ran):
    tables = [
        file for file in sorted((ran / "metrics/details").glob("*.json")) if file.stem not in ("criteria", "stages")
    ]
    assert len(tables) == 2 + sum(map(len, RUN_HERE.values()))
    for file in tables:
        metrics = read_json(file)
        assert set(metrics) == set(MODEL_KEYS), file
        assert abs(metrics["distance_from_budget"]) <= 0.02, file
        assert metrics["leaky"] == (file.stem == "leaky_validation")


def test_the_two_budgets_are_kept_apart(ran):
    phase1 = read_json(ran / "data/facts/train_phase1.json")["train_macs"]
    added = read_json(ran / "data/facts/added_macs.json")["added_macs"]
    for name in ("deep_supervision", "shallow_wide", "grow_late_exits"):
        metrics = read_json(ran / f"metrics/details/{name}.json")
        assert metrics["budget_macs"] == phase1 + added
        assert metrics["train_macs"] == pytest.approx(phase1 + added, rel=0.02)
        assert metrics["added_macs"] is None
    for name in ("grow_copy", *RUN_HERE["block2"]):
        metrics = read_json(ran / f"metrics/details/{name}.json")
        assert metrics["budget_macs"] == added
        assert metrics["added_macs"] == metrics["train_macs"] - phase1 == pytest.approx(added, rel=0.02)


def test_selections_leave_block_1_as_it_was_and_the_historical_protocol_does_not(ran):
    ashem = read_json(ran / "metrics/details/ashem.json")
    for name in ("frozen_all", "random", "reducible_loss", "expected_gain"):
        metrics = read_json(ran / f"metrics/details/{name}.json")
        assert metrics["shallow_ppl"] == pytest.approx(ashem["shallow_ppl"], rel=1e-6)
        assert metrics["shallow_ratio"] == ashem["shallow_ratio"]
    unfrozen = read_json(ran / "metrics/details/unfrozen_end.json")
    assert unfrozen["hard_ppl_before"] == pytest.approx(ashem["hard_ppl_before"], rel=1e-6)  # the same tokens
    spent = columns(ran / "metrics/curves/unfrozen_end.csv")["macs"]
    assert 0.05 < (spent[-1] - spent[-2]) / unfrozen["budget_macs"] < 0.12  # the end, less the pass for its threshold
    leaky = read_json(ran / "metrics/details/leaky_validation.json")
    assert leaky["shallow_ppl"] != pytest.approx(ashem["shallow_ppl"], rel=1e-3)
    claimed = leaky["val_hard_ppl_after"] / leaky["val_hard_ppl_before"]
    true = leaky["hard_ppl_after"] / leaky["hard_ppl_before"]
    assert claimed < 0.6 * true  # it was trained on the tokens it is scored on
    shares = {name: read_json(ran / f"metrics/details/{name}.json")["hard_share"] for name in RUN_HERE["block2"]}
    assert shares["frozen_all"] == 1.0
    assert shares["random"] == shares["reducible_loss"] == ashem["hard_share"]


def test_losses_by_document_add_up_to_the_perplexity(ran):
    for name in ("ashem", "shallow_continued", "deep_supervision", "random", "leaky_validation"):
        place = "data" if name in ("ashem", "shallow_continued") else "metrics"
        rows = columns(ran / f"{place}/documents/{name}.csv")
        metrics = read_json(ran / f"metrics/details/{name}.json")
        tokens = sum(rows["tokens"])
        assert tokens == read_json(ran / "data/facts/tokenize.json")["test_tokens"]
        assert 2.718281828 ** (sum(rows["nll"]) / tokens) == pytest.approx(metrics["ppl"], rel=1e-4)
        after = 2.718281828 ** (sum(rows["nll_hard"]) / sum(rows["hard_tokens"]))
        assert after == pytest.approx(metrics["hard_ppl_after"], rel=1e-4)


def test_the_curve_ends_at_what_training_cost(ran):
    for name in ("deep_supervision", "grow_late_exits", "grow_copy", "random", "expected_gain", "unfrozen_end"):
        macs = columns(ran / f"metrics/curves/{name}.csv")["macs"]
        assert macs == sorted(macs)
        assert macs[-1] == pytest.approx(read_json(ran / f"metrics/details/{name}.json")["train_macs"], rel=1e-6)


def test_a_model_that_grows_late_was_shallow_for_most_of_its_budget(ran):
    rows = columns(ran / "metrics/curves/grow_late_exits.csv")
    assert rows["epoch"] == list(range(1, len(rows["epoch"]) + 1))
    assert rows["tokens"] == sorted(rows["tokens"])
    slopes = [macs / tokens for macs, tokens in zip(rows["macs"], rows["tokens"], strict=True)]
    ledger = Ledger.of(load_model(ran / "data/phase1"), 32)
    shallow = [
        spent for spent, slope in zip(rows["macs"], slopes, strict=True) if slope == pytest.approx(3 * ledger.full)
    ]
    assert shallow[-1] / rows["macs"][-1] == pytest.approx(0.8, abs=0.05)
    grown = load_model(ran / "data/baseline/grow_late_exits")
    assert (grown.num_layers, grown.exit_layer) == (load_model(ran / "data/phase2").num_layers, 2)


def test_unknown_baselines_and_given_models_are_refused_in_one_sentence(ran, monkeypatch):
    monkeypatch.chdir(ran)
    for group in ("joint", "block2"):
        module = importlib.import_module(f"stages.{SCRIPTS[group].replace('/', '.')}")
        for name in ("", "nonsense", "../x"):
            with pytest.raises(StageError, match=rf"baselines\.{group} must have"):
                module.main(name)
    phase1 = Path("data/facts/train_phase1.json")
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


def test_a_record_holds_what_the_report_reads(ran):
    said = "validation perplexity by learning rate: 0.004: 40.500, 0.008: inf; taken: 0.004, the end of what was tried"
    first = {"setting": "tiny", "seed": 0, "revision": "x", "changes": {}, "made_of": {}}
    for model, stage in (("ashem", "evaluate_routing"), ("random", "block2@random"), ("grow_copy", "joint@grow_copy")):
        found = numbers(model, stage, 0, lambda path: (ran / path).read_text(), {"train_phase2": said})
        Record.model_validate(first | {"model": model} | found)
        assert len(found["documents"]["nll"]) == len(found["documents"]["tokens"]) > 1
        assert found["curve"]["macs"] == sorted(found["curve"]["macs"])
        assert found["tried"] == ({"0.004": 40.5, "0.008": None} if model == "ashem" else {})
        later = numbers(model, stage, 1, lambda path: (ran / path).read_text(), {})
        assert later == {key: value for key, value in found.items() if key not in ("curve", "tried")}
    own = numbers("ashem", "evaluate_routing", 0, lambda path: (ran / path).read_text(), {})
    assert {"phase1", "phase1_curve", "shallow_documents", "criteria", "sweep"} <= own.keys()


def test_a_text_that_is_missing_is_named_and_one_that_is_here_is_known_by_its_content():
    with pytest.raises(StageError, match=r"data\.path nowhere is missing"):
        current.text_of("text", "nowhere")
    assert current.text_of("hub", "") == {}
    assert re.fullmatch("[0-9a-f]{8}", current.text_of("text", str(ROOT / "text"))["text"])
