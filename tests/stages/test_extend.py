"""A given Llama through the whole pipeline: from its folder to data/routed, which answers easy tokens as it did."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import lego.hf  # noqa: F401 - registers the classes
from lego.base.artifacts import ArtifactError, read_json
from lego.base.harness import exit_cleanly
from lego.evaluation.routed import load_table
from lego.model.checkpoint import load_routed
from stages import evaluate_routing
from tests.conftest import Clone, run_in_process, train_llama
from tests.routing.test_gated import gate_of
from tests.stages.conftest import ORDER


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A finished run whose block 1 is a Llama that transformers trained; risk decides what leaves."""
    folder = Clone.of_this_tree(tmp_path_factory.mktemp("clone")).folder
    train_llama(folder / "llama")
    params = (folder / "params.yaml").read_text()
    for key, value in {
        "init_from": "llama",
        "branch_layer": "null",
        "phase2_layers": "4",
        "gate": "none",  # which would need the head that a probe spares
        "phase1_epochs": "0",
        "phase2_share": "0.9",
        "init_new_layers": "zero",  # so little text does not make up for copies that begin worse than their model,
        "head": "shared",  # nor for a head to learn
        "criterion": "probe",
        "calibration": "risk",
        "epsilon": "0.2",
        "max_calibration_tokens": "24000",
        "fit_share": "0.3",
        "otherwise": "always_deep",
    }.items():
        params, count = re.subn(rf"(?m)^(  {key}: )\S+", rf"\g<1>{value}", params)
        assert count == 1, key
    (folder / "params.yaml").write_text(params)
    run_in_process(folder, ORDER)
    return folder


def test_nothing_of_the_given_model_was_trained(run):
    phase1, phase2 = (read_json(run / f"data/facts/train_phase{n}.json") for n in (1, 2))
    assert (phase1["train_tokens"], phase1["train_macs"], phase1["phase1_converged"]) == (0, 0, None)
    assert phase2["block1_unchanged"] is True
    assert phase2["best_epoch"] > 0  # hard tokens taught block 2 something
    assert load_routed(run / "data/routed").model.num_layers == 5  # 3 given, phase2_layers - phase1_layers on top


@torch.no_grad()
def test_easy_tokens_keep_the_given_models_answers(run):
    tokenizer = AutoTokenizer.from_pretrained(run / "data/routed")
    llama, routed = (AutoModelForCausalLM.from_pretrained(run / folder) for folder in ("llama", "data/routed"))
    x = torch.tensor(tokenizer((run / "lego/model/cost.py").read_text())["input_ids"])[:480].view(15, 32)
    routed.config.exit_threshold = routed(x).exit_scores.median().item()
    answer, original = routed(x), llama(x).logits
    easy = ~answer.went_deep
    assert 0.4 < easy.float().mean() < 0.6
    assert torch.equal(answer.logits[easy], original[easy])
    routed.config.exit_threshold = 0.0
    assert torch.equal(
        routed.generate(x[:2], max_new_tokens=8, do_sample=False),
        llama.generate(x[:2], max_new_tokens=8, do_sample=False),
    )


def test_a_promise_is_of_the_mixtures_where_there_is_a_gate(run, tmp_path, monkeypatch):
    """Routed less always deep, both answered through the gate; one that mixes more than so little text has it learn."""
    folder = tmp_path / "gated"
    shutil.copytree(run, folder, ignore=shutil.ignore_patterns(".git", "lego", "stages", "llama"))
    text = (folder / "params.yaml").read_text()
    (folder / "params.yaml").write_text(text.replace("  gate: none", "  gate: fitted"))
    monkeypatch.setattr(evaluate_routing, "gate_for", lambda *_: (gate_of(), {}))
    run_in_process(folder, ["evaluate_routing"])
    before, risk = (read_json(place / "metrics/details/criteria.json")["risk"] for place in (run, folder))
    table = load_table(folder / "data/evaluation/test.safetensors")
    threshold = read_json(folder / "metrics/details/ashem.json")["threshold"]
    answers = np.where(table.score("probe") >= threshold, table.nll_shallow, table.nll_deep)
    assert risk["realised_increase_nats"] == pytest.approx(float((answers - table.nll_deep).mean()), abs=1e-6)
    assert risk["units"] == before["units"]
    assert risk["smallest_epsilon"] < before["smallest_epsilon"]  # a mixture is nearer to what leaving answers
    assert load_routed(folder / "data/routed").gate is not None


