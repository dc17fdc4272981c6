"""params.yaml: what is accepted, and what each mistake is told."""

from __future__ import annotations

import copy

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from lego.base.parameter_files import ParamsError, read_params
from lego.base.params import Params, load_params
from lego.base.sections import Section, TrainParams
from tests.conftest import ROOT

DEFAULTS = yaml.safe_load((ROOT / "params.yaml").read_text())


def with_key(key: str, value: object) -> dict:
    raw = copy.deepcopy(DEFAULTS)
    *sections, last = key.split(".")
    target = raw
    for section in sections:
        target = target[section]
    target[last] = value
    return raw


def load(tmp_path, raw) -> Params:
    path = tmp_path / "params.yaml"
    path.write_text(raw if isinstance(raw, str) else yaml.safe_dump(raw))
    return load_params(path)


MISTAKES = [
    ("ashem.hard_example_ratio", 1.5, "ashem.hard_example_ratio must be in (0, 1), got 1.5"),
    ("ashem.hard_example_ratio", 0, "ashem.hard_example_ratio must be in (0, 1), got 0"),
    ("ashem.hard_example_ratio", float("nan"), "ashem.hard_example_ratio must be in (0, 1), got nan"),
    (
        "ashem.hard_exmaple_ratio",
        0.5,
        "ashem.hard_exmaple_ratio is not a known key; did you mean ashem.hard_example_ratio?",
    ),
    ("ashem.phase2_lr", "fast", "ashem.phase2_lr must be a number, got 'fast'"),
    ("ashem.phase2_lr", True, "ashem.phase2_lr must be a number, got True"),
    ("ashem.phase2_lr", None, "ashem.phase2_lr must be a number, got nothing"),
    ("ashem.phase2_lr", -1e-3, "ashem.phase2_lr must be in (0, inf), got -0.001"),
    (
        "ashem.phase2_layers",
        1,
        "ashem.phase2_layers is the total depth and must be greater than phase1_layers = 2, got 1",
    ),
    ("ashem.phase2_layers", 3.5, "ashem.phase2_layers must be a whole number, got 3.5"),
    ("ashem.phase1_patience", 0, "ashem.phase1_patience must be at least 1, got 0"),
    ("ashem.hard_split", "test", "ashem.hard_split must be one of 'train' or 'validation', got 'test'"),
    ("ashem.phase2_share", 0.0, "ashem.phase2_share must be in (0, 1) when phase2_text is fresh, got 0"),
    ("model.dim", 100, "model.dim must be a multiple of 2 * num_heads = 8, as rotary positions turn pairs; got 100"),
    ("model.num_kv_heads", 3, "model.num_kv_heads must divide num_heads = 4, got 3"),
    ("model.tie_embeddings", "yes please", "model.tie_embeddings must be true or false, got 'yes please'"),
    ("data.vocab_size", 100, "data.vocab_size must be at least 257, got 100"),
    ("data.test_share", 0.8, "data.validation_share + calibration_share + test_share must be below 1"),
    ("data", 3, "data must be a section of keys, got 3"),
    ("train.batchsize", 8, "train.batchsize is not a known key; did you mean train.batch_size?"),
    ("seed", -1, "seed: Input should be greater than or equal to 0, got -1"),
]


@pytest.mark.parametrize(("key", "value", "message"), MISTAKES)
def test_a_mistake_is_one_sentence_that_names_the_key(tmp_path, key, value, message):
    with pytest.raises(ParamsError) as error:
        load(tmp_path, with_key(key, value))
    assert message in str(error.value)
    assert "params.yaml: " in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_key_is_named(tmp_path):
    raw = copy.deepcopy(DEFAULTS)
    del raw["ashem"]["phase2_lr"]
    with pytest.raises(ParamsError, match=r"params\.yaml: ashem\.phase2_lr is missing"):
        load(tmp_path, raw)


@pytest.mark.parametrize("spelling", ["1e-05", "1e-5", "1.0e-05", "0.00001", "1E-5"])
def test_every_spelling_of_a_small_number_is_read(tmp_path, spelling):
    text = (ROOT / "params.yaml").read_text()
    line = next(line for line in text.splitlines() if "phase2_lr:" in line)
    assert load(tmp_path, text.replace(line, f"  phase2_lr: {spelling}")).ashem.phase2_lr == 1e-5


