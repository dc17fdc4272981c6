"""What each fault gets: one last line on stderr that names key or file and the remedy, no traceback, no lost result.

Files of text that cannot be read stand in test_faulty_files.py, wrong values of params.yaml in test_params.py, damaged
results in test_damage.py; here are those that a stage's main() meets, in this process, and some that go through dvc.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from lego.base.artifacts import sha256
from lego.base.harness import exit_cleanly
from tests.conftest import ROOT, Clone, run_in_process
from tests.stages.conftest import ORDER, outs

RECOVERY = "(mend it and run the same command again: what was made before comes from dvc's cache)"


def set_key(key: str, value: str) -> None:
    """`key` with its section; only the value is replaced, comments stay."""
    section, name = key.split(".")
    path = Path("params.yaml")
    head, rest = path.read_text().split(f"\n{section}:\n")
    rest, count = re.subn(rf"(?m)^(  {name}: )\S+", lambda match: match[1] + value, rest, count=1)
    assert count == 1, key
    path.write_text(f"{head}\n{section}:\n{rest}")


def results() -> dict[str, str]:
    return {out: sha256(out) for stage in ORDER for out in outs(stage) if Path(out).exists()}


def complaint(stage: str, capsys) -> str:
    """Runs a stage that must fail; its one line, with all earlier results still in place."""
    before = results()
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        exit_cleanly(importlib.import_module(f"stages.{stage}").main)
    errors = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 1
    assert errors[-1].startswith("error: ")
    assert errors[-1].endswith(RECOVERY)
    assert not any("Traceback" in line for line in errors)
    assert results() == before
    return errors[-1]


KEYS = [  # stage, keys to set, what it says
    (
        "tokenize",
        {"model.seq_len": "90000"},
        r"model\.seq_len is 90000, but the \w+ split has only \d+ tokens",
    ),
    (
        "tokenize",
        {"data.test_share": "1.0e-09"},
        r"data\.test_share leaves the test split without a document",
    ),
    ("tokenize", {"data.source": "hub"}, r"params\.yaml: data\.hub_name must name a dataset when data\.source is hub"),
    ("tokenize", {"data.source": "web"}, r"data\.source must be one of 'python-stdlib', 'text' or 'hub', got 'web'"),
    ("tokenize", {"data.tokenizer": "pretrained"}, r"data\.pretrained must name a tokenizer or its folder"),
    (
        "tokenize",
        {"data.tokenizer": "pretrained", "data.pretrained": "nowhere"},
        r"params\.yaml: data\.pretrained nowhere cannot be loaded as a tokenizer \(.*give a folder with",
    ),
    ("tokenize", {"data.split_on": "(["}, r"data\.split_on must be a regular expression \(.*\), got '\(\['"),
    ("tokenize", {"data.source": "text", "data.path": "nothing"}, r"error: nothing: holds no text; put files there"),
    (
        "tokenize",
        {"data.source": "text", "data.path": "gone"},
        r"error: gone: is missing; set .*data\.path",
    ),
    ("tokenize", {"data.path": "data/tokens"}, r"data\.path must name a file or folder outside data/ and metrics/"),
    ("tokenize", {"model.seq_len": "9999999"}, r"model\.seq_len must be at most 1,048,576, got 9999999"),
    ("tokenize", {"data.split_on": "a{99999999999999999999}"}, r"data\.split_on must be a regular expression"),
    ("tokenize", {"data.source": "text", "data.path": "text/empty.txt"}, r"text/empty\.txt: is empty"),
    ("tokenize", {"data.source": "text", "data.path": "text/one.txt"}, r"of 1 different ones.*data\.split_on"),
    ("tokenize", {"data.source": "text", "data.path": "text/binary.md"}, r"text/binary\.md: holds zero bytes"),
    ("tokenize", {"data.source": "text", "data.path": "text/cut.parquet"}, r"text/cut\.parquet: cannot be read"),
    (
        "tokenize",
        {"data.source": "hub", "data.hub_name": "nobody/nothing", "data.hub_revision": "v9"},
        r"data\.hub_name nobody/nothing train v9 cannot be loaded \(.*\); check data\.hub_name, hub_config",
    ),
    ("train_phase1", {"model.dim": "30"}, r"model\.dim must be a multiple of 2 \* num_heads = 8"),
    ("train_phase1", {"ashem.phase1_lr": "1.0e+30"}, r"epoch 1: .* step \d+ of the epoch, learning rate .*lower the"),
    ("train_phase1", {"train.device": "cuda"}, r"train\.device is cuda, but this machine has none; use auto or cpu"),
    (
        "train_phase1",
        {"train.device": "tpu"},
        r"train\.device must be one of 'auto', 'cpu', 'cuda' or 'mps'",
    ),
    ("train_phase1", {"ashem.phase2_share": "0.9999"}, r"is empty; change params\.yaml: ashem\.phase2_share"),
    ("train_phase1", {"train.threads": "0"}, r"train\.threads must be at least 1, got 0"),
    ("collect_hard", {"ashem.store_dtype": "int8"}, r"ashem\.store_dtype must be one of 'float32', 'float16'"),
    ("train_phase2", {"ashem.phase2_layers": "1"}, r"phase2_layers is the total depth and must be greater than"),
    ("train_phase2", {"ashem.phase2_lr": "1.0e+30"}, r"learning rate .*(the best epoch|none was better).*; lower the"),
    ("evaluate_routing", {"evaluation.sweep_points": "1"}, r"evaluation\.sweep_points must be at least \d+, got 1"),
    ("train_phase1", {"ashem.phase1_epochs": "0"}, r"phase1_epochs must be at least 1 unless model\.init_from names"),
    ("train_phase1", {"model.init_from": "nowhere"}, r"model\.init_from nowhere cannot be loaded as a model \("),
    ("tokenize", {"model.init_from": "nowhere"}, r"model\.init_from nowhere cannot be loaded as a tokenizer \("),
    ("compute_threshold", {"exits.fit_share": "0.0001"}, r"exits\.fit_share 0\.0001 of \d+ blocks of calibration text"),
    ("evaluate_routing", {"routing.criterion": "hope"}, r"routing\.criterion must be one of 'max_prob', 'margin'"),
    (
        "evaluate_routing",
        {"routing.calibration": "risk"},
        r"routing\.calibration risk needs 500 blocks of calibration text after exits\.fit_share, got \d+; raise data\.",
    ),
]


@pytest.mark.parametrize(("stage", "keys", "sentence"), KEYS, ids=lambda value: str(value)[:40])
def test_a_value_that_cannot_work_names_its_key(folder, capsys, monkeypatch, stage, keys, sentence):
    if keys.get("train.device") == "cuda" and torch.cuda.is_available():
        pytest.skip("this machine has one")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)  # the hub is out of reach
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    Path("text/empty.txt").touch()
    Path("nothing").mkdir()
    Path("text/one.txt").write_text("one document")
    Path("text/binary.md").write_bytes(b"\x00\x01")
    Path("text/cut.parquet").write_bytes(b"PAR1 and no more")
    for key, value in keys.items():
        set_key(key, value)
    assert re.search(sentence, complaint(stage, capsys))


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, r"params\.yaml: cannot be read \(No such file or directory\); run from the repository root"),
        (b"seed: [", r"params\.yaml: is not valid YAML at line 1"),
        (b"\xff\xfe\x00", r"params\.yaml: is not valid YAML"),
        (b"", r"params\.yaml: must hold the sections seed, data"),
        (b"seed: 0\nseed: 1\n", r"params\.yaml: seed is given twice, again at line 2; remove one"),
        (b"seed: 0\n", r"params\.yaml: data is missing"),
    ],
)
def test_a_parameter_file_that_cannot_be_read(folder, capsys, content, sentence):
    Path("params.yaml").unlink()
    if content is not None:
        Path("params.yaml").write_bytes(content)
    assert re.search(sentence, complaint("train_phase2", capsys))


@contextmanager
def full_disk(largest_file: int) -> Iterator[None]:
    """No file may grow beyond this; as on a full disk, writing then fails half-way."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("stage", ["tokenize", "train_phase1", "collect_hard", "train_phase2"])