def test_the_promise_stands_beside_what_came_of_it(run):
    report = read_json(run / "metrics/details/criteria.json")
    risk, metrics = report["risk"], read_json(run / "metrics/details/ashem.json")
    assert (risk["epsilon"], risk["delta"]) == (0.2, 0.1)
    assert risk["units"] >= 500
    assert 0 < risk["best_epsilon"] <= risk["smallest_epsilon"]
    assert risk["shallow_ratio"] == metrics["shallow_ratio"]
    assert risk["realised_risk"] >= risk["realised_increase_nats"] - 1e-9
    assert risk["realised_risk"] == pytest.approx(max(0.0, risk["realised_risk"]))
    for name in ("max_prob", "margin", "entropy", "probe", "gain"):
        for split in ("test", "validation"):
            row = report[split][name]
            assert row["oracle_ppl"] <= row["oracle_at_ratio_ppl"] <= row["ppl"]
            assert row["oracle_gap_nats"] >= 0
            assert 0 <= row["gain_auroc"] <= 1
    assert report["test"]["probe"]["threshold"] == metrics["threshold"]  # the one that is shipped
    assert report["test"]["probe"]["ppl"] == metrics["ppl"]
    even = {name: report["test"][name]["break_even_shallow_ratio"] for name in ("probe", "max_prob")}
    assert even["probe"] < even["max_prob"]
    timing = read_json(run / "data/timing/evaluate_routing.json")
    assert all(timing[f"latency_ratio_batch_{size}"] > 0 for size in (1, 8, 32))


def test_the_folder_routes_as_the_metrics_say(run):
    routed = load_routed(run / "data/routed")
    metrics = read_json(run / "metrics/details/ashem.json")
    assert routed.threshold == metrics["threshold"]
    config = read_json(run / "data/routed/config.json")
    assert (config["exit_criterion"], config["exit_layer"], config["num_hidden_layers"]) == ("probe", 3, 5)
    card = (run / "data/routed/README.md").read_text()
    assert f"| ppl | {metrics['ppl']:.4f} |" in card


def test_a_promise_that_cannot_be_kept_stops_unless_told_otherwise(run, tmp_path, monkeypatch, capsys):
    for name in ("data", "metrics", "params.yaml"):
        (shutil.copytree if (run / name).is_dir() else shutil.copy)(run / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    text = Path("params.yaml").read_text().replace("epsilon: 0.2", "epsilon: 0.0001")
    Path("params.yaml").write_text(text.replace("otherwise: always_deep", "otherwise: stop"))
    with pytest.raises(SystemExit):
        exit_cleanly(evaluate_routing.main)
    error = r"error: params\.yaml: routing\.epsilon 0\.0001 cannot be certified with probe on 5\d\d units at routing\."
    assert re.search(error + r"delta 0\.1, the smallest here is 0\.\d+; raise it, or", capsys.readouterr().err)
    assert read_json("metrics/details/ashem.json") == read_json(run / "metrics/details/ashem.json")
    Path("params.yaml").write_text(text)
    evaluate_routing.main()
    assert "it cannot be kept: always deep" in capsys.readouterr().out
    metrics = read_json("metrics/details/ashem.json")
    assert (metrics["shallow_ratio"], metrics["ppl"]) == (0.0, metrics["deep_ppl"])
    assert load_routed("data/routed").threshold > 1


def test_where_the_given_model_stops_stays_with_it(run):
    for name in ("phase1", "phase2"):
        assert read_json(run / f"data/{name}/generation_config.json") == {"eos_token_id": 0, "pad_token_id": 0}


def test_a_folder_without_its_criterion_is_refused(run, tmp_path):
    from lego.base.artifacts import read_tensors, write_tensors

    for file in (run / "data/routed").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "digests.json").unlink()  # the change is meant
    tensors = read_tensors(tmp_path / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if "exit_criterion" not in name}
    write_tensors(tmp_path / "model.safetensors", kept, {"format": "pt"})
    with pytest.raises(ArtifactError, match=r"model\.safetensors: does not fit exit states of width 48"):
        load_routed(tmp_path)