@given(st.floats(1e-12, 1e6))
def test_numbers_survive_dvcs_way_of_writing_them(value):
    raw = with_key("ashem.phase2_lr", f"{value!r}" if "e" in repr(value) else value)
    assert Params.model_validate(raw).ashem.phase2_lr == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1", "is not valid YAML"),
        ("- 1\n", "must hold the sections seed, data"),
        ("", "must hold the sections"),
    ],
)
def test_a_file_that_is_no_parameter_file_is_named(tmp_path, text, message):
    with pytest.raises(ParamsError, match=message):
        load(tmp_path, text)
    with pytest.raises(ParamsError, match="cannot be read"):
        load_params(tmp_path / "absent.yaml")


def test_every_key_is_commented_and_the_file_is_in_dvcs_plain_style():
    import re

    for line in (ROOT / "params.yaml").read_text().splitlines():
        assert not re.search(r":\s*[\"'\[{]", line.split("#")[0])
    values = [line for line in (ROOT / "params.yaml").read_text().splitlines() if re.match(r"\s*\w+: \S", line)]
    commented = {line.split(":")[0] for line in values if "#" in line}  # a baseline's keys once, not in each of them
    repeats = [line for line in values if line.startswith("      ") and line.split(":")[0] in commented]
    uncommented = [line.strip() for line in values if "#" not in line and line not in repeats]
    assert uncommented == [
        "calibration_share: 0.1",
        "test_share: 0.1",
        "beta1: 0.9",
        "beta2: 0.95",
        "phase2_patience: 3",
    ]


def test_another_systems_parameters_are_read_by_their_own_sections(tmp_path):
    class Other(Section):
        seed: int
        train: TrainParams

    train, path = DEFAULTS["train"], tmp_path / "other.yaml"
    path.write_text(yaml.safe_dump({"seed": 1, "train": train}))
    assert read_params(path, Other).train.batch_size == train["batch_size"]
    path.write_text(yaml.safe_dump({"seed": 1, "train": train | {"batch_sise": 3}}))
    with pytest.raises(ParamsError, match=r"other\.yaml: train\.batch_sise .*; did you mean train\.batch_size\?"):
        read_params(path, Other)


def test_a_negative_branch_layer_counts_from_block_1s_last():
    ashem = load_params(ROOT / "params.yaml").ashem
    for number, depth, found in ((-1, 2, 1), (-1, 30, 29), (-30, 30, 0), (24, 30, 24), (None, 30, None), (2, 2, None)):
        assert ashem.model_copy(update={"branch_layer": number}).branch_of(depth) == found
    for number in (3, -3):
        with pytest.raises(ParamsError, match=r"ashem\.branch_layer must be in -2\.\.2 for block 1's 2 layers, got"):
            ashem.model_copy(update={"branch_layer": number}).branch_of(2)
    for changes, lacks in (
        ({"phase2_layers": 2}, "phase2_layers adds none"),
        ({"branch": "lora"}, "branch lora needs"),
    ):
        with pytest.raises(ParamsError, match=rf"ashem\.branch_layer 2 repeats no layer, and ashem\.{lacks}"):
            ashem.model_copy(update={"branch_layer": 2} | changes).require_block2(2)


def test_a_given_model_in_a_folder_is_asked_before_anything_runs(tmp_path):
    """Its depth and width, which else mining would find out; without them the stage that reads it will say."""
    values = yaml.safe_load((ROOT / "params.yaml").read_text())
    values["model"]["init_from"], file = str(tmp_path / "given"), tmp_path / "params.yaml"
    (tmp_path / "given").mkdir()
    wrong = [({"branch_layer": 31}, r"branch_layer must be in -30\.\.30"), ({"branch_layer": 24}, None)]
    wrong += [({"branch": "lora", "branch_rank": 576}, "branch_rank must be less than block 1's width 576")]
    for told in (None, "[]", '{"num_hidden_layers": 30, "hidden_size": 576}'):
        if told is not None:
            (tmp_path / "given/config.json").write_text(told)
        for changes, said in wrong:
            file.write_text(yaml.safe_dump(values | {"ashem": values["ashem"] | changes}))
            if said is None or told in (None, "[]"):
                load_params(file)
                continue
            with pytest.raises(ParamsError, match=said):
                load_params(file)
