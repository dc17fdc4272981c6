"""Files: atomic, deterministic, and clear about what is wrong with them."""

from __future__ import annotations

import math

import pytest
import torch

from lego import DeepSupervisionTransformer, StandardTransformer, grow_model, load_model, save_model
from lego.base.artifacts import (
    ArtifactError,
    atomic_folder,
    derived_seed,
    read_json,
    sha256,
    write_csv,
    write_json,
    write_tensors,
)
from lego.base.harness import Stage, StageError, exit_cleanly, resolve_device
from lego.base.progress import share, track
from tests.conftest import VOCAB, logits_close


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    target = tmp_path / "data" / "out"
    with atomic_folder(target) as folder:
        (folder / "a").write_text("old")
        assert not target.exists()
    with pytest.raises(RuntimeError), atomic_folder(target) as folder:
        (folder / "b").write_text("half")
        raise RuntimeError
    assert [path.name for path in target.iterdir()] == ["a"]
    assert [path.name for path in target.parent.iterdir()] == ["out"]
    with atomic_folder(target) as folder:
        (folder / "c").write_text("new")
    assert [path.name for path in target.iterdir()] == ["c"]


def test_json_is_sorted_finite_and_complete(tmp_path):
    path = tmp_path / "m.json"
    write_json(path, {"b": 1, "a": None})
    assert path.read_text() == '{\n  "a": null,\n  "b": 1\n}\n'
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"b": math.nan})
    assert read_json(path) == {"a": None, "b": 1}
    path.write_text('{"a": 1')
    with pytest.raises(ArtifactError, match=r"m\.json: is not valid JSON; run dvc checkout or dvc repro"):
        read_json(path)
    path.write_text("[1]")
    with pytest.raises(ArtifactError, match="must hold a JSON object"):
        read_json(path)
    with pytest.raises(ArtifactError, match=r"none\.json: cannot be read .* run dvc repro to make it"):
        read_json(tmp_path / "none.json")


def test_csv(tmp_path):
    write_csv(tmp_path / "c.csv", [{"x": 1, "y": 0.5}, {"x": 2, "y": 1e-9}])
    assert (tmp_path / "c.csv").read_text() == "x,y\n1,0.5\n2,1e-09\n"


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["standard", "routed", "own head"])
def test_a_saved_model_is_the_same_model(tmp_path, tied, kind):
    if kind == "standard":
        model = StandardTransformer(VOCAB, 32, 2, 4, tie_embeddings=tied, num_kv_heads=2, rope_theta=123.0)
    else:
        block1 = DeepSupervisionTransformer(VOCAB, 32, 2, 4, exit_layer=2, tie_embeddings=tied)
        head = "own" if kind == "own head" else "shared"
        model = grow_model(block1, 3, routing_threshold=0.25, block2_context="token", head=head)
    save_model(model, tmp_path)
    loaded = load_model(tmp_path)
    assert type(loaded) is type(model)
    assert loaded.sizes == model.sizes
    x = torch.randint(0, VOCAB, (2, 6))
    assert torch.equal(loaded(x), model(x))
    for name in ("exit_layer", "routing_threshold", "block2_context"):
        assert getattr(loaded, name, None) == getattr(model, name, None)
    assert (loaded.output_head.weight is loaded.embedding.weight) == tied
    first = sha256(tmp_path)
    save_model(loaded, tmp_path)
    assert sha256(tmp_path) == first


def test_a_damaged_model_folder_is_named(tmp_path):
    save_model(StandardTransformer(VOCAB, 32, 1, 4), tmp_path)
    config = read_json(tmp_path / "config.json")
    write_json(tmp_path / "config.json", config | {"hidden_size": 64})
    with pytest.raises(ArtifactError, match=r"model\.safetensors: does not fit config\.json"):
        load_model(tmp_path)
    write_json(tmp_path / "config.json", {"vocab_size": 3})
    with pytest.raises(ArtifactError, match=r"config\.json: describes no model"):
        load_model(tmp_path)
    write_json(tmp_path / "config.json", config)
    weights = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights[:100])
    with pytest.raises(ArtifactError, match=r"model\.safetensors: cannot be read as safetensors"):
        load_model(tmp_path)
    save_model(StandardTransformer(VOCAB, 32, 1, 4, tie_embeddings=True), tmp_path)
    write_tensors(tmp_path / "model.safetensors", {"other": torch.zeros(1)})
    with pytest.raises(ArtifactError, match=r"model\.safetensors: does not fit config\.json"):
        load_model(tmp_path)


