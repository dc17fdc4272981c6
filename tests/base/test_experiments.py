"""What an experiment in a temporary folder does not see."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lego.base.experiments import origin, require_tracked, side_by_side
from lego.base.harness import StageError
from tests.conftest import ROOT


@pytest.fixture
def experiment(tmp_path, monkeypatch) -> Path:
    """A temporary experiment's folder with two of the three texts of its work tree."""
    folder = tmp_path / "tree/.dvc/tmp/exps/tmp1"
    for where, names in ((tmp_path / "tree/text", ("a.txt", "sub/b.txt", "sub/c.txt")), (folder / "text", ("a.txt",))):
        for name in names:
            (where / name).parent.mkdir(parents=True, exist_ok=True)
            (where / name).write_text("x")
    monkeypatch.chdir(folder)
    return folder


def test_a_temporary_folder_knows_the_tree_it_came_from(experiment, tmp_path):
    assert origin(experiment) == origin(experiment / "deeper") == tmp_path / "tree"
    assert origin(tmp_path / "tree") is None
    assert origin(tmp_path / "tree/.dvc/tmp") is None


def test_files_that_git_does_not_track_are_counted_and_refused(experiment):
    with pytest.raises(StageError, match=r"^data\.path text: 2 of 3 files are not in git, text/sub/\w\.txt among them"):
        require_tracked("text", "data.path")
    with pytest.raises(StageError, match=r"^task\.file text/sub/b\.txt: 1 of 1 files"):
        require_tracked("text/sub/b.txt", "task.file")


def test_what_is_all_there_or_is_no_part_of_the_tree_is_fine(experiment, tmp_path, monkeypatch):
    require_tracked("text/a.txt", "data.path")
    require_tracked("absent", "data.path")  # the reader will say so
    require_tracked(tmp_path / "tree/text", "data.path")  # read where it is
    for name in ("b", "c"):
        (tmp_path / f"tree/text/sub/{name}.txt").unlink()
    (tmp_path / "tree/text/.DS_Store").write_text("hidden files are not read")
    require_tracked("text", "data.path")
    monkeypatch.chdir(tmp_path / "tree")
    require_tracked("text", "data.path")


def test_runs_of_one_tree_are_counted(experiment, tmp_path, monkeypatch):
    assert side_by_side() == 1
    (experiment.parent / "tmp2").mkdir()
    (experiment.parent / "celery").mkdir()
    assert side_by_side() == 2
    monkeypatch.chdir(tmp_path / "tree")
    assert side_by_side() == 3  # the work tree's own
    monkeypatch.chdir(experiment)
    for killed in (experiment.parent / "tmp2", tmp_path / "tree"):
        os.utime(killed, (0, 0))
    assert side_by_side() == 1
    (experiment.parent / "tmp2/.scratch/locks/cvfp").mkdir(parents=True)
    child = subprocess.Popen(["sleep", "60"])
    lock = experiment.parent / "tmp2/.scratch/locks/cvfp/train_phase1"
    for alive in (True, False):
        lock.write_text(f"{child.pid}\n")
        for path in (lock, experiment.parent / "tmp2"):
            os.utime(path, (0, 0))
        assert side_by_side() == 1 + alive  # a stage that has run for long, and one that was killed
        child.kill()
        child.wait()
    for odd in (b"", b"\xff\xfe", b"0", b"-1", b"9" * 30, b"x"):  # what no stage writes
        lock.write_bytes(odd)
        for path in (lock, experiment.parent / "tmp2"):
            os.utime(path, (0, 0))
        assert side_by_side() == 1
    monkeypatch.chdir(tmp_path)
    assert side_by_side() == 1


def test_a_folder_that_goes_while_it_is_looked_at_is_no_run(experiment, monkeypatch):
    other = experiment.parent / "tmp2/.scratch/locks"
    other.mkdir(parents=True)
    (other / "train_phase1").write_text("1\n")
    plain = Path.read_text

    def gone(self, **kwargs):
        shutil.rmtree(experiment.parent / "tmp2")
        return plain(self, **kwargs)

    monkeypatch.setattr(Path, "read_text", gone)
    assert side_by_side() == 1


@pytest.mark.parametrize(("others", "policy"), [(0, "None"), (1, "PASSIVE")])
def test_a_stage_beside_another_lets_its_threads_sleep_while_they_wait(experiment, others, policy):
    """Decided before torch is loaded, which reads it then."""
    for number in range(others):
        (experiment.parent / f"tmp-other{number}").mkdir()
    script = "import sys, os, stages; print(os.environ.get('OMP_WAIT_POLICY'), 'torch' in sys.modules)"
    environment = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"}
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=experiment,
        env=environment | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == [policy, "False"]
