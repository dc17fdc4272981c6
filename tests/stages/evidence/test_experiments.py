"""A suite through real dvc, with tiny parameters: the queue, a kill, two clones, text outside of git."""

from __future__ import annotations

import copy
import os
import re
import shutil
import signal
import sys
import time
from contextlib import suppress
from importlib import import_module
from pathlib import Path

import pytest
import yaml

from stages.evidence.records import results
from stages.evidence.suites import Suite, changed, changes_of
from tests.conftest import SOURCE, Clone, run_in_process
from tests.kills import started, waited, workers
from tests.stages.conftest import ORDER

TINY_SUITE = """
small:
  seeds: 2
  search: [0.5, 1.0]
  settings:
    half: {data.source: text, data.path: ../outside}
    third: {ashem.hard_example_ratio: 0.3, data.split_on: ' = [^=]'}
  models: [ashem, random]
"""


def killed(clone: Clone) -> None:
    """Kills the queue's workers, with their stages, once one of them trains, and clears up as README.md says."""
    while not any(file.read_text().strip() for file in clone.folder.glob(".dvc/tmp/exps/tmp*/.scratch/locks/train_*")):
        time.sleep(0.2)
    found = workers(clone)
    for process in found:
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    while any(Path(f"/proc/{process}").exists() for process in found):
        time.sleep(0.1)
    lost = re.findall(r"(small-\w+-s\d)\s.*Running", clone.run("dvc", "queue", "status"))
    assert lost
    clone.run("dvc", "queue", "kill", "--force", *lost)
    clone.run("dvc", "queue", "remove", "--failed")
    for folder in clone.folder.glob(".dvc/tmp/exps/tmp*"):
        shutil.rmtree(folder)


def directly(clone: Clone, folder: Path, changes: dict) -> dict:
    """The metrics of both models from the stages alone, without dvc."""
    values = copy.deepcopy(yaml.safe_load((clone.folder / "params.yaml").read_text()))
    folder.mkdir()
    (folder / "params.yaml").write_text(yaml.safe_dump(changed(values, changes)))
    run_in_process(folder, ORDER)
    before = Path.cwd()
    os.chdir(folder)
    try:
        import_module("stages.evidence.train_block2").main("random")
    finally:
        os.chdir(before)
    return {model: Clone(folder).json(f"metrics/details/{model}.json") for model in ("ashem", "random")}


@pytest.mark.slow
def test_a_suite_goes_through_the_queue_and_a_kill_and_two_clones(tmp_path, monkeypatch):
    (tmp_path / "clone").mkdir()
    (tmp_path / "outside").mkdir()  # of git, and of the folders of experiments
    for number in range(60):
        (tmp_path / f"outside/{number}.txt").write_text(SOURCE[1500 * number : 1500 * (number + 1)])
    clone = Clone.of_this_tree(tmp_path / "clone")
    ask = (sys.executable, "-m", "stages.evidence.queue", "--suite", "small")
    (clone.folder / "stages/evidence/suites.yaml").write_text(TINY_SUITE)
    assert "stages/evidence/suites.yaml is not committed; commit it first" in clone.run(*ask, fails=True)
    clone.commit("a suite")

    assert "small-half-s0 lacks: ashem, random (missing)" in clone.run(*ask, "--dry-run")
    assert "2 queued" in clone.run(*ask)
    again = clone.run(*ask)
    assert "small-half-s0 is queued" in again
    assert "dvc queue start" not in again  # nothing was put there
    (clone.folder / ".scratch").mkdir(exist_ok=True)
    started(clone, "dvc", "queue", "start", "-j", "2").wait()
    killed(clone)
    clone.run(*ask)
    started(clone, "dvc", "queue", "start", "-j", "2").wait()
    waited(clone)
    assert "is cached" in clone.run("dvc", "queue", "logs", "small-third-s0")  # what was made before the kill
    gathered = clone.run(sys.executable, "-m", "stages.evidence.gather")
    assert gathered.count(": ashem, random") == 2
    said = clone.run(*ask, "--setting", "half")
    assert "2 of 4 models are current" in said
    assert "1 queued" in said
    started(clone, "dvc", "queue", "start", "-j", "2").wait()
    waited(clone)
    clone.run(sys.executable, "-m", "stages.evidence.gather")
    assert "6 of 8 models are current" in clone.run(*ask, "--dry-run")

    monkeypatch.chdir(clone.folder)
    found = results("small")
    for setting, seed in (("third", "0"), ("half", "1")):
        one = found[setting]["random"][seed]
        rates = {key: one["params"][key] for key in ("ashem.phase2_lr", "baselines.block2.random.lr")}
        changes = changes_of(load_suites_of(clone)["small"], setting, int(seed), rates)
        expected = directly(clone, tmp_path / f"{setting}{seed}", changes)
        for model, metrics in expected.items():
            assert found[setting][model][seed]["metrics"] == pytest.approx(metrics, rel=1e-9), (setting, model)
    assert {one["metrics"]["lr"] for one in found["half"]["random"].values()} == {
        found["half"]["random"]["0"]["metrics"]["lr"]
    }

    assert list(found["half"]["ashem"]["0"]["of_attainable"]) == ["0.3", "0.5", "0.7"]

    clone.commit("records")
    clone.run("git", "init", "-q", "--bare", str(tmp_path / "origin"))
    clone.run("git", "remote", "add", "origin", str(tmp_path / "origin"))
    clone.run("git", "push", "-q", "origin", "HEAD:refs/heads/main")
    clone.run("dvc", "remote", "add", "--local", "-d", "storage", str(tmp_path / "storage"))
    clone.run("dvc", "exp", "push", "-q", "-A", "origin")
    clone.run("git", "clone", "-q", "-b", "main", str(tmp_path / "origin"), str(tmp_path / "other"))
    other = Clone(tmp_path / "other")
    before = (clone.folder / "metrics/evidence/small.json").read_text()
    (other.folder / "metrics/evidence/small.json").unlink()
    other.run("dvc", "remote", "add", "--local", "-d", "storage", str(tmp_path / "storage"))
    other.run("dvc", "exp", "pull", "-q", "-A", "origin")
    other.run(sys.executable, "-m", "stages.evidence.gather")
    after = re.sub(r',"tried":\{[^}]*\}', "", (other.folder / "metrics/evidence/small.json").read_text())
    assert after == re.sub(r',"tried":\{[^}]*\}', "", before)  # printed where it ran

    (tmp_path / "outside/0.txt").write_text("Other text. " * 500)
    changed_since = r"small-{}-s0 lacks: ashem, random \(computed at revision \w{{8}}; since then {} changed"
    assert re.search(changed_since.format("half", "text"), clone.run(*ask, "--dry-run"))
    with (clone.folder / "lego/model/cost.py").open("a") as file:
        file.write("# changed\n")
    assert re.search(changed_since.format("third", "lego/model"), clone.run(*ask, "--dry-run"))


def load_suites_of(clone: Clone) -> dict[str, Suite]:
    found = yaml.safe_load((clone.folder / "stages/evidence/suites.yaml").read_text())
    return {name: Suite.model_validate(suite) for name, suite in found.items()}
