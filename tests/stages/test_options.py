"""The pipeline with a block 2 that begins below the exit, a gate, Muon, and states that are made anew."""

from __future__ import annotations

import math
import re
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import lego.hf  # noqa: F401 - registers the classes
from lego.base.artifacts import read_json
from lego.base.harness import StageError, exit_cleanly
from lego.base.params import load_params
from lego.mining.hidden_states import HiddenStateStore
from lego.model.checkpoint import load_model, load_routed
from lego.model.cost import Ledger
from lego.routing.decoder import RoutedDecoder
from stages import collect_hard, train_phase2
from stages.evidence import train_block2
from tests.conftest import Clone, logits_close, run_in_process
from tests.stages.conftest import ORDER

CHANGES = {
    "branch_layer": "1",
    "branch": "lora",
    "branch_rank": "4",
    "phase2_layers": "3",
    "gate": "fitted",
    "optimizer": "muon",
    "schedule": "wsd",
    "states": "online",
    "phase1_lr": "1.0e-02",
    "phase2_lr": "1.0e-02",
    "hard_ratio": "0.7",
}


def with_params(folder: Path, changes: dict[str, str]) -> None:
    text = (folder / "params.yaml").read_text()
    for key, value in changes.items():
        text, count = re.subn(rf"(?m)^(  {key}: )\S+", rf"\g<1>{value}", text)
        assert count == 1, key
    (folder / "params.yaml").write_text(text)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = Clone.of_this_tree(tmp_path_factory.mktemp("clone")).folder
    with_params(folder, CHANGES)
    run_in_process(folder, ORDER)
    return folder


def test_block_2_begins_below_the_exit_and_learned_something(run):
    model = load_model(run / "data/phase2")
    assert (model.exit_layer, model.branch_layer, model.num_layers) == (2, 1, 4)
    facts = read_json(run / "data/facts/train_phase2.json")
    assert facts["block1_unchanged"] is True
    metrics = read_json(run / "metrics/details/ashem.json")
    assert metrics["hard_ppl_after"] < metrics["hard_ppl_before"]


def test_the_store_holds_no_states_and_phase_2_pays_for_making_them(run):
    store = HiddenStateStore(run / "data/hard")
    assert store.online
    assert store.manifest["layer"] == 1
    assert "exit_states" not in store.read_shard(0)
    ledger, facts = Ledger.of(load_model(run / "data/phase2"), 32), read_json(run / "data/facts/added_macs.json")
    seen = read_json(run / "data/facts/train_phase2.json")["hard_tokens_seen"]
    least = ledger.train_block2(seen, head_trains=True, tokens=seen)  # blocks hold more tokens than hard ones
    assert facts["train_phase2_macs"] > least


def test_kept_keys_and_values_teach_the_same_for_less(run, tmp_path):
    """The model of states made anew, without block 1's passes in phase 2."""
    folder = tmp_path / "kept"
    shutil.copytree(run, folder, ignore=shutil.ignore_patterns(".git", "lego", "stages"))
    with_params(folder, {"states": "keys_values", "store_dtype": "float32"})
    run_in_process(folder, ["collect_hard", "train_phase2"])
    store = HiddenStateStore(folder / "data/hard")
    assert (store.kept, store.online, store.manifest["layer"]) == (True, False, 1)
    assert store.read_shard(0)["exit_states"].shape[-1] == 2 * 32 + 2 * 32
    facts = [read_json(place / "data/facts/train_phase2.json") for place in (run, folder)]
    assert facts[1]["val_ppl"] == pytest.approx(facts[0]["val_ppl"], rel=1e-4)
    assert [one["hard_tokens_seen"] for one in facts] == [facts[0]["hard_tokens_seen"]] * 2
    costs = [read_json(place / "data/facts/added_macs.json")["train_phase2_macs"] for place in (run, folder)]
    ledger = Ledger.of(load_model(run / "data/phase2"), 32)
    tokens, rest = divmod(costs[0] - costs[1], ledger.block1)  # which ran once over each block that was read
    assert (rest, tokens % 32) == (0, 0)
    assert tokens >= facts[0]["hard_tokens_seen"]


