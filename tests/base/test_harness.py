"""The frame of a stage: what it records, what it keeps of a failed run, errors in one line, devices."""

from __future__ import annotations

import errno
import re

import pytest
import torch

from lego.base.artifacts import ArtifactError, atomic_folder, read_json
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


def test_a_full_disk_without_a_name_is_that_of_the_temporary_folder_too(capsys, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", "/some/tmp")

    def main() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")  # as writing says it, to whatever file

    with pytest.raises(SystemExit):
        exit_cleanly(main)
    assert re.search(r"No space left .* on that of /some/tmp, where files are unpacked", capsys.readouterr().err)


def test_a_stage_begins_with_whole_inputs_or_not_at_all(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for stage, dep in (("cvfp/build_contexts", "cvfp/phase1"), ("satipatthana/train_stage2", "satipatthana/task")):
        with atomic_folder(f"data/{dep}") as folder:
            (folder / "weights").write_bytes(b"whole")
        with Stage(stage):
            pass
        (folder.with_name(dep.split("/")[1]) / "weights").write_bytes(b"whale")
        pipeline = f"stages/{dep.split('/')[0]}/dvc.yaml"
        sentence = rf"data/{dep}/weights: is not as it was written; .*rm -rf data/{dep}; dvc repro {pipeline}"
        with pytest.raises(ArtifactError, match=sentence), Stage(stage):
            pass