def test_a_full_disk_loses_nothing(folder, capsys, stage):
    with full_disk(20_000):
        line = complaint(stage, capsys)
    assert re.search(r"error: \S+: (cannot be written \(.*\); make room|File too large; make room)", line)
    before = results()
    importlib.import_module(f"stages.{stage}").main()  # with room again, it ends as before
    assert before == results()


@contextmanager
def unprivileged() -> Iterator[None]:
    """Root may write everywhere."""
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_no_write_permission_names_the_folder(folder, capsys):
    for path in [Path(), *Path().rglob("*")]:
        path.chmod(path.stat().st_mode | (0o555 if path.is_dir() else 0o444))
    Path(".scratch/locks/compute_threshold").chmod(0o666)
    folder.joinpath("data/facts").chmod(0o555)
    try:
        with unprivileged():
            line = complaint("compute_threshold", capsys)
    finally:
        folder.joinpath("data/facts").chmod(0o755)
    assert re.search(r"error: data/facts/\S+: Permission denied; let this user write there", line)


def test_a_cache_that_cannot_be_written_is_named(folder, capsys, monkeypatch):
    (folder / "dataset").mkdir()
    (folder / "dataset" / "train.jsonl").write_text('{"text": "a"}\n')
    (folder / "file").touch()
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", folder / "file" / "cache")  # a file is no folder
    set_key("data.source", "hub")
    set_key("data.hub_name", "dataset")
    line = complaint("tokenize", capsys)
    assert "data.hub_name dataset train cannot be loaded" in line
    assert "that the folder HF_HOME names can be written" in line


