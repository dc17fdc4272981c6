"""CVFP's pipelines as they run: profiles through the stages; slow: real dvc at test size, bytes, the contest."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from lego.base.artifacts import read_json, sha256, write_json
from lego.cvfp.passes import sequential_pass
from lego.cvfp.phase1 import ContextTrainer
from lego.cvfp.reports import validate
from lego.cvfp.run import first_phase
from lego.cvfp.sections import OWN, PARAMS, ROOT_PARAMS, changed, load, with_profile
from lego.cvfp.store import build
from lego.cvfp.text import SPLITS, Text, digest, stream
from tests.conftest import ROOT, Clone
from tests.conftest import ran as ran_by_dvc
from tests.stages.cvfp.test_pipeline import STAGES

TINY = {
    "data.vocab_size": 300,
    "data.max_tokenizer_bytes": 200_000,
    "data.max_train_tokens": 3000,
    "data.max_validation_tokens": 800,
    "data.max_calibration_tokens": 300,
    "data.max_test_tokens": 800,
    "text.block_length": 32,
    "model.context_dim": 24,
    "model.embed_dim": 16,
    "model.hidden_dim": 40,
    "predict.epochs": 1,
    "predict.streams": 8,
    "checks.rank_tokens": 200,
    "checks.num_trials": 3,
    "checks.passes": 3,
    "threads": 1,
    "contest.seeds": 2,
    "contest.lr_factors": [1.0, 2.0],
    "contest.own": {"sound": 0.01},
    "contest.peers": {"mlp_1": 0.01},
    "contest.scaling.models": {"sound": 2},
    "contest.scaling.shares": [0.5],
    "contest.trials": {"unchanged": {}, "no_steps": {"predict.lr": 1e-9}},
}


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Clone:
    """A clone of this tree with tiny CVFP parameters, whose pipeline has run."""
    clone = Clone.of_this_tree(tmp_path_factory.mktemp("cvfp"))
    file = clone.folder / PARAMS
    values = changed(load(ROOT / PARAMS, ROOT / ROOT_PARAMS), TINY, "tiny").model_dump()
    values["data"] = {key: values["data"][key] for key in OWN}  # the rest stands in the root's file, which is tiny too
    file.write_text(yaml.safe_dump(values, sort_keys=False))
    (clone.folder / "metrics/cvfp").mkdir(parents=True)
    for name in ("contest", "scaling", "trials"):
        (clone.folder / f"metrics/cvfp/{name}.json").write_text("{}\n")
    clone.run("dvc", "init", "-q", "-f")
    clone.output = clone.run("dvc", "repro", "stages/cvfp/dvc.yaml")  # type: ignore[attr-defined]
    return clone


ran = partial(ran_by_dvc, pipeline="stages/cvfp/dvc.yaml")


@pytest.mark.slow
def test_the_pipeline_runs_and_a_second_time_nothing_does(clone):
    assert sorted(ran(clone.output)) == sorted(STAGES)
    assert ran(clone.run("dvc", "repro", "stages/cvfp/dvc.yaml")) == []
    found = clone.json("metrics/cvfp/evaluate.json")
    assert 1 < found["ppl"] < 300
    assert found["validation_is"] == "heldout_in_vocab"
    assert found["updates"] > 0
    validate((clone.folder / "metrics/cvfp/report.txt").read_text())
    page = (clone.folder / "metrics/cvfp/report.html").read_text()
    assert "Not run yet" in page
    assert page.count("<img") == 2
    assert "http" not in page.replace("http://www.w3.org", "")
    assert not (clone.folder / "data/tokens").exists()  # the root's pipeline did not run


@pytest.mark.slow
def test_a_changed_parameter_reruns_what_it_affects(clone):
    file = clone.folder / PARAMS
    before = file.read_text()
    file.write_text(before.replace("  patience: 3", "  patience: 4"))
    would = ran(clone.run("dvc", "repro", "--dry", "stages/cvfp/dvc.yaml"))
    file.write_text(before)
    assert would == ["train_phase2", "report"]  # and evaluate, once phase 2 has another output
    assert "data/cvfp/phase2" in STAGES["evaluate"]["deps"]


def stage(folder: Path, name: str, *arguments: str, fails: bool = False) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", f"stages.cvfp.{name}", *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert (done.returncode != 0) == fails, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.slow
def test_a5_the_same_bytes_twice(clone, monkeypatch):
    before = {name: sha256(clone.folder / f"data/cvfp/{name}") for name in ("tokens", "phase1", "contexts", "phase2")}
    monkeypatch.chdir(clone.folder)
    for name in ("train_phase1", "build_contexts", "train_phase2"):
        importlib.import_module(f"stages.cvfp.{name}").main()
    assert before == {name: sha256(clone.folder / f"data/cvfp/{name}") for name in before}


@pytest.mark.slow
def test_the_command_line_check_and_bad_input(clone, tmp_path):
    timing = clone.folder / "data/timing/cvfp/check_val_convergence.json"
    before = timing.read_bytes()
    said = clone.run("python", "-m", "stages.cvfp.check_val_convergence", "--num-trials", "4")
    assert timing.read_bytes() == before  # by hand: the pipeline's files stay
    assert next(line for line in said.splitlines() if line.startswith("trial")) == "trial 1/4: N/A"
    assert "verdict legacy" in said
    refused = clone.run("python", "-m", "stages.cvfp.check_val_convergence", "--num-trials", "0", fails=True)
    assert "error: --num-trials must be at least 1, got 0" in refused
    (tmp_path / "stages/cvfp").mkdir(parents=True)
    for name in (PARAMS, ROOT_PARAMS):
        (tmp_path / name).write_text((clone.folder / name).read_text())
    missing = stage(tmp_path, "train_phase1", fails=True)
    assert "data/cvfp/tokens/text.json: is missing; run dvc repro stages/cvfp/dvc.yaml" in " ".join(missing.split())
    assert "mend it and run the same command again" in " ".join(missing.split())
    text = (tmp_path / PARAMS).read_text()
    (tmp_path / PARAMS).write_text(text.replace("hidden_dim: 40", "hidden_dim: 41"))
    assert "model.hidden_dim must be context_dim + embed_dim = 40, got 41" in stage(tmp_path, "tokenize", fails=True)


def test_a6_the_legacy_profile_stops_after_one_step_with_contexts_of_before_it():
    params = changed(
        with_profile(load(ROOT / PARAMS, ROOT / ROOT_PARAMS), "legacy_seed3", ROOT / "stages/cvfp/profiles.yaml"),
        {"model.context_dim": 32, "model.embed_dim": 32, "model.hidden_dim": 64},
        "test",
    )
    ids = torch.randint(200, (400,), generator=torch.Generator().manual_seed(0))
    model = build(params.model, params.phase1, 200, 0)
    embeddings = model.embed(ids).detach()
    untrained = sequential_pass(model, embeddings)
    trainer = ContextTrainer(model, embeddings, params.phase1)
    iterations = list(trainer.iterations())
    assert (len(iterations), trainer.updates, iterations[-1].converged) == (2, 1, 399)
    returned = trainer.final(iterations[-1])
    assert returned.weights_version == 0
    assert (returned.values[1:] - untrained[1:]).abs().max() < 1e-4
    text = Text({"train": ids}, 200, torch.ones(200), "heldout_in_vocab")
    done = first_phase(params, text, 0)  # as the stage runs it: network and ranks are those of the returned contexts
    again = sequential_pass(done.model, done.model.embed(ids).detach())
    torch.testing.assert_close(again, sequential_pass(done.untrained, embeddings), rtol=0, atol=0)
    assert (done.updates, done.facts()["converged"], done.facts()["tokens"]) == (1, 399, 400)
    assert done.weights_version == 0


@pytest.mark.slow
def test_the_profiles_of_the_notes_run_through_all_stages(tmp_path, monkeypatch, capsys):
    sizes = {"model.context_dim": 24, "model.embed_dim": 24, "model.hidden_dim": 48, "data.max_train_tokens": 1600}
    small = {key: value for key, value in TINY.items() if key.split(".")[0] in ("data", "text", "checks")}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["stage"])
    (tmp_path / "stages/cvfp").mkdir(parents=True)
    for name in ("contest", "scaling", "trials"):
        write_json(f"metrics/cvfp/{name}.json", {})
    found = {}
    for profile, left_out in (("seed", ()), ("legacy_seed3", ("tokenize", "report"))):
        params = with_profile(load(ROOT / PARAMS, ROOT / ROOT_PARAMS), profile, ROOT / "stages/cvfp/profiles.yaml")
        assert (params.data.max_train_tokens, params.text.validation) == (6400, "val_from_train")
        assert params.model.context_dim == params.model.embed_dim == 768
        values = changed(params, small | sizes, "test").model_dump()
        (tmp_path / PARAMS).write_text(yaml.safe_dump(values, sort_keys=False))
        (tmp_path / ROOT_PARAMS).write_text((ROOT / ROOT_PARAMS).read_text())
        for name in [one for one in STAGES if one not in left_out]:
            importlib.import_module(f"stages.cvfp.{name}").main()
        found[profile] = read_json("metrics/cvfp/evaluate.json")
    for one in found.values():
        assert one["validation_is"] == "val_from_train (train-subset, not generalization)"
        assert one["untrained_converged_when_frozen"] / one["frozen_tokens"] == pytest.approx(1, abs=0.2)
        assert one["is_identity"] is False
    legacy = found["legacy_seed3"]
    assert (found["seed"]["updates"], legacy["updates"]) == (5, 1)
    assert legacy["train_rank"] == pytest.approx(legacy["train_rank_untrained"], rel=1e-6)  # of before the one step
    assert found["seed"]["train_rank"] != pytest.approx(found["seed"]["train_rank_untrained"], rel=1e-3)
    assert "iteration 1: 100/1,569 tokens (6 %)" in capsys.readouterr().out
    assert "train-subset, not generalization" in (tmp_path / "metrics/cvfp/report.md").read_text()


@pytest.mark.slow
def test_b22_no_document_is_in_two_splits(clone):
    """Documents are between end-of-text ids; identical ones are one document."""
    found = {}
    for split in SPLITS:
        ids = stream(clone.folder / "data/cvfp/tokens", split)
        documents = np.split(ids, np.flatnonzero(ids == 0))
        found[split] = {digest(one) for one in documents if len(one) > 20}
    assert all(found.values())
    assert not found["train"] & (found["validation"] | found["test"])
    assert not found["validation"] & found["test"]


@pytest.mark.slow
def test_profiles_are_options_of_dvc(clone):
    options = clone.run("python", "-m", "stages.cvfp.profile", "seed").split()
    assert options[0] == "-S"
    assert 'stages/cvfp/params.yaml:phase1.objective="fixed_point"' in options
    assert "give one of the profiles sound, seed, legacy_seed3" in clone.run(
        "python", "-m", "stages.cvfp.profile", "nothing", fails=True
    )


@pytest.mark.slow
def test_the_contest_runs_goes_on_after_a_kill_and_reaches_the_page(clone):
    scratch = clone.folder / ".scratch/cvfp/baselines/peers@mlp_1"
    clone.run("dvc", "repro", "stages/cvfp/baselines/dvc.yaml")
    found = clone.json("metrics/cvfp/contest.json")
    assert set(found) == {"mlp_1", "sound"}
    for one in found.values():
        assert one["ppl"] == pytest.approx((one["ppl_0"] + one["ppl_1"]) / 2)
        assert one["lr"] in (0.01, 0.02)
        assert one["rate_at_an_end"] is True
    assert not scratch.exists()
    runs = scratch / fingerprint_in(clone, "cvfp/baselines/peers@mlp_1") / "runs"
    runs.mkdir(parents=True)  # as a killed run leaves it: the first rate of the first seed is done
    made = {"val_loss": 0.5, "ppl": 2.0, "bits_per_byte": 1.0, "parameters": 3, "tokens": 4, "seconds": 5.0}
    made |= {"parameters_without_embeddings": 2, "peak_mib": 6.0}
    (runs / "0-0.01.json").write_text(json.dumps(made))
    said = clone.run("python", "-m", "stages.cvfp.baselines.peers", "mlp_1")
    assert said.count("seed 0, rate") == 1
    assert clone.json("metrics/cvfp/baselines/mlp_1.json")["ppl_0"] == 2.0
    clone.run("dvc", "repro", "-f", "stages/cvfp/baselines/dvc.yaml:peers@mlp_1")
    clone.run("dvc", "repro", "stages/cvfp/scaling/dvc.yaml")
    curves = clone.json("metrics/cvfp/scaling.json")
    assert set(curves) == {"sound", "fivegram"}
    assert set(curves["sound"]["0.5"]) == {"ppl_0", "ppl_1"}
    assert curves["sound"]["0.5"]["ppl_0"] > found["sound"]["ppl_0"]  # half of the text
    assert curves["fivegram"]["0.5"]["ppl_0"] > clone.json("metrics/cvfp/tokenize.json")["test_fivegram_ppl"]
    clone.run("dvc", "repro", "stages/cvfp/trials/dvc.yaml")
    trials = clone.json("metrics/cvfp/trials.json")
    assert trials["no_steps"]["val_loss_0"] > trials["unchanged"]["val_loss_0"]
    clone.run("dvc", "repro", "stages/cvfp/dvc.yaml:report")
    page = (clone.folder / "metrics/cvfp/report.md").read_text()
    assert "On text that neither phase has seen, `sound` has a perplexity of" in page
    assert "| mlp_1 |" in page
    assert "Held-out perplexity by train text" in page
    assert "| **unchanged** |" in page
    assert "| no_steps | predict.lr: 1e-09 | " in page
    assert "| sound, head trained with C* = 0 | " in page
    assert "outdated" not in page
    refused = clone.run("python", "-m", "stages.cvfp.baselines.peers", "bert", fails=True)
    assert "error: give one of the models of contest.peers: mlp_1" in refused
    file = clone.folder / PARAMS
    before = file.read_text()
    file.write_text(before.replace("regularizer_weight: 0.02", "regularizer_weight: 0.03"))
    clone.run("python", "-m", "stages.cvfp.report")
    rows = (clone.folder / "metrics/cvfp/report.md").read_text().splitlines()
    file.write_text(before)
    assert ["outdated" in row for name in ("| **sound** ", "| mlp_1 ") for row in rows if row.startswith(name)] == [
        True,
        False,
    ]


def fingerprint_in(clone: Clone, stage: str) -> str:
    script = f"from lego.base.scratch import fingerprint; print(fingerprint({stage!r}))"
    return clone.run("python", "-c", script).strip().splitlines()[-1]
