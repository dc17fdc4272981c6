"""The jobs beside classification: regression, and anomalies with and without labels (specification, 6.5 and 7)."""

from __future__ import annotations

import importlib
import shutil
import sys

import numpy as np
import pandas as pd
import pytest
import torch
import yaml

from lego.base.artifacts import read_json
from lego.base.harness import StageError
from lego.satipatthana import jobs, predict, tasks
from lego.satipatthana.curriculum import STAGES, advance, begin, how_to_use, judge
from lego.satipatthana.merit import cross_fitted
from lego.satipatthana.sections import changed, with_profile
from lego.satipatthana.specs import spec_of
from lego.satipatthana.store import load, save
from lego.satipatthana.tables import TaskError
from lego.satipatthana.training import StageCheckError
from lego.satipatthana.void import VoidError, VoidSource
from stages.satipatthana.tasks import page, train
from tests.satipatthana.conftest import PARAMS, PROFILES, SMALL

QUICK = SMALL | {f"stage{number}.epochs": 1 for number in STAGES} | {"vitakka.n_probes": 3}


RECIPES = ("isolation", "rejection", "unsupervised", "regression")


def of(profile, **changes):
    wanted = QUICK | {key.replace("__", "."): value for key, value in changes.items()}
    return changed(with_profile(PARAMS, profile, PROFILES), wanted, "test")


@pytest.fixture(scope="module")
def trained():
    """A system of each recipe, its task and how it is used."""
    found = {}
    for name in RECIPES:
        params = of(name)
        task = tasks.load(params.task, params.test)
        system = begin(task, params, 0)
        for number in STAGES:
            advance(system, number, task, params, 0)
        found[name] = (system, task, how_to_use(system, task, params.reject), params)
    return found


def test_regression_answers_in_units_of_the_target_and_is_right_within_the_tolerance(trained, tmp_path):
    system, task, use, params = trained["regression"]
    facts = judge(system, task, use, params, 0)
    output = system(task.test.x).output
    assert output.shape == (len(task.test), 1)
    error = (output[:, 0] - task.test.y).double()
    assert facts["rmse"] == pytest.approx(float(error.square().mean().sqrt()))
    assert facts["within_tolerance"] == pytest.approx(float((error.abs() <= 0.5).double().mean()))
    assert facts["r2"] == pytest.approx(1 - float(error.square().mean() / task.test.y.double().var(correction=0)))
    assert "accuracy" not in facts
    assert float(task.train.y.mean()) == pytest.approx(0, abs=1e-5)
    assert float(task.train.y.std(correction=0)) == pytest.approx(1, abs=1e-5)
    assert task.test.y.dtype == torch.float32
    (tmp_path / "system").mkdir()
    save(system, tmp_path / "system", use, guide=False)
    again, how = load(tmp_path / "system")
    told = predict.answers(again, how, task.test.x)
    mean, std = task.answer
    np.testing.assert_allclose(told["answer"], output[:, 0].double() * std + mean, rtol=1e-6)
    assert "probability" not in told
    truth = pd.Series(task.test.y.double().numpy() * std + mean, name="y")
    right = predict.rights(again, how, told, truth, "rows.csv")
    assert right.mean() == pytest.approx(facts["within_tolerance"])
    with pytest.raises(tasks.TaskError, match=r"rows\.csv: row 0, column y is not a finite number"):
        predict.rights(again, how, told, truth * float("nan"), "rows.csv")


def test_an_anomaly_system_has_no_decoder_and_answers_by_trust(trained):
    for name in ("isolation", "rejection", "unsupervised"):
        system, task, use, params = trained[name]
        assert system.decoder is None
        found = system(task.test.x)
        assert torch.equal(found.output, 1 - found.trust)
        facts = judge(system, task, use, params, 0)
        assert 0 <= facts["auroc_anomaly"] <= 1
        assert "accuracy" not in facts
        told = predict.answers(system, use, task.test.x)
        assert set(told["answer"]) <= {"normal", "anomaly"}
        assert ((told["answer"] == "normal") == told["accepted"]).all()
        assert not {"aurc", "risk_at_90", "risk_of_accepted"} & set(facts)  # of mistakes, which no row can show
        assert "trust_calibrated" not in told
        words = pd.Series(["normal", "anomaly", *task.names[-2:], task.names[0]], name="y")
        some = told.head(5).assign(answer=["normal"] * 5)
        strange = ["anomaly", *params.task.anomalies]
        assert predict.rights(system, use, some, words, "t").tolist() == [word not in strange for word in words]
        with pytest.raises(TaskError, match="t: column y has Normal, which is none of the classes normal, anomaly, "):
            predict.rights(system, use, some, words.replace("normal", "Normal"), "t")
        with pytest.raises(TaskError, match="t: column y has no value in row 3; fill it"):
            predict.rights(system, use, some, words.where(words.index != 3), "t")
        with pytest.raises(StageCheckError, match="job anomaly has no decoder"):
            spec_of(3, system, task.train, params, 0)


