"""CVFP's parameters: profiles, values that are refused, data with keys in two files, and where embeddings come from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from lego.base.artifacts import write_json
from lego.base.harness import StageError
from lego.base.parameter_files import ParamsError
from lego.cvfp.contest import size_on_paper
from lego.cvfp.sections import OWN, CvfpParams, changed, load, profiles, with_profile
from lego.cvfp.store import EmbeddingError, build, embedding_matrix
from stages.cvfp.tokenize import of_this_pipeline, require_one_path
from tests.conftest import ROOT
from tests.cvfp.conftest import PARAMS

LEFT_OUT = "left out"


def test_every_profile_is_valid_and_changes_what_it_says():
    file = ROOT / "stages/cvfp/profiles.yaml"
    assert list(profiles(file)) == ["sound", "seed", "legacy_seed3"]
    assert with_profile(PARAMS, "sound", file) == PARAMS
    seed = with_profile(PARAMS, "seed", file)
    assert (seed.phase1.objective, seed.model.token_structure, len(seed.model.layer_structure)) == (
        "fixed_point",
        [],
        6,
    )
    others = {"phase1.lr": 0.01, "phase1.diversity": "oacd", "phase1.max_iterations": 20, "model.layernorm_mix": 0.5}
    assert with_profile(changed(PARAMS, others, "test"), "seed", file) == seed  # whatever `sound` becomes
    legacy = with_profile(PARAMS, "legacy_seed3", file)
    assert (legacy.phase1.min_updates, legacy.phase1.recompute_contexts) == (0, False)
    with pytest.raises(ParamsError, match="has no profile nonsense; it has sound, seed, legacy_seed3"):
        with_profile(PARAMS, "nonsense", file)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "must hold profiles by name, got NoneType"),
        (b"- seed", "must hold profiles by name, got list"),
        (b"seed:", "seed must hold keys and values, got NoneType"),
        (b"seed: [1]", "seed must hold keys and values, got list"),
        (b"\xff\xfe", "cannot be read"),
    ],
)
def test_a_damaged_file_of_profiles_is_refused_in_one_sentence(tmp_path, content, said):
    file = tmp_path / "profiles.yaml"
    file.write_bytes(content)
    with pytest.raises(ParamsError, match=said):
        profiles(file)


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("model.hidden_dim", 300, r"hidden_dim must be context_dim \+ embed_dim = 288, got 300"),
        ("model.embedding", "pretrained", "embedding_from must name a folder"),
        ("model.embedding", "gpt2", r"data\.tokenizer in params\.yaml must be pretrained, of that model"),
        ("model.token_structure", [], "token_structure must name at least one block"),
        ("phase1.lr_step_factors", [1.0], "lr_step_factors must have one factor more"),
        ("phase1.nonsense", 1, "phase1.nonsense is no key of stages/cvfp/params.yaml"),
        ("phase2.mode", "v1_mse", "mode must be v2 when"),
        ("predict.bptt_len", 8, "must be at least 16"),
        ("phase1.max_iterations", 1, "must be at least 2"),
        ("data.tokenizer", "pretrained", r"data\.pretrained in params\.yaml must name a tokenizer or its folder"),
        ("contest.own", {"untraind": 0.1}, "contest.own.untraind"),
    ],
)
def test_wrong_parameters_say_what_is_wrong(key, value, sentence):
    with pytest.raises(ParamsError, match=sentence):
        changed(PARAMS, {key: value}, "here")


def read(folder: Path, own: dict, root: dict) -> CvfpParams:
    """The parameters, with some keys of `data` changed in either file, or left out where the value is LEFT_OUT."""
    for name, changes, file in (("stages/cvfp/params.yaml", own, "own.yaml"), ("params.yaml", root, "root.yaml")):
        raw = yaml.safe_load((ROOT / name).read_text())
        raw["data"] = {key: one for key, one in (raw["data"] | changes).items() if one != LEFT_OUT}
        (folder / file).write_text(yaml.safe_dump(raw))
    return load(folder / "own.yaml", folder / "root.yaml")


def test_data_is_the_roots_but_for_what_the_file_has_itself(tmp_path):
    assert read(tmp_path, {}, {}) == PARAMS
    own, root = {"max_train_tokens": 5, "stdlib_tests": True}, {"max_train_tokens": 6, "vocab_size": 777}
    found = read(tmp_path, own, root).data
    assert (found.max_train_tokens, found.stdlib_tests, found.vocab_size) == (5, True, 777)
    assert set(yaml.safe_load((ROOT / "stages/cvfp/params.yaml").read_text())["data"]) == set(OWN)


@pytest.mark.parametrize(
    ("own", "root", "sentence"),
    [
        ({"max_train_tokens": LEFT_OUT}, {}, "own.yaml: data.max_train_tokens is missing"),
        ({"max_train_tokens": 0}, {}, "own.yaml: data.max_train_tokens must be at least 1, got 0"),
        ({"vocab_sise": 300}, {}, "own.yaml: data.vocab_sise is not a known key; did you mean data.vocab_size?"),
        (
            {"calibration_share": 0.9},
            {},
            "own.yaml: data.validation_share + calibration_share + test_share must be below",
        ),
        ({}, {"vocab_size": LEFT_OUT}, "root.yaml: data.vocab_size is missing"),
        ({}, {"vocab_size": 3}, "root.yaml: data.vocab_size must be at least 257, got 3"),
        ({}, {"vocab_sise": 300}, "root.yaml: data.vocab_sise is not a known key; did you mean data.vocab_size?"),
    ],
)
def test_a_wrong_key_of_data_is_named_with_the_file_that_has_it(tmp_path, own, root, sentence):
    with pytest.raises(ParamsError) as error:
        read(tmp_path, own, root)
    assert str(error.value).startswith(f"{tmp_path}/{sentence}")
    assert str(error.value).count(".yaml: ") == 1


def test_a_fault_of_the_text_names_the_file_that_has_its_key():
    told = {
        "params.yaml: data.vocab_size is 300": "params.yaml: data.vocab_size is 300",
        "set params.yaml: data.path to": "set stages/cvfp/params.yaml: data.path to",
        "params.yaml: data.calibration_share leaves": "stages/cvfp/params.yaml: data.calibration_share leaves",
        "params.yaml: model.seq_len is 9": "stages/cvfp/params.yaml: text.block_length is 9",
    }
    assert {one: of_this_pipeline(one) for one in told} == told


def test_a_path_that_is_set_in_one_file_alone_is_refused_with_what_to_type():
    own = PARAMS.data.model_copy(update={"source": "text"})
    require_one_path(own, own)
    require_one_path(PARAMS.data, own.model_copy(update={"path": "mine"}))  # the standard library is read
    with pytest.raises(StageError, match=r"data\.path is text and .* -S stages/cvfp/params\.yaml:data\.path=mine$"):
        require_one_path(own, own.model_copy(update={"path": "mine"}))


def test_ids_must_be_those_of_the_rows_of_gpt2():
    given = {"model.embedding": "gpt2", "data.tokenizer": "pretrained", "data.pretrained": "some/other"}
    with pytest.raises(
        ParamsError,
        match=r"data\.pretrained in params\.yaml must be gpt2, whose ids the rows of model\.embedding gpt2 are",
    ):
        changed(PARAMS, given, "here")
    assert changed(PARAMS, given | {"data.pretrained": "gpt2"}, "here").model.embedding == "gpt2"


def test_embeddings_come_from_a_folder_or_are_refused_and_never_made_up(tmp_path):
    matrix = torch.randn(60, 16)
    save_file({"weight": matrix, "bias": torch.zeros(3)}, tmp_path / "e.safetensors")
    small = {"model.context_dim": 24, "model.embed_dim": 16, "model.hidden_dim": 40}
    small |= {"data.tokenizer": "pretrained", "data.pretrained": str(tmp_path)}
    params = changed(PARAMS, small | {"model.embedding": "pretrained", "model.embedding_from": str(tmp_path)}, "test")
    found = build(params.model, params.phase1, 50, 0)
    assert torch.equal(found.token_embedding.weight, matrix[:50])
    with pytest.raises(EmbeddingError, match=r"is \(60, 16\), but the tokenizer has 70 ids and model.embed_dim is 16"):
        build(params.model, params.phase1, 70, 0)
    save_file({"other": matrix}, tmp_path / "f.safetensors")
    with pytest.raises(EmbeddingError, match=r"holds 2 matrices and no config.json"):
        embedding_matrix(str(tmp_path))
    with pytest.raises(EmbeddingError, match=r"cannot be loaded .*random_frozen"):
        embedding_matrix(str(tmp_path / "nowhere"))


def test_embeddings_of_a_transformers_folder(tmp_path):
    from transformers import GPT2Config, GPT2Model

    model = GPT2Model(GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2, n_positions=8))
    model.save_pretrained(tmp_path)
    assert torch.equal(embedding_matrix(str(tmp_path)), model.wte.weight)
    sizes = {"model.context_dim": 24, "model.embed_dim": 16, "model.hidden_dim": 40}
    names = {"model.embedding_from": str(tmp_path), "data.tokenizer": "pretrained", "data.pretrained": str(tmp_path)}
    given = changed(PARAMS, sizes | names | {"model.embedding": "gpt2"}, "test")
    assert size_on_paper(given, 40) > 40 * 16  # sizes alone: nothing is loaded
    weights = load_file(tmp_path / "model.safetensors")
    save_file({key: one for key, one in weights.items() if "wte" not in key}, tmp_path / "model.safetensors")
    with pytest.raises(EmbeddingError, match=r"cannot be loaded \(its weights lack wte\.weight\)"):
        embedding_matrix(str(tmp_path))  # transformers makes the missing matrix up


@pytest.mark.parametrize("fault", ["code", "a path"])
def test_an_embedding_is_read_without_the_folders_code_and_from_the_folder_alone(tmp_path, monkeypatch, fault):
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    config = {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModel": "own.Model"}}
    code = f"open({str(tmp_path / 'executed')!r}, 'w')\nclass Config: pass\nclass Model: pass\n"
    (tmp_path / "own.py").write_text(code)
    write_json(tmp_path / "config.json", config if fault == "code" else {"model_type": "gpt2"})
    if fault == "a path":
        write_json(tmp_path / "model.safetensors.index.json", {"weight_map": {"wte.weight": "/etc/passwd"}})
    said = "contains custom code" if fault == "code" else "'/etc/passwd', which does not lie in"
    with pytest.raises(EmbeddingError, match=said):
        embedding_matrix(str(tmp_path))
    assert not (tmp_path / "executed").exists()
