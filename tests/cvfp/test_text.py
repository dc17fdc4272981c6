"""Which text CVFP learns and is judged on: policies, leaks, refusals; parameters, profiles and embeddings."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from lego.base.artifacts import ArtifactError, read_json, read_tensors, write_json, write_tensors
from lego.base.harness import StageError
from lego.base.parameter_files import ParamsError
from lego.cvfp import text as policy
from lego.cvfp.contest import size_on_paper
from lego.cvfp.sections import OWN, CvfpParams, changed, load, profiles, with_profile
from lego.cvfp.store import EmbeddingError, build, embedding_matrix
from lego.cvfp.text import (
    UnseenIdError,
    auto_split,
    in_vocabulary,
    overlap,
    read_text_ids,
    require_seen,
    stream,
    validation_from_train,
    without_overlap,
    write_text_ids,
)
from lego.text.tokenizer import TextEncoder, fit_bpe, write_tokens
from lego.tokens.blocks import BlockWriter
from stages.cvfp.tokenize import of_this_pipeline, require_one_path
from tests.conftest import ROOT, SOURCE
from tests.cvfp.conftest import PARAMS

HALF = len(SOURCE) // 2
LEFT_OUT = "left out"


@pytest.fixture(scope="module")
def encoder() -> TextEncoder:
    return TextEncoder.fitted(fit_bpe([SOURCE], 400, 10**6))


@pytest.fixture
def tokens(tmp_path, encoder):
    """A folder as tokenize writes it: train and test from different halves of a text."""
    facts = {}
    pieces = {"train": SOURCE[:HALF], "validation": SOURCE[HALF : HALF + 8000], "test": SOURCE[HALF + 8000 :]}
    for split, piece in pieces.items():
        writer = BlockWriter(tmp_path / split, 16)
        facts[split], _ = write_tokens(encoder.encode([piece]), encoder, writer, 10**6, 0)
    write_json(tmp_path / "corpus.json", {"vocab_size": 400, "seq_len": 16, "end_of_text": 0, "splits": facts})
    return tmp_path


def test_a_stream_is_the_ids_in_the_order_of_the_text(tokens, encoder):
    ids = next(encoder.encode([SOURCE[:HALF]]))[0]
    found = stream(tokens, "train")
    assert np.array_equal(found, ids[: len(found)])
    assert len(ids) - len(found) < 16


def test_b22_held_out_text_shares_no_run_with_train(tokens, encoder):
    counts = write_text_ids(tokens, tokens, encoder, PARAMS.text.model_copy(update={"overlap_length": 8}))
    text = read_text_ids(tokens)
    assert counts["test_overlapping"] > 0
    for split in ("validation", "test"):
        ids, train = text.ids[split].numpy(), text.ids["train"].numpy()
        known = {tuple(train[i : i + 8]) for i in range(len(train) - 7)}
        assert not any(tuple(ids[i : i + 8]) in known for i in range(len(ids) - 7))
    assert text.bytes_of("test") == sum(int(text.token_bytes[one]) for one in text.ids["test"][1:])
    assert set(text.ids["validation"].tolist()) <= set(text.ids["train"].tolist())


def test_b22_what_is_left_out_joins_no_run_of_train(tmp_path):
    """Unseen ids are taken out before the cut, as their neighbours then stand side by side."""
    vocabulary = np.arange(600)
    held_out = np.r_[30:40, 500, 40:50, 3, 1, 2]
    kept, _ = in_vocabulary(held_out, vocabulary[:100], "filter", 0)
    left, places = without_overlap(kept, vocabulary[:100], 20)
    assert left.tolist() == [3, 1, 2]
    assert places.tolist() == [20, 21, 22]
    source = ast.unparse(ast.parse(inspect.getsource(write_text_ids)))
    assert source.index("in_vocabulary(") < source.index("without_overlap(")


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 3), min_size=0, max_size=60), st.lists(st.integers(0, 3), max_size=60), st.integers(2, 5)
)
def test_overlap_equals_brute_force(ids, train, length):
    known = {tuple(train[i : i + length]) for i in range(len(train) - length + 1)}
    expected = [
        any(tuple(ids[j : j + length]) in known for j in range(max(0, i - length + 1), i + 1) if j + length <= len(ids))
        for i in range(len(ids))
    ]
    one, other = np.array(ids, dtype=np.int64), np.array(train, dtype=np.int64)
    assert overlap(one, other, length).tolist() == expected
    left, places = without_overlap(one, other, length)
    assert np.array_equal(left, one[places])
    assert (np.diff(places) > 0).all()
    assert not overlap(left, other, length).any()


def test_b21_unseen_ids_auto_split_and_missing_text_are_refused(tmp_path, tokens, encoder):
    with pytest.raises(UnseenIdError, match="validation: 2 ids do not occur in train, the first is 7"):
        require_seen(np.array([1, 7, 9, 7]), np.array([1, 2, 3]), "validation")
    with pytest.raises(
        ValueError, match="auto_split is not allowed: validation text is heldout_in_vocab or val_from_train"
    ):
        auto_split(np.arange(10))
    raw = yaml.safe_load((ROOT / "stages/cvfp/params.yaml").read_text())
    raw["text"]["validation"] = "auto_split"
    (tmp_path / "p.yaml").write_text(yaml.safe_dump(raw))
    with pytest.raises(ParamsError, match=r"text\.validation must be one of 'heldout_in_vocab' or 'val_from_train'"):
        load(tmp_path / "p.yaml", ROOT / "params.yaml")
    with pytest.raises(FileNotFoundError, match=r"run dvc repro stages/cvfp/dvc.yaml"):
        read_text_ids(tmp_path / "nowhere")


def test_train_and_validation_are_made_together(tokens, encoder):
    write_text_ids(tokens, tokens, encoder, PARAMS.text)
    ids = read_tensors(tokens / "ids.safetensors")
    train = ids["train"].clone()
    ids["train"][3] += 1
    write_tensors(tokens / "ids.safetensors", ids)
    with pytest.raises(ArtifactError, match=r"train is not what text.json was written with"):
        read_text_ids(tokens)
    ids["train"] = train
    ids["validation"][0] = 10**6
    write_tensors(tokens / "ids.safetensors", ids)
    with pytest.raises(ArtifactError, match="validation is not what"):
        read_text_ids(tokens)


def test_validation_from_train_is_its_last_part_tokenized_again(tokens, encoder):
    settings = PARAMS.text.model_copy(update={"validation": "val_from_train"})
    counts = write_text_ids(tokens, tokens, encoder, settings)
    text = read_text_ids(tokens)
    train = text.ids["train"].tolist()
    last = train[-round(0.2 * len(train)) :]
    assert encoder.fast.decode(text.ids["validation"].tolist()) == encoder.fast.decode(last)
    assert counts["validation_tokens"] == pytest.approx(len(last), abs=3)
    assert text.validation == "val_from_train"
    assert "test_unseen" in counts  # the test ids are held out all the same


def test_b21_the_check_is_on_the_ids_as_tokenized_again():
    """Train spells `ab` as two ids where the tokenizer has one: decoding and encoding gives an id train never shows."""
    encoder = TextEncoder.fitted(fit_bpe(["ab ab ab ab"] * 50, 259, 10**6))
    merged = encoder.fast.encode("ab").ids
    letters = [encoder.fast.token_to_id(one) for one in "ab"]
    assert len(merged) == 1
    assert merged[0] not in letters
    with pytest.raises(UnseenIdError, match="validation from train: 1 ids do not occur in train"):
        validation_from_train(np.array(letters * 10), 0.5, encoder)


def test_ids_that_train_does_not_have_are_left_out_or_replaced_and_counted():
    ids, train = np.array([1, 9, 2, 8]), np.array([1, 2, 3])
    kept, count = in_vocabulary(ids, train, "filter", 0)
    assert (kept.tolist(), count) == ([1, 2], 2)
    kept, count = in_vocabulary(ids, train, "unk", 3)
    assert (kept.tolist(), count) == ([1, 3, 2, 3], 2)
    assert policy.MODES == "heldout_in_vocab or val_from_train"


def test_bytes_of_ids_that_were_replaced_still_count(tokens, encoder):
    settings = PARAMS.text.model_copy(update={"unseen": "unk", "overlap_length": 1000})
    counts = write_text_ids(tokens, tokens, encoder, settings)
    text, spelled = read_text_ids(tokens), stream(tokens, "test")
    assert counts["test_unseen"] > 0
    assert text.hidden_bytes["test"] > 0
    assert text.bytes_of("test") == int(encoder.token_bytes()[spelled[1:]].sum())


def test_b21_ids_that_train_does_not_have_are_refused_when_the_text_is_read(tokens, encoder):
    """Even where files and digests fit together, as those of another writer would."""
    write_text_ids(tokens, tokens, encoder, PARAMS.text)
    ids = read_tensors(tokens / "ids.safetensors")
    unseen = next(one for one in range(encoder.vocab_size) if one not in ids["train"])
    ids["validation"] = torch.cat([ids["validation"], torch.tensor([unseen])])
    facts = read_json(tokens / "text.json")
    facts["validation_sha256"] = policy.digest(ids["validation"])
    write_tensors(tokens / "ids.safetensors", ids)
    write_json(tokens / "text.json", facts)
    with pytest.raises(UnseenIdError, match=f"validation: 1 ids do not occur in train, the first is {unseen}"):
        read_text_ids(tokens)


@pytest.mark.parametrize("name", ["text.json", "ids.safetensors", "bytes.safetensors"])
def test_b21_each_missing_file_is_named(tokens, encoder, name):
    write_text_ids(tokens, tokens, encoder, PARAMS.text)
    (tokens / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        read_text_ids(tokens)


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