def test_known_anomalies_guide_and_are_void_but_are_never_clean(trained):
    (_, isolated, _, isolation), (_, rejected, _, rejection) = trained["isolation"], trained["rejection"]
    assert isolation.system.guided
    assert not rejection.system.guided
    for task in (isolated, rejected):
        assert task.known is not None
        rows = {tuple(row) for row in task.known.tolist()}
        for split in (task.train, task.validation, task.test):
            assert not rows & {tuple(row) for row in split.x.tolist()}
            assert int(split.y.sum()) == 0
        assert set(task.outside) == {"seen_8", "unseen_9"}
    system = begin(isolated, isolation, 0)
    guided = spec_of(1, system, isolated.train, isolation, 0, isolated.known)
    assert guided.rows == len(isolated.train) + len(isolated.known)
    plain = spec_of(1, begin(rejected, rejection, 0), rejected.train, rejection, 0, rejected.known)
    assert plain.rows == len(rejected.train)
    with pytest.raises(StageCheckError, match=r"system\.guided asks for labels"):
        spec_of(1, system, isolated.train, isolation, 0)
    drawn = VoidSource.of_task(rejected.train, rejection, rejected.known).of(
        "anomalies", 20, torch.Generator().manual_seed(0)
    )
    assert {tuple(row) for row in drawn.tolist()} <= {tuple(row) for row in rejected.known.tolist()}
    with pytest.raises(VoidError, match=r"name some in task\.known"):
        VoidSource.of_task(rejected.train, rejection).of("anomalies", 1, torch.Generator())


@pytest.mark.parametrize("rows", [2, 6])
def test_a_table_that_is_too_small_is_one_sentence_or_enough(tmp_path, rows):
    file = tmp_path / "rows.csv"
    pd.DataFrame({"a": np.arange(rows), "b": np.arange(rows) ** 2.0, "y": np.arange(rows) / 2}).to_csv(
        file, index=False
    )
    params = of("regression", task__name="table", task__file=str(file), task__label="y")
    if rows == 2:
        with pytest.raises(tasks.TaskError, match=r"rows of .*rows\.csv cannot be split by task\.test_share"):
            tasks.load(params.task, params.test)
        return
    task = tasks.load(params.task, params.test)
    assert torch.equal(cross_fitted(task.train, params, 0), torch.ones(len(task.train)))


def test_dropout_draws_from_the_seed_of_its_stage_whatever_was_initialized_before():
    task = tasks.load(of("wine").task, of("wine").test)
    found = []
    for width in (16, 8):  # of the decoder, which stage 0 has nothing to do with
        params = of("wine", adapter__dropout=0.5, heads__decoder_hidden=width)
        made = begin(task, params, 0)
        advance(made, 0, task, params, 0)
        found.append(torch.cat([one.flatten() for one in made.adapter.parameters()]))
    assert torch.equal(*found)


def test_flags_of_a_known_order():
    inside, outside = np.linspace(0.5, 1, 150), np.array([0.1, 0.2, 0.6, 0.9])
    found = jobs.flagged(inside, outside)
    assert found["recall_at_1"] == pytest.approx(2 / 4)  # a hundredth of 154 rows is two
    assert found["precision_at_100"] == pytest.approx(3 / 100)
    assert found["auroc_anomaly"] == pytest.approx((150 + 150 + (inside > 0.6).sum() + (inside > 0.9).sum()) / 600)


def test_the_pipeline_trains_and_evaluates_other_jobs_and_says_what_it_does_not(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "stages/satipatthana").mkdir(parents=True)
    values = of("rejection", seeds=1, workers=1, ablations__seeds=1).model_dump()
    (tmp_path / "stages/satipatthana/params.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    shutil.copy(PROFILES, tmp_path / "stages/satipatthana/profiles.yaml")

    def run(script, *arguments):
        monkeypatch.setattr(sys, "argv", ["stage", *arguments])
        importlib.import_module(f"stages.satipatthana.{script}").main()

    run("prepare")
    for number in STAGES:
        run("train_stage", str(number))
    run("evaluate")
    assert 0 <= read_json("metrics/satipatthana/evaluate.json")["auroc_anomaly"] <= 1
    assert load("data/satipatthana/system")[0].decoder is None
    for script, argument in (("compat", ()), ("plain", ()), ("peers", ("msp",)), ("ablations", ()), ("report", ())):
        with pytest.raises(StageError, match=r"task\.job is anomaly, and .* is of classification alone"):
            run(script, *argument)


@pytest.mark.slow
def test_the_page_of_tasks_has_every_task_and_a_verdict_of_each(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "stages/satipatthana").mkdir(parents=True)
    names = ["wine", "regression", "rejection"]
    tiny = QUICK | {"workers": 1, "tasks.seeds": 2, "tasks.names": names, "peers.epochs": 2}
    values = changed(PARAMS, tiny, "test").model_dump()
    (tmp_path / "stages/satipatthana/params.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    chosen = yaml.safe_load(PROFILES.read_text())
    for one in chosen.values():
        for key in [key for key in one if key.endswith(("prototypes", "epochs"))]:
            del one[key]
    (tmp_path / "stages/satipatthana/profiles.yaml").write_text(yaml.safe_dump(chosen))
    for name in names:
        monkeypatch.setattr(sys, "argv", ["train", name])
        train.main()
    found = read_json("metrics/satipatthana/tasks/found/rejection.json")
    assert found["job"] == "anomaly"
    assert set(found) == {"job", "rows", "satipatthana", "input_knn", "isolation_forest"}
    assert len(found["satipatthana"]["seeds"]) == 2
    monkeypatch.setattr(sys, "argv", ["page"])
    page.main()
    text = (tmp_path / "metrics/satipatthana/tasks/report.md").read_text()
    assert all(f"## {name}" in text for name in names)
    assert text.count("trust is ") == 2 + 2 + 2
    assert "nan" not in text
    monkeypatch.setattr(sys, "argv", ["train", "poker"])
    with pytest.raises(StageError, match="give one of the tasks wine, regression, rejection"):
        train.main()
