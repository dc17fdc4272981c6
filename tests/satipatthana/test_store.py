"""Saving and using a system: folders, tables of one's own, the command line."""

from __future__ import annotations

import gzip
import json
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import save_file

from lego.base.artifacts import ArtifactError
from lego.base.params import ParamsError
from lego.satipatthana import predict, tasks
from lego.satipatthana.ablation import heads
from lego.satipatthana.curriculum import advance, begin, how_to_use, judge, resume
from lego.satipatthana.made import outside_sets
from lego.satipatthana.peers import networks
from lego.satipatthana.sections import changed
from lego.satipatthana.store import Use, load, save, standardized
from lego.satipatthana.tables import TaskError, labelled, read_table
from lego.satipatthana.tasks import Task
from lego.satipatthana.void import VoidError, VoidSource
from tests.satipatthana.conftest import ONCE, PARAMS, SMALL, a_task, clusters, small


def test_large_columns_are_standardized_alike_in_training_and_use(tmp_path):
    random = np.random.default_rng(0)
    frame = pd.DataFrame({"time": 1.7e9 + 50 * random.normal(size=60), "b": random.normal(size=60)})
    frame["kind"] = ["x", "y"] * 30
    frame.to_csv(tmp_path / "t.csv", index=False)
    settings = PARAMS.task.model_copy(update={"name": "table", "file": str(tmp_path / "t.csv"), "label": "kind"})
    task = tasks.load(settings, PARAMS.test.model_copy(update={"kinds": ["uniform"]}))
    use = Use(task.classes, task.columns, task.mean.tolist(), task.std.tolist())
    rows = standardized(torch.from_numpy(frame[["time", "b"]].to_numpy(copy=True)), use)
    apart = (rows[:, None] - torch.cat([task.train.x, task.validation.x, task.test.x])[None]).abs().amax(2).amin(0)
    assert apart.max() < 1e-5


DAMAGE = [  # of system.json: values that cannot be those that were written
    ("shape", []),
    ("shape", [0]),
    ("shape", "12"),
    ("outputs", 2),
    ("outputs", None),
    ("classes", ["a", "b"]),
    ("classes", ["a", "a", "b"]),
    ("shape", [10**30]),
    ("columns", ["a"]),
    ("mean", [0.0]),
    ("mean", None),
    ("std", [0.0] * 12),
    ("temperature", 0),
    ("temperature", "warm"),
    ("threshold", None),
    ("answer", [1.0]),
    ("trust", {"x": [0.0, 1.0], "y": [0.0]}),
    ("trust", [0, 1]),
    ("trust", {"x": [1.0, 0.0], "y": [0.0, 1.0]}),
    ("guide", True),
    ("parameters", {}),
]


def test_r4_3_and_r4_4_a_saved_system_is_the_same_and_errors_are_of_what_was_encoded(tmp_path):
    params, task = small(**ONCE), a_task()
    made = begin(task, params, 0)
    for number in range(4):
        advance(made, number, task, params, 0)
        folder = tmp_path / str(number)
        folder.mkdir()
        save(made, folder, how_to_use(made, task, params.reject))
        again, _ = load(folder)
        assert torch.equal(again(task.test.x).trust, made(task.test.x).trust)
    (tmp_path / "out").mkdir()
    use = how_to_use(made, task, params.reject)
    save(made, tmp_path / "out", use, guide=False)
    exported, same = load(tmp_path / "out")
    assert exported.aux is None
    assert (same.threshold, same.temperature) == (use.threshold, use.temperature)
    assert torch.equal(exported(task.test.x).output, made(task.test.x).output)
    noisy = made.samatha(task.test.x, 1.0, generator=torch.Generator().manual_seed(0))
    expected = (made.samatha_recon(noisy.state) - noisy.encoded).square().mean(1, keepdim=True)
    torch.testing.assert_close(made.look(noisy)[1], expected)
    assert not torch.equal(noisy.encoded, task.test.x)
    weights = (tmp_path / "out/system.safetensors").read_bytes()
    (tmp_path / "out/system.safetensors").write_bytes(weights[:-8])
    with pytest.raises(ArtifactError, match=r"system\.safetensors: cannot be read as safetensors"):
        load(tmp_path / "out")
    (tmp_path / "out/system.safetensors").write_bytes(weights)
    facts = json.loads((tmp_path / "out/system.json").read_text())
    (tmp_path / "out/system.json").write_text(json.dumps(facts | {"temperature": 10**30}))
    assert isinstance(load(tmp_path / "out")[1].temperature, float)
    broken = exported.state_dict() | {"vicara.inner": torch.full_like(exported.vicara.inner, torch.nan)}
    save_file(broken, tmp_path / "out/system.safetensors")
    with pytest.raises(ArtifactError, match=r"system\.safetensors: holds weights that are not finite"):
        load(tmp_path / "out")
    (tmp_path / "out/system.safetensors").write_bytes(weights)
    for key, value in DAMAGE:
        (tmp_path / "out/system.json").write_text(json.dumps(facts | {key: value}))
        with pytest.raises(ArtifactError, match=r"system\.(json|safetensors): "):
            load(tmp_path / "out")


