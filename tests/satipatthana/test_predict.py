"""The command line answers a table."""

from __future__ import annotations

import sys

import numpy as np
import pandas as pd

from lego.satipatthana import predict
from lego.satipatthana.curriculum import advance, begin, how_to_use
from lego.satipatthana.store import Use, save
from lego.satipatthana.tasks import Task
from tests.satipatthana.conftest import ONCE, a_task, small


def test_no_cell_is_a_formula_and_numbers_stay_numbers():
    bad = ["=1+1", "+cmd", "-x", "@sum", "\tx", "\r=x", " =1", "-", '=HYPERLINK("http://x")']
    good = ["-0.5", "+3", "-1e-9", "a-b", "", "1=2", None, 4]
    frame = pd.DataFrame({"answer": [*bad, *good], "trust": np.linspace(-1, 1, len(bad + good))})
    shown = predict.for_spreadsheets(frame)
    assert list(shown["answer"]) == [*(f"'{one}" for one in bad), *good]
    assert shown["trust"].equals(frame["trust"])
    assert list(frame["answer"]) == [*bad, *good]  # the table that is counted is another one
    assert predict.for_spreadsheets(pd.DataFrame({"=x": [-0.5]})).to_csv(index=False) == "'=x\n-0.5\n"
    words = pd.DataFrame({"answer": pd.Series(["=a", "b"], dtype="string").astype("category")})
    assert list(predict.for_spreadsheets(words)["answer"]) == ["'=a", "b"]


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
