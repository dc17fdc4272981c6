"""Files: atomic, deterministic, and clear about what is wrong with them."""

from __future__ import annotations

import math

import pytest

from lego.base.artifacts import ArtifactError, atomic_folder, derived_seed, read_json, write_csv, write_json
from lego.base.digests import DIGESTS


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    target = tmp_path / "data" / "out"
    with atomic_folder(target) as folder:
        (folder / "a").write_text("old")
        assert not target.exists()
    with pytest.raises(RuntimeError), atomic_folder(target) as folder:
        (folder / "b").write_text("half")
        raise RuntimeError
    assert sorted(path.name for path in target.iterdir()) == ["a", DIGESTS]
    assert [path.name for path in target.parent.iterdir()] == ["out"]
    with atomic_folder(target) as folder:
        (folder / "c").write_text("new")
    assert sorted(path.name for path in target.iterdir()) == ["c", DIGESTS]
    with atomic_folder(target, digests=False) as folder:
        (folder / "d").write_text("for people")
    assert [path.name for path in target.iterdir()] == ["d"]


def test_json_is_sorted_finite_and_complete(tmp_path):
    path = tmp_path / "m.json"
    write_json(path, {"b": 1, "a": None})
    assert path.read_text() == '{\n  "a": null,\n  "b": 1\n}\n'
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"b": math.nan})
    assert read_json(path) == {"a": None, "b": 1}
    path.write_text('{"a": 1')
    with pytest.raises(ArtifactError, match=r"m\.json: is not valid JSON; take it again from where it came from"):
        read_json(path)
    path.write_text("[1]")
    with pytest.raises(ArtifactError, match="must hold a JSON object"):
        read_json(path)
    with pytest.raises(ArtifactError, match=r"none\.json: cannot be read .* run dvc repro to make it"):
        read_json(tmp_path / "none.json")


def test_csv(tmp_path):
    write_csv(tmp_path / "c.csv", [{"x": 1, "y": 0.5}, {"x": 2, "y": 1e-9}])
    assert (tmp_path / "c.csv").read_text() == "x,y\n1,0.5\n2,1e-09\n"


def test_seeds_differ_by_stage_and_run_and_fit_32_bits():
    seeds = {derived_seed(seed, stage) for seed in range(50) for stage in ("a", "b")}
    assert len(seeds) == 100
    assert all(0 <= seed < 2**32 for seed in seeds)
    assert derived_seed(0, "train_phase1") == derived_seed(0, "train_phase1")
