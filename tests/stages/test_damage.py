"""What a damaged result gets from the stage that reads it: one last line that names file and remedy, no lost result."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from lego.base.artifacts import read_json, read_tensors, write_json, write_tensors
from lego.base.digests import DIGESTS, ArtifactError, verify
from tests.stages.test_bad_input import complaint


def truncate(path: str) -> None:
    content = Path(path).read_bytes()
    Path(path).write_bytes(content[: len(content) // 2])


def edit_json(path: str, **changes: object) -> None:
    content = read_json(path)
    write_json(path, {key: value for key, value in (content | changes).items() if value is not ...})


def other_weights() -> None:
    tensors = read_tensors("data/phase1/model.safetensors")
    tensors["layers.0.mlp.up_proj.weight"] += 1
    write_tensors("data/phase1/model.safetensors", tensors, {"format": "pt"})


def zero_weights() -> None:
    tensors = read_tensors("data/phase1/model.safetensors")
    write_tensors("data/phase1/model.safetensors", {n: t.zero_() for n, t in tensors.items()}, {"format": "pt"})


def flip_a_byte(path: str) -> None:
    content = bytearray(Path(path).read_bytes())
    content[-1] ^= 1
    Path(path).write_bytes(content)


SHARD, TOKENS = "data/hard/shard-00001.safetensors", "data/tokens/train/data-00000-of-00001.arrow"
DAMAGES: dict[str, tuple[str, Callable[[], object], str]] = {
    "no tokens": ("train_phase1", lambda: shutil.rmtree("data/tokens"), r"data/tokens/\S+ cannot be read .*dvc repro"),
    "no split": ("train_phase1", lambda: shutil.rmtree("data/tokens/validation"), r"data/tokens/validation"),
    "truncated tokens": ("train_phase1", lambda: truncate(TOKENS), r"data/tokens/train: was changed"),
    "edited tokens": (
        "train_phase1",
        lambda: flip_tokens(),
        r"data/tokens/train: was changed; bring it back",
    ),
    "truncated facts": (
        "train_phase1",
        lambda: truncate("data/tokens/corpus.json"),
        r"corpus\.json: is not valid JSON",
    ),
    "edited facts": (
        "train_phase1",
        lambda: edit_json("data/tokens/corpus.json", splits=...),
        r"corpus\.json: lacks splits; bring it back with: find",
    ),
    "facts of another kind": (
        "train_phase1",
        lambda: edit_json("data/tokens/corpus.json", vocab_size="many"),
        r"corpus\.json: vocab_size is not as it was written; bring it",
    ),
    "no budget of phase 1": (
        "evaluate_routing",
        lambda: edit_json("data/facts/train_phase1.json", train_macs=...),
        r"data/facts/train_phase1\.json: lacks train_macs; bring it back",
    ),
    "mining without its share": (
        "evaluate_routing",
        lambda: edit_json("data/facts/collect_hard.json", hard_share=...),
        r"data/facts/collect_hard\.json: lacks hard_share",
    ),
    "no model": (
        "compute_threshold",
        lambda: shutil.rmtree("data/phase1"),
        r"data/phase1/config\.json: cannot be read",
    ),
    "truncated model": (
        "compute_threshold",
        lambda: truncate("data/phase1/model.safetensors"),
        r"data/phase1/model\.safetensors: cannot be read as safetensors",
    ),
    "edited model": (
        "compute_threshold",
        lambda: edit_json("data/phase1/config.json", hidden_size=64),
        r"model\.safetensors: does not fit config\.json",
    ),
    "no threshold": (
        "collect_hard",
        lambda: Path("data/facts/compute_threshold.json").unlink(),
        r"data/facts/compute_threshold\.json: cannot be read \(No such file or directory\); run dvc repro",
    ),
    "threshold of another kind": (
        "collect_hard",
        lambda: edit_json("data/facts/compute_threshold.json", threshold="high"),
        r"data/facts/compute_threshold\.json: threshold must be a number in \[0, 1\], got 'high'",
    ),
    "nothing is hard": (
        "collect_hard",
        lambda: edit_json("data/facts/compute_threshold.json", threshold=0.0),
        r"no hard token: no confidence lies below the threshold 0; raise ashem\.hard_example_ratio",
    ),
    "all equally confident": ("compute_threshold", zero_weights, r"all 3,\d+ calibration tokens have the confidence"),
    "store of another model": ("train_phase2", other_weights, r"data/hard: was made by another block1; run dvc repro"),
    "store of another tokenizer": (
        "train_phase2",
        lambda: edit_json("data/hard/manifest.json", tokenizer_sha256="0"),
        r"data/hard: was made by another tokenizer",
    ),
    "no store": ("train_phase2", lambda: shutil.rmtree("data/hard"), r"data/hard/manifest\.json: cannot be read"),
    "no shard": ("train_phase2", lambda: Path(SHARD).unlink(), r"shard-00001\.safetensors: is missing"),
    "truncated shard": ("train_phase2", lambda: truncate(SHARD), r"shard-00001\.safetensors: was changed"),
    "edited shard": ("train_phase2", lambda: flip_a_byte(SHARD), r"shard-00001\.safetensors: was changed"),
    "truncated manifest": (
        "train_phase2",
        lambda: truncate("data/hard/manifest.json"),
        r"manifest\.json: is not valid JSON; bring it back",
    ),
    "manifest without shards": (
        "train_phase2",
        lambda: edit_json("data/hard/manifest.json", shards=[]),
        r"manifest\.json: its counts disagree",
    ),
    "manifest of another kind": (
        "train_phase2",
        lambda: edit_json("data/hard/manifest.json", shards=[3]),
        r"manifest\.json: .*; bring it back with: .*rm -rf data/hard",
    ),
    "no budget": (
        "train_shallow_continued",
        lambda: edit_json("data/facts/added_macs.json", added_macs=1),
        r"data/facts/added_macs\.json: the budget pays for no block; raise ashem\.phase2_epochs",
    ),
    "budget of another kind": (
        "train_shallow_continued",
        lambda: edit_json("data/facts/added_macs.json", added_macs="much"),
        r"data/facts/added_macs\.json: added_macs must be a number in \[0, inf\], got 'much'",
    ),
    "threshold of another model": (
        "evaluate_routing",
        lambda: edit_json("data/exit/exit.json", block1_sha256="0"),
        r"data/exit: thresholds of another block 1; run dvc repro compute_threshold",
    ),
    "no probe": (
        "evaluate_routing",
        lambda: Path("data/exit/probe.safetensors").unlink(),
        r"data/exit/probe\.safetensors: cannot be read",
    ),
    "no yardstick": (
        "evaluate_routing",
        lambda: Path("metrics/details/shallow_continued.json").unlink(),
        r"metrics/details/shallow_continued\.json: cannot be read",
    ),
}


def flip_tokens() -> None:
    content = bytearray(Path(TOKENS).read_bytes())
    content[len(content) // 2] ^= 1
    Path(TOKENS).write_bytes(content)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_input_is_named(folder, capsys, damage):
    stage, break_it, sentence = DAMAGES[damage]
    break_it()
    as_if_meant()
    assert re.search(sentence, complaint(stage, capsys))


def as_if_meant() -> None:
    """Takes the digests away where they tell of a change, as the sentence offers to whoever wanted it."""
    for folder in sorted(Path("data").iterdir()):
        try:
            verify(folder)
        except ArtifactError:
            (folder / DIGESTS).unlink()


READ = {  # stage: what it reads
    "train_phase1": ("data/tokens",),
    "compute_threshold": ("data/tokens", "data/phase1"),
    "collect_hard": ("data/tokens", "data/phase1", "data/facts/compute_threshold.json"),
    "train_phase2": ("data/tokens", "data/phase1", "data/hard", "data/facts/train_phase1.json"),
    "train_shallow_continued": ("data/tokens", "data/phase1", "data/facts/added_macs.json"),
    "evaluate_routing": ("data/tokens", "data/phase2", "data/exit", "data/facts/collect_hard.json"),
}


@pytest.mark.parametrize("stage", READ)
def test_one_flipped_bit_in_whatever_a_stage_reads_is_named(folder, capsys, stage):
    for artifact in map(Path, READ[stage]):
        files = [artifact] if artifact.is_file() else sorted(file for file in artifact.rglob("*") if file.is_file())
        for file in files:
            before, told = file.read_bytes(), file.stat()
            place = before.index(b"0.") + 2 if artifact.is_file() and b"0." in before else len(before) // 2
            file.write_bytes(before[:place] + bytes([before[place] ^ 1]) + before[place + 1 :])
            os.utime(file, ns=(told.st_atime_ns, told.st_mtime_ns))
            line = complaint(stage, capsys)
            assert re.search(rf"error: {file}: is (not as it was written|not valid JSON).*; bring it back with: ", line)
            assert f"rm -rf {artifact}; dvc repro" in line
            file.write_bytes(before)