def test_a_later_part_of_another_size_leaves_the_trained_ones_as_they_are(tmp_path):
    """So a changed parameter of stage 2 needs nothing before it to run again."""
    params, task = small(**ONCE), a_task()
    made = begin(task, params, 0)
    for number in range(2):
        advance(made, number, task, params, 0)
    save(made, tmp_path, how_to_use(made, task, params.reject))
    other = resume(task, small(**(ONCE | {"vipassana__hidden": 9, "heads__decoder_hidden": 5})), 0, 1, tmp_path)
    assert torch.equal(other.samatha(task.test.x).state, made.samatha(task.test.x).state)
    assert torch.equal(other.samatha_recon.trunk[0].weight, made.samatha_recon.trunk[0].weight)
    with pytest.raises(ArtifactError, match="is not of these parameters; run dvc repro stages/satipatthana"):
        resume(task, small(**(ONCE | {"adapter__hidden": 9})), 0, 1, tmp_path)


def test_predict_abstains_below_the_threshold_and_numbers_are_flat():
    params, task = small(**ONCE), a_task()
    made = begin(task, params, 0)
    for number in range(4):
        advance(made, number, task, params, 0)
    found = made(task.test.x)
    cut = float(found.trust.median())
    output, accepted, trust = made.predict(task.test.x, reject_below=cut)
    assert torch.equal(accepted, trust[:, 0] >= cut)
    assert torch.equal(output, found.output)
    task = Task(**{**vars(task), "outside": outside_sets(task.train.x.numpy(), task.test.x.numpy(), PARAMS.test)})
    facts = judge(made, task, how_to_use(made, task, params.reject), params, 0)
    assert all(isinstance(value, float) for value in facts.values())
    assert 0 <= facts["accuracy"] <= 1
    assert facts["auroc_uniform"] > 0.5
    assert facts["recon_mse_1T"] == pytest.approx(facts["recon_mse_20T"], rel=0.02)
    assert facts["last_step_20T"] < 1e-5 < facts["last_step"]
    longer = made(task.test.x, max_steps=200, rests=False)
    assert (longer.steps == 200).all()  # the sweep takes its steps
    torch.testing.assert_close(longer.s_star, found.s_star, rtol=0, atol=2e-2)


