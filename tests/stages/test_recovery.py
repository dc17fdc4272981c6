"""The README's way back from a killed experiment, where it is hardest: a fresh clone, its results not committed."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time

import pytest
import yaml

from lego.base.artifacts import sha256
from tests.conftest import ROOT, Clone, ran
from tests.stages.conftest import ORDER, copy_of, outs

RECIPE = (
    (ROOT / "README.md").read_text().split("**After a killed `dvc exp run`**")[1].split("```bash\n")[1].split("```")[0]
)


@pytest.fixture(scope="module")
def clone(reproduced, tmp_path_factory) -> Clone:
    """A clone whose lock names the results of another machine, with results of its own that are not committed."""
    clone = copy_of(reproduced, tmp_path_factory.mktemp("recovery") / "clone")
    file = clone.folder / "dvc.lock"
    own = file.read_text()
    lock = yaml.safe_load(own)
    for stage in lock["stages"].values():
        for entry in (*stage["deps"], *stage["outs"]):
            if entry["path"].startswith("data/"):
                entry["md5"] = entry["md5"].translate(str.maketrans("0123456789abcdef", "123456789abcdef0"))
    file.write_text(yaml.safe_dump(lock, sort_keys=False))
    clone.commit("results of another machine")
    file.write_text(own)
    assert ran(clone.run("dvc", "repro")) == []
    assert clone.run("git", "status", "--short").split() == ["M", "dvc.lock"]
    return clone


def start_and_kill(clone: Clone, line: str) -> None:
    """An experiment, killed with all its processes a moment after it said this."""
    log = clone.folder / ".scratch/experiment.log"
    with log.open("w") as output:
        child = subprocess.Popen(
            ["dvc", "exp", "run", "-S", "ashem.hard_example_ratio=0.4"],
            cwd=clone.folder,
            env=clone.environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        while not re.search(line, log.read_text()):
            assert child.poll() is None, log.read_text()
            time.sleep(0.05)
        time.sleep(0.5)
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()


@pytest.mark.slow
@pytest.mark.parametrize(
    "line", ["Reproducing experiment", "Running stage 'collect_hard'", "Running stage 'train_phase2'"]
)
def test_the_recipe_brings_everything_back_and_runs_nothing(clone, line):
    results = {out: sha256(clone.folder / out) for stage in ORDER for out in outs(stage)}
    lock, branch = (clone.folder / "dvc.lock").read_bytes(), clone.run("git", "branch", "--show-current").strip()
    start_and_kill(clone, line)
    assert "HEAD detached" in clone.run("git", "status")
    said = ""
    for command in RECIPE.strip().splitlines():
        words = command.split("#")[0].replace("checkout main", f"checkout {branch}").split()
        said = clone.run(*words)
    assert ran(said) == []
    assert results == {out: sha256(clone.folder / out) for out in results}
    assert lock == (clone.folder / "dvc.lock").read_bytes()
    assert clone.run("git", "branch", "--show-current").strip() == branch
