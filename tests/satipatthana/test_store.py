"""Saving and loading a system: the same numbers again, later parts of other sizes, and damage that is named."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from lego.base.artifacts import ArtifactError
from lego.satipatthana.curriculum import advance, begin, how_to_use, resume
from lego.satipatthana.store import load, save
from tests.satipatthana.conftest import ONCE, a_task, small

DAMAGE = [  # of system.json: values that cannot be those that were written
    ("shape", []),
    ("shape", [0]),
    ("shape", "12"),
    ("outputs", 2),
    ("outputs", None),
    ("classes", ["a", "b"]),
    ("classes", ["a", "a", "b"]),
    ("shape", [10**30]),
    ("columns", ["a"]),
    ("mean", [0.0]),
    ("mean", None),
    ("std", [0.0] * 12),
    ("temperature", 0),
    ("temperature", "warm"),
    ("threshold", None),
    ("answer", [1.0]),
    ("trust", {"x": [0.0, 1.0], "y": [0.0]}),
    ("trust", [0, 1]),
    ("trust", {"x": [1.0, 0.0], "y": [0.0, 1.0]}),
    ("guide", True),
    ("parameters", {}),
]


def test_r4_3_and_r4_4_a_saved_system_is_the_same_and_errors_are_of_what_was_encoded(tmp_path):
    params, task = small(**ONCE), a_task()
    made = begin(task, params, 0)
    for number in range(4):
        advance(made, number, task, params, 0)
        folder = tmp_path / str(number)
        folder.mkdir()
        save(made, folder, how_to_use(made, task, params.reject))
        again, _ = load(folder)
        assert torch.equal(again(task.test.x).trust, made(task.test.x).trust)
    (tmp_path / "out").mkdir()
    use = how_to_use(made, task, params.reject)
    save(made, tmp_path / "out", use, guide=False)
    exported, same = load(tmp_path / "out")
    assert exported.aux is None
    assert (same.threshold, same.temperature) == (use.threshold, use.temperature)
    assert torch.equal(exported(task.test.x).output, made(task.test.x).output)
    noisy = made.samatha(task.test.x, 1.0, generator=torch.Generator().manual_seed(0))
    expected = (made.samatha_recon(noisy.state) - noisy.encoded).square().mean(1, keepdim=True)
    torch.testing.assert_close(made.look(noisy)[1], expected)
    assert not torch.equal(noisy.encoded, task.test.x)
    weights = (tmp_path / "out/system.safetensors").read_bytes()
    (tmp_path / "out/system.safetensors").write_bytes(weights[:-8])
    with pytest.raises(ArtifactError, match=r"system\.safetensors: cannot be read as safetensors"):
        load(tmp_path / "out")
    (tmp_path / "out/system.safetensors").write_bytes(weights)
    facts = json.loads((tmp_path / "out/system.json").read_text())
    (tmp_path / "out/system.json").write_text(json.dumps(facts | {"temperature": 10**30}))
    assert isinstance(load(tmp_path / "out")[1].temperature, float)
    broken = exported.state_dict() | {"vicara.inner": torch.full_like(exported.vicara.inner, torch.nan)}
    save_file(broken, tmp_path / "out/system.safetensors")
    with pytest.raises(ArtifactError, match=r"system\.safetensors: holds weights that are not finite"):
        load(tmp_path / "out")
    (tmp_path / "out/system.safetensors").write_bytes(weights)
    for key, value in DAMAGE:
        (tmp_path / "out/system.json").write_text(json.dumps(facts | {key: value}))
        with pytest.raises(ArtifactError, match=r"system\.(json|safetensors): "):
            load(tmp_path / "out")


def test_a_later_part_of_another_size_leaves_the_trained_ones_as_they_are(tmp_path):
    """So a changed parameter of stage 2 needs nothing before it to run again."""
    params, task = small(**ONCE), a_task()
    made = begin(task, params, 0)
    for number in range(2):
        advance(made, number, task, params, 0)
    save(made, tmp_path, how_to_use(made, task, params.reject))
    other = resume(task, small(**(ONCE | {"vipassana__hidden": 9, "heads__decoder_hidden": 5})), 0, 1, tmp_path)
    assert torch.equal(other.samatha(task.test.x).state, made.samatha(task.test.x).state)
    assert torch.equal(other.samatha_recon.trunk[0].weight, made.samatha_recon.trunk[0].weight)
    with pytest.raises(ArtifactError, match="is not of these parameters; run dvc repro stages/satipatthana"):
        resume(task, small(**(ONCE | {"adapter__hidden": 9})), 0, 1, tmp_path)