def test_a_table_of_ones_own_and_what_is_wrong_with_it(tmp_path):
    random = np.random.default_rng(0)
    frame = pd.DataFrame(random.normal(size=(60, 3)), columns=["a", "b", "c"])
    frame["kind"] = ["x", "y"] * 30
    file = tmp_path / "rows.csv"
    frame.to_csv(file, index=False)
    settings = PARAMS.task.model_copy(update={"name": "table", "file": str(file), "label": "kind"})
    task = tasks.load(settings, PARAMS.test.model_copy(update={"kinds": ["uniform"]}))
    assert (task.classes, task.columns, task.shape) == (["x", "y"], ["a", "b", "c"], (3,))
    folder = tmp_path / "task"
    folder.mkdir()
    tasks.write_task(task, folder)
    again = tasks.read_task(folder)
    assert torch.equal(again.outside["uniform"], task.outside["uniform"])
    assert torch.equal(again.mean, task.mean)
    for change, sentence in (
        ({"label": "sort"}, "has no column sort; task.label must name one of a, b, c, kind"),
        ({"file": str(tmp_path / "none.csv")}, "cannot be read as .csv"),
    ):
        with pytest.raises(TaskError, match=sentence):
            tasks.load(settings.model_copy(update=change), PARAMS.test.model_copy(update={"kinds": ["uniform"]}))
    with pytest.raises(TaskError, match=r"rows: row 7, column b is not a finite number"):
        broken = frame.copy()
        broken.loc[7, "b"] = np.nan
        tasks.features_of(broken, ["a", "b"], "rows")
    with pytest.raises(TaskError, match="rows: column kind is not numeric"):
        tasks.features_of(frame, ["kind"], "rows")
    with pytest.raises(TaskError, match="rows: has no column q"):
        tasks.features_of(frame, ["q"], "rows")
    with pytest.raises(TaskError, match="rows: has no column beside kind; give at least one to learn from"):
        labelled(frame[["kind"]], "kind", "rows")
    for text, sentence in (
        ("a,b\n1,2,3\n4,5,6\n", "rows have more fields than the header"),  # pandas would make an index of the first
        ("a,b,b\n1,2,3\n", "has the column b twice; drop or rename one"),
        ("", r"cannot be read as \.csv"),
    ):
        file.write_text(text)
        with pytest.raises(TaskError, match=sentence):
            read_table(file)
    file.write_text("NA,null,,\n1,2,,\n")  # names that pandas takes for missing, and a spreadsheet's empty columns
    assert list(read_table(file).columns[:2]) == ["NA", "null"]
    packed = tmp_path / "rows.csv.gz"
    packed.write_bytes(gzip.compress(b"a\n1\n")[:-4])
    with pytest.raises(TaskError, match=r"rows\.csv\.gz: cannot be read as \.gz"):
        read_table(packed)
    frame.assign(a=1e300 * frame["a"]).to_csv(file, index=False)
    with pytest.raises(TaskError, match="column a spreads beyond double precision; scale it down"):
        tasks.load(settings, PARAMS.test.model_copy(update={"kinds": ["uniform"]}))


