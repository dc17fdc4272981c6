"""Killed runs: each stage continues where it was and ends with the same bytes; through dvc as well."""

from __future__ import annotations

import fcntl
import importlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from lego import DeepSupervisionTransformer, Trainer, create_standard_config
from lego.base import code, scratch
from lego.base.artifacts import read_json, sha256
from lego.base.params import load_params
from lego.base.scratch import BusyError, fingerprint, only_run, pipeline_entry
from lego.mining.hidden_states import StoreWriter
from lego.training.epochs import TrainingState
from lego.training.setup import build_training
from tests.conftest import ROOT, VOCAB, Clone, ran, random_batches, run_in_process
from tests.stages.conftest import ORDER, outs

PARAMS = load_params(ROOT / "params.yaml").train.model_copy(update={"warmup_steps": 3})


class KilledError(BaseException):
    """Like kill -9, no `except Exception` sees it."""


def train(folder: Path, epochs: int, killed_after: int | None = None):
    """Phase 1 of a tiny model with schedule and state; optionally dies after an epoch."""
    torch.manual_seed(0)
    model = DeepSupervisionTransformer(VOCAB, 32, 2, 4, exit_layer=2, tie_embeddings=True)
    optimizer, options = build_training(model, 3e-3, 6 * epochs, PARAMS)
    state = TrainingState(folder / "state.safetensors", model, optimizer, options.scheduler)
    trainer = Trainer(create_standard_config(2), VOCAB, options=options)

    class Batches(list):
        def set_epoch(self, epoch: int) -> None:
            if killed_after is not None and epoch == killed_after:
                raise KilledError
            self[:] = random_batches(6, seed=epoch)

    result = trainer.train_with_early_stopping(
        model, Batches(), random_batches(4, seed=99), optimizer, epochs, 2, verbose=False, state=state
    )
    return model.state_dict(), result


@pytest.mark.parametrize("killed_after", [1, 2, 4])
def test_training_continues_to_the_same_bits(tmp_path, killed_after):
    weights, result = train(tmp_path / "a", 5)
    with pytest.raises(KilledError):
        train(tmp_path / "b", 5, killed_after)
    resumed_weights, resumed = train(tmp_path / "b", 5)
    assert resumed == result
    assert all(torch.equal(weights[name], resumed_weights[name]) for name in weights)


def test_a_finished_run_and_one_stopped_by_patience_train_no_further(tmp_path):
    weights, result = train(tmp_path, 5)
    before = (tmp_path / "state.safetensors").read_bytes()
    again_weights, again = train(tmp_path, 5)
    assert again == result
    assert all(torch.equal(weights[name], again_weights[name]) for name in weights)
    assert (tmp_path / "state.safetensors").read_bytes() == before


def test_a_damaged_state_is_a_fresh_start_that_says_so(tmp_path, capsys):
    """Cut short, or with one bit flipped: in its header's length, names, types, JSON, or in any tensor."""
    weights, result = train(tmp_path / "a", 3)
    with pytest.raises(KilledError):
        train(tmp_path / "b", 3, killed_after=2)
    file = tmp_path / "b" / "state.safetensors"
    whole = file.read_bytes()
    header = int.from_bytes(whole[:8], "little")
    places = [0, 3, *range(8, header, header // 12), *range(header + 8, len(whole), len(whole) // 8), len(whole) - 1]
    damaged = [whole[:500], b"", *(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :] for at in places)]
    capsys.readouterr()
    for content in damaged:
        file.write_bytes(content)
        again_weights, again = train(tmp_path / "b", 3)
        assert again == result
        assert all(torch.equal(weights[name], again_weights[name]) for name in weights)
        assert capsys.readouterr().out == f"{file}: is damaged, so training starts afresh\n"
    file.write_bytes(whole)
    assert train(tmp_path / "b", 3)[1] == result
    assert capsys.readouterr().out == ""


def test_the_fingerprint_follows_parameters_inputs_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "params.yaml", "params.yaml")
    Path("data/tokens").mkdir(parents=True)
    Path("data/tokens/corpus.json").write_text("{}")
    first = fingerprint("train_phase1")
    assert fingerprint("train_phase1") == first != fingerprint("tokenize")
    text = Path("params.yaml").read_text()
    Path("params.yaml").write_text(re.sub(r"phase2_lr: \S+", "phase2_lr: 7.0e-04", text))
    assert fingerprint("train_phase1") == first  # not a parameter of it
    Path("params.yaml").write_text(re.sub(r"phase1_lr: \S+", "phase1_lr: 7.0e-04", text))
    assert fingerprint("train_phase1") != first
    Path("params.yaml").write_text(text)
    Path("data/tokens/corpus.json").write_text("{ }")
    assert fingerprint("train_phase1") != first


