"""What is read is what was written: each flipped bit is named, with commands that bring the file back."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest
import torch

from lego.base import digests
from lego.base.artifacts import (
    ArtifactError,
    atomic_folder,
    identity,
    publish,
    read_json,
    read_tensors,
    write_facts,
    write_json,
    write_tensors,
)
from lego.base.digests import DIGESTS, inside, of_tensors, verify, way_back


def flip(file: Path, place: int) -> None:
    """One bit, with the times as they were: rot, which DVC does not see."""
    told = file.stat()
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(told.st_atime_ns, told.st_mtime_ns))


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """data/out, as a stage publishes it; the working folder is above it."""
    monkeypatch.chdir(tmp_path)
    with atomic_folder("data/out") as made:
        write_tensors(made / "w.safetensors", {"w": torch.arange(300.0)})
        (made / "deep").mkdir()
        write_json(made / "deep" / "facts.json", {"number": 7})
    return Path("data/out")


def test_every_flipped_bit_of_an_artifact_is_named_with_its_file(folder):
    assert read_json(folder / "deep/facts.json") == {"number": 7}
    read_tensors(folder / "w.safetensors")
    for name, read in (("w.safetensors", read_tensors), ("deep/facts.json", read_json)):
        file = folder / name
        for place in range(0, file.stat().st_size, 7):
            flip(file, place)
            with pytest.raises(ArtifactError, match=f"^{file}: is not as it was written; bring it back with: "):
                read(file)
            flip(file, place)
        read(file)
    for place in range(0, (folder / DIGESTS).stat().st_size):
        before = (folder / DIGESTS).read_bytes()
        flip(folder / DIGESTS, place)
        try:
            verify(folder)
        except ArtifactError as error:
            assert str(error).startswith(f"{folder}/")  # noqa: PT017 - white space may flip unseen
        else:
            assert before[place : place + 1].isspace()
        flip(folder / DIGESTS, place)


def test_a_folder_is_whole_or_named_and_others_are_not_checked(folder):
    assert verify(folder) is verify(folder / "deep") is True
    assert identity(folder) == identity(folder)
    (folder / "w.safetensors").unlink()
    with pytest.raises(ArtifactError, match=r"w\.safetensors: is missing; bring it back with: rm -rf data/out; dvc r"):
        identity(folder)
    verify(folder / "deep")  # another part of it
    write_json("data/given/config.json", {"a": 1})
    assert verify("data/given") is False
    (folder / DIGESTS).unlink()  # what the sentence offers to those who meant the change
    assert verify(folder) is False


def test_each_file_is_hashed_once_in_a_process(folder, monkeypatch):
    monkeypatch.setattr(digests, "SETTLED", -1.0)
    counted: list[Path] = []
    real = digests.sha256
    monkeypatch.setattr(digests, "sha256", lambda path: counted.append(path) or real(path))
    for _ in range(3):
        read_tensors(folder / "w.safetensors")
    assert counted == [folder / "w.safetensors"]


def test_a_file_that_stands_alone_holds_its_own_digest(tmp_path):
    file = tmp_path / "facts.json"
    write_facts(file, {"threshold": 0.25, "split": "train", "none": None, 3: [1]})
    assert read_json(file) == {"threshold": 0.25, "split": "train", "none": None, "3": [1]}
    text = file.read_text()
    file.write_text(text.replace("0.25", "0.35"))
    with pytest.raises(ArtifactError, match=r"facts\.json: is not as it was written; .*remove its key sha256_of_con"):
        read_json(file)


def test_the_way_back_names_the_pipeline_that_makes_the_file(folder, tmp_path):
    assert way_back("/srv/models/config.json") == "take it again from where it came from"
    cached = 'find "$(dvc cache dir)" -samefile'
    file = "data/out/w.safetensors"
    assert way_back(file) == f"bring it back with: {cached} {file} -delete; rm -rf data/out; dvc repro"
    for name, pipeline in (
        ("data/facts/x.json", "dvc repro"),
        ("data/cvfp/phase1", "dvc repro stages/cvfp/dvc.yaml"),
        ("metrics/satipatthana/x.json", "dvc repro stages/satipatthana/dvc.yaml"),
        ("data/baseline/dense", "dvc repro stages/evidence/dvc.yaml"),
        ("data/baseline/shallow_continued", "dvc repro"),
    ):
        assert way_back(name) == f"bring it back with: rm -rf {name}; {pipeline}"


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../x", "", None, 3, "a\\..\\x", "x\0y"])
def test_a_list_names_no_file_outside_its_folder(tmp_path, name):
    with pytest.raises(ArtifactError, match=r"index\.json: names the file .*which does not lie in"):
        inside(tmp_path, name, tmp_path / "index.json")
    assert inside(tmp_path, "a/b", "index.json") == tmp_path / "a/b"


def test_the_digest_of_tensors_covers_names_types_shapes_and_bits():
    one = {"a": torch.zeros(2, 3), "b": torch.tensor(1.0, dtype=torch.bfloat16), "c": torch.empty(0)}
    others = [one | {"a": torch.zeros(3, 2)}, one | {"a": torch.zeros(2, 3, dtype=torch.int32)}, {"z": one["a"]}]
    others += [one | {"b": torch.tensor(-1.0, dtype=torch.bfloat16)}]
    assert len({of_tensors(each) for each in (one, *others)} | {of_tensors(one, "text")}) == 6
    assert of_tensors(one) == of_tensors(dict(reversed(one.items())))


def test_data_may_lie_on_another_disk_and_a_full_one_is_named(tmp_path, monkeypatch):
    def another_disk(*_: object) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    def full(source: Path, target: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(source))

    made, target = tmp_path / "scratch" / "store", tmp_path / "data" / "hard"
    (made / "deep").mkdir(parents=True)
    (made / "deep" / "shard").write_text("states")
    monkeypatch.setattr(os, "rename", another_disk)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfile", full)
        with pytest.raises(OSError, match="No space left") as error:
            publish(made, target)
    assert error.value.filename.startswith(f"{target.parent}/.hard.partial/")  # what is full is not scratch
    assert list(target.parent.iterdir()) == []
    assert (made / "deep" / "shard").exists()  # nothing is lost
    publish(made, target)
    assert sorted(path.name for path in target.iterdir()) == ["deep", DIGESTS]
    assert verify(target)
    assert not made.exists()
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize("write", [write_json, write_tensors])
def test_a_full_disk_is_named_and_leaves_no_part(tmp_path, monkeypatch, write):
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")  # as fsync says it, without a name

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as error:
        write(tmp_path / "file", {"a": torch.ones(1) if write is write_tensors else 1})
    assert error.value.filename == str(tmp_path / "file")
    assert list(tmp_path.iterdir()) == []