def test_r6_4_void_rows_may_come_from_a_table(tmp_path):
    """Of another dataset, with the task's columns and in its units."""
    rows = clusters(80, features=3)
    columns = {f"c{n}": rows.x[:, n].numpy() for n in range(3)}
    pd.DataFrame(columns | {"y": rows.y.numpy()}).to_csv(tmp_path / "own.csv", index=False)
    away = {name: 10 + values for name, values in columns.items()}
    pd.DataFrame(away).to_parquet(tmp_path / "other.parquet")
    named = {"task.name": "table", "task.file": str(tmp_path / "own.csv"), "task.label": "y"}
    named |= {"task.strangers": str(tmp_path / "other.parquet"), "void.kinds": ["file"], "test.kinds": ["uniform"]}
    params = changed(PARAMS, named, "test")
    task = tasks.load(params.task, params.test)
    torch.testing.assert_close(task.strangers * task.std + task.mean, 10 + rows.x.double(), rtol=1e-4, atol=1e-4)
    (tmp_path / "task").mkdir()
    tasks.write_task(task, tmp_path / "task")
    again = tasks.read_task(tmp_path / "task")
    assert torch.equal(again.strangers, task.strangers)
    drawn = VoidSource.of_task(task.train, params, None, task.strangers).draw(20, torch.Generator().manual_seed(0))
    assert (drawn[:, None] == task.strangers).all(dim=2).any(dim=1).all()
    short = {f"stage{number}.epochs": 1 for number in range(4)} | {"peers.epochs": 1, "ablations.epochs": 1}
    few = changed(params, SMALL | short | {"ablations.batches": 2}, "test")
    assert networks("outlier_exposure", task, few.peers, 0, few.void)  # peers and ablations are shown them too
    made = begin(task, few, 0)
    for number in range(4):
        advance(made, number, task, few, 0)
    assert {"all_features", "without_log"} < heads(made, task, few, 0).keys()
    with pytest.raises(VoidError, match=r"the task has no such rows; name some in task\.strangers"):
        VoidSource.of_task(task.train, params).draw(3, torch.Generator())
    with pytest.raises(ParamsError, match=r"task\.strangers must name a CSV or Parquet file if void\.kinds has file"):
        changed(PARAMS, {"void.kinds": ["file"]}, "test")
    with pytest.raises(TaskError, match="has no column c0, c1, c2"):
        pd.DataFrame({"d": [1.0]}).to_csv(tmp_path / "odd.csv", index=False)
        tasks.load(params.task.model_copy(update={"strangers": str(tmp_path / "odd.csv")}), params.test)
    windows = {"task.name": "sensors", "task.strangers": "x.csv", "void.kinds": ["file"], "test.kinds": ["stuck"]}
    with pytest.raises(TaskError, match="the inputs of this task are none; leave it null"):
        odd = changed(PARAMS, windows, "test")
        tasks.load(odd.task, odd.test)


def test_the_command_line_answers_a_table(tmp_path, monkeypatch, capsys):
    params, task = small(**ONCE), a_task()
    task = Task(**{**vars(task), "columns": [f"c{n}" for n in range(12)]})
    made = begin(task, params, 0)
    for number in range(4):
        advance(made, number, task, params, 0)
    folder = tmp_path / "system"
    folder.mkdir()
    save(made, folder, how_to_use(made, task, params.reject), guide=False)
    frame = pd.DataFrame(task.test.x.numpy(), columns=task.columns)
    frame["truth"] = [task.classes[one] for one in task.test.y]
    frame.to_parquet(tmp_path / "rows.parquet")

    def run(*arguments: str) -> tuple[int, str]:
        rows = [str(tmp_path / "rows.parquet"), "--system", str(folder)]
        monkeypatch.setattr(sys, "argv", ["predict", *rows, *arguments])
        return predict.main(), capsys.readouterr().err

    code, said = run("--out", str(tmp_path / "a.csv"), "--label", "truth")
    assert code == 0
    assert "30 rows, " in said
    found = pd.read_csv(tmp_path / "a.csv")
    assert list(found.columns[:5]) == ["answer", "probability", "trust", "trust_calibrated", "accepted"]
    np.testing.assert_allclose(found["trust"], made(task.test.x).trust[:, 0], rtol=1e-5)
    code, said = run("--label", "nothing")
    assert code == 1
    assert "has no column nothing, which --label names" in said
    code, said = run("--label", "c0")
    assert code == 1
    assert "which is none of the classes a, b, c" in said
    numbered = Use(["1", "2"])
    some = pd.DataFrame({"answer": ["1", "2", "1"]})
    told = predict.rights(made, numbered, some, pd.Series([1.0, 2.0, 2.0], name="y"), "t")  # one was missing once
    assert told.tolist() == [True, True, False]
    code, said = run("--out", str(tmp_path))
    assert (code, said) == (1, f"error: --out {tmp_path}: is a folder; name a file\n")
    frame["c3"] = frame["c3"].astype(float)
    frame.loc[7, "c3"] = 1e39
    frame.to_parquet(tmp_path / "rows.parquet")
    assert run() == (
        1,
        f"error: {tmp_path}/rows.parquet: row 7 is too large for single precision; correct it or leave it out\n",
    )
    frame[:0].to_parquet(tmp_path / "rows.parquet")
    assert run() == (1, f"error: {tmp_path}/rows.parquet: has no rows; give at least one below the header\n")
