"""Tables of one's own: what is wrong with one, how columns are scaled, and strangers from another."""

from __future__ import annotations

import gzip
import os

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from lego.base.parameter_files import ParamsError
from lego.satipatthana import tasks
from lego.satipatthana.ablation import heads
from lego.satipatthana.curriculum import advance, begin
from lego.satipatthana.peers import networks
from lego.satipatthana.sections import changed
from lego.satipatthana.store import Use, standardized
from lego.satipatthana.tables import TaskError, labelled, read_table
from lego.satipatthana.void import VoidError, VoidSource
from tests.satipatthana.conftest import PARAMS, SMALL, clusters


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


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.csv", "a;k\n1;x\n2;y\n", r"a\.csv: separates its cells by semicolons; write it anew with commas"),
        ("a.csv", "a;k\n1,5;x\n2,5;y\n", r"a\.csv: separates its cells by semicolons"),
        ("a.csv", "\ufeffa\tk\n1\tx\n", r"a\.csv: separates its cells by tabs"),
        ("a.csv", ",\na,k\n1,x\n", r"a\.csv: line 1 is blank where the names of the columns should stand; remove it"),
        ("a.csv", "a,k\n1,x\n\0", r"a\.csv: cannot be read as \.csv \(it holds zero bytes, so it is not text\)"),
        ("pipe", None, r"pipe: is a pipe, not a file; save what it gives"),
        ("sparse.csv", 2**40, r"sparse\.csv: cannot be read as \.csv \(it holds zero bytes"),
        ("bomb.parquet", 2 * 10**7, r"bomb\.parquet: unpacks to 20,000,000 values, more than 200 times its size"),
        ("far.parquet", -1, r"far\.parquet: cannot be read as \.parquet \(year .* out of range\)"),
    ],
)
def test_what_is_no_table_is_named_before_it_fills_the_memory(tmp_path, name, content, sentence):
    file = tmp_path / name
    match content:
        case None:
            os.mkfifo(file)
        case -1:
            pq.write_table(pa.table({"a": [1.0], "day": pa.array([10**7], pa.date32())}), file)
        case 1099511627776:
            with file.open("wb") as sparse:
                sparse.write(b"a,k\n1,x\n")
                sparse.truncate(content)
        case int():
            pq.write_table(pa.table({"a": np.zeros(content)}), file)
        case _:
            file.write_text(content)
    with pytest.raises(TaskError, match=sentence) as caught:
        read_table(file)
    assert "\n" not in str(caught.value)


def test_of_a_parquet_file_only_the_needed_columns_are_read(tmp_path):
    table = {"a": [1.0], "b": [2.0], "day": pa.array([10**7], pa.date32())}
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    assert list(read_table(tmp_path / "a.parquet", ["b", "a", "gone"])) == ["b", "a"]


def test_a_blank_line_before_the_header_of_numbers_is_no_row(tmp_path):
    (tmp_path / "a.csv").write_text("\na,k\n1,x\n")
    assert read_table(tmp_path / "a.csv").to_dict("list") == {"a": [1], "k": ["x"]}


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