def test_a_sibling_system_has_stages_code_and_parameters_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for module in (scratch, code):
        monkeypatch.setattr(module, "ROOT", tmp_path)
    folder = tmp_path / "stages/other"
    folder.mkdir(parents=True)
    declared = {"cmd": "python -m stages.other.learn", "deps": ["text.txt"]}
    entry = declared | {"params": [{"stages/other/params.yaml": ["a.b"]}]}
    (folder / "dvc.yaml").write_text(yaml.safe_dump({"stages": {"learn": entry}}))
    (folder / "learn.py").write_text("import stages.other.helper")
    (folder / "helper.py").write_text("")
    found = []
    for section in ({"b": 1, "c": 0}, {"b": 1, "c": 9}, {"b": 2, "c": 0}):
        (folder / "params.yaml").write_text(yaml.safe_dump({"a": section}))
        found.append(fingerprint("other/learn"))
    assert found[0] == found[1] != found[2]
    (folder / "helper.py").write_text("changed = True")  # what dvc.yaml names need not be every module
    assert fingerprint("other/learn") != found[2]
    assert pipeline_entry("other/learn") == entry


def test_a_second_run_of_a_stage_is_refused_and_the_first_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with only_run("demo"):
        pattern = rf"demo is already running here as process {os.getpid()}; wait until it ends, or stop it with kill"
        with pytest.raises(BusyError, match=pattern), only_run("demo"):
            pass
        with only_run("other"):
            pass
    with only_run("demo"):
        pass