def test_the_gate_is_in_every_number_and_in_the_folder(run):
    criteria = read_json(run / "metrics/details/criteria.json")
    gate, metrics = criteria["gate"], read_json(run / "metrics/details/ashem.json")
    assert gate["mixed_ppl"] < min(gate["shallow_ppl"], gate["deep_ppl"])
    assert metrics["deep_ppl"] < 1.01 * min(metrics["ppl"], metrics["shallow_ppl"])  # more depth is not worse
    routed = load_routed(run / "data/routed")
    x = torch.arange(64).view(2, 32) * 4 % 300
    theirs = AutoModelForCausalLM.from_pretrained(run / "data/routed")(x)
    ours = RoutedDecoder(routed.model, routed.threshold, 2, routed.criterion, routed.gate).read(x)
    logits_close(theirs.logits.flatten(0, 1), ours.logits)
    assert torch.equal(theirs.went_deep.flatten(), ours.deep)
    logits_close(
        ours.logits[ours.deep].exp().sum(-1), torch.ones(int(ours.deep.sum()))
    )  # a mixture's log-probabilities


def test_a_baseline_selects_by_exit_states_and_has_a_gate_of_its_own(run, monkeypatch):
    monkeypatch.chdir(run)
    plain = {}
    for name in ("high_loss", "expected_gain"):
        train_block2.main(name)
        metrics = read_json(f"metrics/details/{name}.json")
        assert metrics["distance_from_budget"] == pytest.approx(0, abs=0.1)  # a budget of few steps
        plain[name] = metrics["deep_ppl"]
    assert all(math.isfinite(value) for value in plain.values())


def test_the_historical_protocol_needs_new_layers(run, monkeypatch):
    monkeypatch.chdir(run)
    before = (run / "params.yaml").read_text()
    with_params(run, {"phase2_layers": "2"})
    try:
        with pytest.raises(StageError, match="leaky_validation puts new layers on block 1, and there are none"):
            train_block2.main("leaky_validation")
    finally:
        (run / "params.yaml").write_text(before)


def test_the_historical_protocol_knows_no_branch(run, monkeypatch):
    """Of the default branch and of low rank, which block 2 has in this run."""
    monkeypatch.chdir(run)
    train_block2.main("leaky_validation")
    assert Clone(run).json("metrics/details/leaky_validation.json")["leaky"] is True


@pytest.mark.parametrize(
    ("changes", "stage", "sentence"),
    [
        (
            {"branch_layer": "3"},
            collect_hard,
            "ashem.branch_layer must be in -2..2 for block 1's 2 layers, got 3",
        ),
        ({"branch_layer": "null"}, collect_hard, "branch lora needs a branch_layer"),
        (
            {"branch_layer": "null", "branch": "full", "states": "keys_values"},
            collect_hard,
            "states keys_values needs a branch_layer",
        ),
        ({"branch_rank": "64"}, train_phase2, "ashem.branch_rank must be less than block 1's width"),
        ({"branch_layer": "2"}, collect_hard, "ashem.branch_layer 2 repeats no layer, and ashem.branch lora needs one"),
        ({"branch_layer": "-3"}, collect_hard, "ashem.branch_layer must be in -2..2 for block 1's 2 layers, got -3"),
        (
            {"branch_layer": "null", "branch": "full", "phase2_layers": "2"},
            collect_hard,
            "must be greater than phase1_layers = 2, got 2",
        ),
        (
            {"phase2_context": "token", "states": "stored"},
            collect_hard,
            "branch_layer needs phase2_context sequence",
        ),
        (
            {"branch_layer": "null", "branch": "full", "phase2_context": "token"},
            collect_hard,
            "states online needs phase2_context sequence",
        ),
        (
            {"branch_layer": "0"},
            train_phase2,
            "data/hard: holds states of another layer than ashem.branch_layer",
        ),
    ],
)
def test_what_does_not_go_together_is_one_sentence(run, monkeypatch, capsys, changes, stage, sentence):
    monkeypatch.chdir(run)
    before = (run / "params.yaml").read_text()
    with_params(run, changes)
    try:
        with pytest.raises(SystemExit):
            exit_cleanly(stage.main)
    finally:
        (run / "params.yaml").write_text(before)
    assert sentence in capsys.readouterr().err
    assert load_params().ashem.branch_layer == 1
