"""The pipeline of this tree with tiny parameters, in a temporary git repository or in this process."""

from __future__ import annotations

import importlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from conftest import ROOT

from lego.artifacts import read_json

TINY = {
    "vocab_size": 300,
    "max_tokenizer_bytes": 200_000,
    "max_train_tokens": 60_000,
    "max_validation_tokens": 2_500,
    "max_calibration_tokens": 4_000,
    "max_test_tokens": 2_500,
    "dim": 32,
    "ffn_dim": 64,
    "seq_len": 32,
    "batch_size": 8,
    "tokens_per_epoch": 8_000,
    "warmup_steps": 2,
    "phase1_lr": "3.0e-03",
    "phase1_epochs": 3,
    "phase2_lr": "1.0e-03",
    "phase2_epochs": 2,
    "lr": "1.0e-03",
    "shard_tokens": 9_000,
    "threads": 1,
}


COPIED = {"lego", "stages", "tables", "text", ".ci", ".dvc", ".dvcignore", ".gitignore", "dvc.yaml", "params.yaml"}


class Clone:
    """A git repository in a temporary folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def of_this_tree(cls, folder: Path) -> Clone:
        """A new repository with this tree's pipeline and tiny parameters."""
        files = subprocess.run(
            ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
        )
        for name in files.stdout.splitlines():
            if name.split("/")[0] in COPIED and not name.endswith("dvc.lock"):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, folder / name)
        text = (folder / "params.yaml").read_text()
        for key, value in TINY.items():
            text, count = re.subn(rf"(?m)^(  {key}: )\S+", rf"\g<1>{value}", text)
            assert count >= 1, key
        (folder / "params.yaml").write_text(text)
        clone = cls(folder)
        clone.run("git", "init", "-q")
        clone.commit("the tree")
        return clone

    def run(self, *command: str, fails: bool = False) -> str:
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        identity = {
            f"GIT_{who}_{what}": "lego@example.org" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")
        }
        done = subprocess.run(
            command,
            cwd=self.folder,
            env=os.environ | identity | {"PATH": path, "DVC_NO_ANALYTICS": "1"},
            capture_output=True,
            text=True,
        )
        assert (done.returncode != 0) == fails, f"{' '.join(command)}:\n{done.stdout}\n{done.stderr}"
        return done.stdout + done.stderr

    def commit(self, message: str) -> None:
        self.run("git", "add", "-A")
        self.run("git", "commit", "-qm", message)

    def json(self, name: str) -> dict:
        return read_json(self.folder / name)


def ran(output: str) -> list[str]:
    return re.findall(r"^Running stage '(\w+)':$", output, re.M)


def run_in_process(folder: Path, stages: list[str]) -> None:
    """Runs stages one after another in this process, in a folder with params.yaml."""
    before = os.getcwd()
    os.chdir(folder)
    try:
        for stage in stages:
            importlib.import_module(f"stages.{stage}").main()
    finally:
        os.chdir(before)