def test_a_grown_model_starts_with_block_1s_function(tmp_path):
    block1 = DeepSupervisionTransformer(VOCAB, 32, 2, 4, exit_layer=2)
    grown = grow_model(block1, 4)
    x = torch.randint(0, VOCAB, (2, 6))
    logits_close(grown.forward_train(x)["shallow_logits"], block1(x), 0)


def test_a_stage_records_time_and_versions_apart_from_its_results(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lego.base.harness.fingerprint", lambda name: "f00d")
    with Stage("demo", seed=3, threads=2) as stage:
        (stage.keep("best") / "x").write_text("kept until success")
        stage.record["counts"] = {"tokens": 10}
    record = read_json("data/timing/demo.json")
    assert record["threads"] == 2
    assert record["torch_version"] == torch.__version__
    assert record["tokens_per_second"] == pytest.approx(10 / record["seconds"])
    assert "python_executable" in record
    assert not stage.scratch.exists()
    with pytest.raises(RuntimeError), Stage("demo") as stage:
        stage.keep("best")
        raise RuntimeError
    assert stage.scratch.exists()
    assert capsys.readouterr().err == "demo: the best model it reached is in .scratch/demo/f00d/\n"
    with pytest.raises(RuntimeError), Stage("demo"):
        raise RuntimeError
    assert capsys.readouterr().err == ""  # what lies there is another run's


def test_seeds_differ_by_stage_and_run_and_fit_32_bits():
    seeds = {derived_seed(seed, stage) for seed in range(50) for stage in ("a", "b")}
    assert len(seeds) == 100
    assert all(0 <= seed < 2**32 for seed in seeds)
    assert derived_seed(0, "train_phase1") == derived_seed(0, "train_phase1")


def test_errors_a_user_can_mend_become_one_line_without_traceback(capsys):
    def main() -> None:
        raise StageError("something to mend")

    with pytest.raises(SystemExit) as stop:
        exit_cleanly(main)
    assert stop.value.code == 1
    line = capsys.readouterr().err
    assert line.startswith(
        "error: something to mend (earlier results come back with: git checkout params.yaml dvc.lock"
    )
    assert line.count("\n") == 1

    def bug() -> None:
        raise KeyError("a bug keeps its traceback")

    with pytest.raises(KeyError):
        exit_cleanly(bug)


def test_devices():
    assert resolve_device("cpu").type == "cpu"
    assert resolve_device("auto").type in {"cpu", "cuda", "mps"}
    if not torch.cuda.is_available():
        with pytest.raises(StageError, match=r"train\.device is cuda, but this machine has none; use auto or cpu"):
            resolve_device("cuda")


def test_progress_prints_plain_lines_at_intervals(capsys, monkeypatch):
    clock = iter(range(0, 1000, 4))
    monkeypatch.setattr("lego.base.progress.time.monotonic", lambda: float(next(clock)))
    assert list(track(range(9), 9, "mining", "batch")) == list(range(9))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3  # every third step of 4 s passes 10 s
    assert lines[0] == "mining: 3/9 batch (33 %), 0.25batch/s, 00:24 left"
    assert list(track(iter(["a", "bc", "def"]), None, "reading", "token", size=len)) == ["a", "bc", "def"]
    assert capsys.readouterr().err.splitlines() == ["reading: 6 token, 0.50token/s"]


def test_shares_show_their_base():
    assert share(41_984, 80_256) == "52.3 % (41,984/80,256 tokens)"