def test_a_python_without_the_packages_says_which_command_is_missing(tmp_path):
    bare = [sys.executable, "-S", "-m", "stages.tokenize"]  # -S: without the environment's packages
    done = subprocess.run(bare, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert re.fullmatch(r"error: \S+ lacks torch, .*: run \. \.venv/bin/activate first, then pip .*\n", done.stderr)


@pytest.mark.slow
def test_through_dvc_a_fault_in_the_text_leaves_the_way_back(tmp_path):
    """Damaged text, then a missing folder: dvc names what it misses, the stage what it cannot read."""
    clone = Clone.of_this_tree(tmp_path)
    run_in_process(clone.folder, ORDER)
    clone.run("dvc", "commit", "-f", "-q", "dvc.yaml")
    clone.commit("the results")
    lock = (clone.folder / "dvc.lock").read_bytes()
    before = sha256(clone.folder / "data")
    (clone.folder / "text" / "binary.txt").write_bytes(b"\x00")
    command = ("dvc", "exp", "run", "tokenize", "-S", "data.source=text")
    output = clone.run(*command, fails=True)
    assert (
        f"error: text/binary.txt: holds zero bytes, so it is not text; remove it or convert it to UTF-8 {RECOVERY}"
        in output
    )
    assert "Traceback" not in output
    output = clone.run(*command, "-S", "data.path=nowhere", fails=True)
    assert re.search(r"ERROR: failed to reproduce 'tokenize': .*nowhere", output)  # dvc's own sentence
    (clone.folder / "text" / "binary.txt").unlink()
    clone.run("git", "checkout", "params.yaml", "dvc.lock", "metrics")
    clone.run("dvc", "checkout")
    assert (clone.folder / "dvc.lock").read_bytes() == lock
    assert sha256(clone.folder / "data") == before
    assert json.loads(clone.run("dvc", "status", "--json", "dvc.yaml")) == {}
