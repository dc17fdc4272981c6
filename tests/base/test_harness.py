"""The frame of a stage: what it records, what it keeps of a failed run, errors in one line, devices."""

from __future__ import annotations

import pytest
import torch

from lego.base.artifacts import read_json
from lego.base.harness import Stage, StageError, exit_cleanly, resolve_device


def test_a_stage_records_time_and_versions_apart_from_its_results(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lego.base.harness.fingerprint", lambda name: "f00d")
    with Stage("demo", seed=3, threads=2) as stage:
        (stage.keep("best") / "x").write_text("kept until success")
        stage.record["counts"] = {"tokens": 10}
    record = read_json("data/timing/demo.json")
    assert record["threads"] == 2
    assert record["torch_version"] == torch.__version__
    assert record["tokens_per_second"] == pytest.approx(10 / record["seconds"])
    assert "python_executable" in record
    assert not stage.scratch.exists()
    with pytest.raises(RuntimeError), Stage("demo") as stage:
        stage.keep("best")
        raise RuntimeError
    assert stage.scratch.exists()
    assert capsys.readouterr().err == "demo: the best model it reached is in .scratch/demo/f00d/\n"
    with pytest.raises(RuntimeError), Stage("demo"):
        raise RuntimeError
    assert capsys.readouterr().err == ""  # what lies there is another run's


def test_errors_a_user_can_mend_become_one_line_without_traceback(capsys):
    def main() -> None:
        raise StageError("something to mend")

    with pytest.raises(SystemExit) as stop:
        exit_cleanly(main)
    assert stop.value.code == 1
    line = capsys.readouterr().err
    assert line.startswith("error: something to mend (mend it and run the same command again: what was made before")
    assert line.count("\n") == 1

    def bug() -> None:
        raise KeyError("a bug keeps its traceback")

    with pytest.raises(KeyError):
        exit_cleanly(bug)


def test_devices():
    assert resolve_device("cpu").type == "cpu"
    assert resolve_device("auto").type in {"cpu", "cuda", "mps"}
    if not torch.cuda.is_available():
        with pytest.raises(StageError, match=r"train\.device is cuda, but this machine has none; use auto or cpu"):
            resolve_device("cuda")