def test_a_child_that_is_killed_leaves_no_lock(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = "import time, lego.base.scratch as s\nwith s.only_run('demo'):\n    print(1, flush=True)\n    time.sleep(60)"
    child = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert child.stdout.readline()
    with pytest.raises(BusyError, match=f"process {child.pid};"), only_run("demo"):
        pass
    child.kill()
    child.wait()
    with only_run("demo"):
        pass


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Clone:
    """The pipeline of this tree, run in this process."""
    clone = Clone.of_this_tree(tmp_path_factory.mktemp("clone"))
    run_in_process(clone.folder, ORDER)
    return clone


def digests(stage: str) -> dict[str, str]:
    return {out: sha256(out) for out in sorted(outs(stage))}


@pytest.mark.parametrize("stage", ["train_phase1", "collect_hard", "train_phase2", "train_shallow_continued"])
def test_a_stage_killed_half_way_ends_with_the_same_bytes(clone, monkeypatch, capsys, stage):
    monkeypatch.chdir(clone.folder)
    module, expected = importlib.import_module(f"stages.{stage}"), digests(stage)
    with monkeypatch.context() as patch:
        kind, method = (StoreWriter, "_flush") if stage == "collect_hard" else (TrainingState, "save")
        original = getattr(kind, method)

        def save_and_die(self, *args):
            original(self, *args)
            raise KilledError

        patch.setattr(kind, method, save_and_die)
        with pytest.raises(KilledError):
            module.main()
    assert digests(stage) == expected  # what was published stays until the new result is whole
    capsys.readouterr()
    module.main()
    assert re.search(r"continues after (epoch 1/|\d+\.\d %)", capsys.readouterr().out)
    assert digests(stage) == expected
    assert not (clone.folder / ".scratch" / stage).exists()
    timing = read_json(f"data/timing/{stage}.json")
    assert timing["continued"] is True
    assert not any("per_second" in key for key in timing)  # of a part, over the time of another


@pytest.mark.parametrize("damage", ["a state", "a shape", "the list", "a shard is gone"])
def test_a_damaged_shard_is_noticed_when_mining_continues(clone, monkeypatch, capsys, damage):
    monkeypatch.chdir(clone.folder)
    module, expected = importlib.import_module("stages.collect_hard"), digests("collect_hard")
    original, flushed = StoreWriter._flush, []

    def die_after_two(self, *args):
        original(self, *args)
        flushed.append(1)
        if len(flushed) == 2:
            raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr(StoreWriter, "_flush", die_after_two)
        with pytest.raises(KilledError):
            module.main()
    (shard,) = clone.folder.glob(".scratch/collect_hard/*/store/shard-00000.safetensors")
    file = shard.parent.with_name(".store.progress.json") if damage == "the list" else shard
    content = bytearray(file.read_bytes())
    content[{"a state": -1, "a shape": 60, "the list": 200, "a shard is gone": 0}[damage]] ^= 1
    file.write_bytes(content)
    if damage == "a shard is gone":
        file.unlink()
    capsys.readouterr()
    module.main()
    said = capsys.readouterr().out
    assert ("is damaged, so mining starts afresh" in said) is (damage != "a shard is gone")
    assert digests("collect_hard") == expected


def test_what_an_orphan_finished_is_published_at_once_by_the_next_run(clone, monkeypatch, capsys):
    """Its dvc is dead, so nobody records its results: the state stays, and the rerun trains nothing."""
    monkeypatch.chdir(clone.folder)
    expected = digests("train_phase1")
    parents = iter([1000, 1])  # when the stage starts, and when it ends
    with monkeypatch.context() as patch:
        patch.setattr("lego.base.harness.os.getppid", lambda: next(parents))
        importlib.import_module("stages.train_phase1").main()
    capsys.readouterr()
    importlib.import_module("stages.train_phase1").main()
    output = capsys.readouterr().out
    assert "continues after epoch 3/3" in output
    assert "train loss" not in output
    assert digests("train_phase1") == expected
    assert not Path(".scratch/train_phase1").exists()


@pytest.mark.parametrize("seconds", [1.0, 2.0])
def test_ctrl_c_is_one_line_also_while_a_stage_is_importing(clone, seconds):
    stage = subprocess.Popen(
        [sys.executable, "-m", "stages.tokenize"], cwd=clone.folder, stderr=subprocess.PIPE, text=True
    )
    time.sleep(seconds)
    stage.send_signal(signal.SIGINT)
    error = stage.communicate()[1]
    assert (stage.returncode, "Traceback" in error) == (130, False)
    assert error.strip().splitlines()[-1].startswith("error: interrupted; dvc repro goes on")


def wait_for(condition, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def lock_is_free(clone: Clone) -> bool:
    with (clone.folder / ".scratch/locks/train_phase1").open() as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


@pytest.mark.slow
def test_dvc_and_its_stage_killed_with_9(clone):
    """dvc dies, the stage lives on and is named; then both are dead, and the next run continues."""
    expected = sha256(clone.folder / "data/phase1")
    command = ("dvc", "repro", "--single-item", "--force", "train_phase1")
    clone.run("dvc", "commit", "-f", "-q", "dvc.yaml")
    dvc = subprocess.Popen(command, cwd=clone.folder, env=clone.environment, stdout=subprocess.DEVNULL)
    wait_for(lambda: list(clone.folder.glob(".scratch/train_phase1/*/state.safetensors")))
    child = int((clone.folder / ".scratch/locks/train_phase1").read_text())
    os.kill(child, signal.SIGSTOP)
    dvc.kill()
    dvc.wait()
    output = clone.run(*command, fails=True)
    assert f"error: train_phase1 is already running here as process {child}; wait until it ends" in output
    os.kill(child, signal.SIGKILL)
    wait_for(lambda: not (clone.folder / "data/.phase1.partial").exists() and lock_is_free(clone))
    assert not (clone.folder / "data/phase1").exists()  # dvc removed it when it started the stage
    output = clone.run(*command)
    assert ran(output) == ["train_phase1"]
    assert re.search(r"continues after epoch [12]/3", output)
    assert sha256(clone.folder / "data/phase1") == expected
