"""Where a given model stops stays with it: in every folder that is made of it, and on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from lego import DeepSupervisionTransformer
from lego.base.artifacts import read_json
from lego.hf import LegoForCausalLM, save_routed, to_hf
from lego.model.checkpoint import load_model, save_model
from lego.model.growth import grow_model
from lego.model.llama import load_llama
from lego.routing.command_line import main, stop_ids
from tests.model.test_llama import change, small_llama


def test_where_a_checkpoint_stops_and_how_it_samples_stays_with_the_model(tmp_path):
    small_llama(tmp_path / "given")
    wanted = {"bos_token_id": 1, "eos_token_id": [7, 9], "pad_token_id": 0, "temperature": 0.5, "do_sample": True}
    block1 = load_llama(str(tmp_path / "given"))
    assert block1.generation_config == wanted
    (tmp_path / "phase2").mkdir()
    save_model(grow_model(block1, 3), tmp_path / "phase2")
    assert read_json(tmp_path / "phase2/generation_config.json") == wanted
    assert load_model(tmp_path / "phase2").generation_config == wanted
    converted = to_hf(grow_model(block1, 3), 0.0)
    converted.save_pretrained(tmp_path / "routed")
    kept = LegoForCausalLM.from_pretrained(tmp_path / "routed").generation_config.to_diff_dict()
    assert {name: kept[name] for name in wanted} == wanted
    assert to_hf(grow_model(block1, 3), 0.0, eos_token_id=3).generation_config.eos_token_id == 3  # what is asked for
    (tmp_path / "given/generation_config.json").unlink()  # then config.json alone knows
    change(tmp_path / "given/config.json", eos_token_id=[3, 4], bos_token_id=5)
    assert load_llama(str(tmp_path / "given")).generation_config == {"bos_token_id": 5, "eos_token_id": [3, 4]}


def test_settings_for_sampling_that_contradict_one_another_leave_the_stop_ids(tmp_path, capsys):
    """As some published checkpoints have them; transformers reads them and refuses to write them again."""
    small_llama(tmp_path)
    change(tmp_path / "generation_config.json", do_sample=False)
    block1 = load_llama(str(tmp_path))
    assert block1.generation_config == {"bos_token_id": 1, "eos_token_id": [7, 9], "pad_token_id": 0}
    assert "settings for sampling contradict one another and are left out" in capsys.readouterr().out
    to_hf(grow_model(block1, 3), 0.0).save_pretrained(tmp_path / "routed")


def test_the_command_line_stops_where_the_given_model_stops(checkpoint, tmp_path, capsys):
    """At each id of its list, and nowhere else: not at the tokenizer's own end-of-text."""
    config = AutoConfig.from_pretrained(checkpoint)
    config.initializer_range = 0.4  # a trained one of this size repeats itself
    llama = AutoModelForCausalLM.from_config(config).eval()
    llama.save_pretrained(tmp_path / "given")
    prompt = AutoTokenizer.from_pretrained(checkpoint)("def", return_tensors="pt")
    freely = llama.generate(**prompt, max_new_tokens=20, do_sample=False, eos_token_id=None)[0].tolist()[1:]
    _, first, *_, second = dict.fromkeys(freely)  # ids in the order in which they first come
    for stops in ([first, 303], [303, second], second, [303]):
        model = load_llama(str(tmp_path / "given"))
        model.generation_config = {"eos_token_id": stops, "pad_token_id": 0}
        folder = tmp_path / str(stops)
        folder.mkdir()
        save_routed(to_hf(grow_model(model, 4, init="zero"), 0.0), folder, given_tokenizer(checkpoint, tmp_path), "")
        llama.generation_config.eos_token_id = stops
        expected = llama.generate(**prompt, max_new_tokens=20, do_sample=False)[0].tolist()[prompt.input_ids.shape[1] :]
        assert main([str(folder), "def", "--max-new-tokens", "20", "--json"]) == 0
        assert [token["id"] for token in json.loads(capsys.readouterr().out)["tokens"]] == expected


def given_tokenizer(checkpoint: Path, folder: Path) -> Path:
    """The tokenizer's files of a checkpoint, apart from the model's."""
    AutoTokenizer.from_pretrained(checkpoint).save_pretrained(folder / "tokenizer")
    return folder / "tokenizer"


def test_without_ids_of_its_own_a_model_stops_at_the_tokenizers_end():
    converted = to_hf(grow_model(DeepSupervisionTransformer(60, 32, 2, 4, exit_layer=2), 3), 0.3)
    assert converted.generation_config.eos_token_id is converted.config.eos_token_id is None  # not Llama's 2
    assert stop_ids({}, 40) == stop_ids({"eos_token_id": None}, 40) == {40}
    assert stop_ids({"eos_token_id": 3}, 40) == {3}
    assert stop_ids({"eos_token_id": [3, 4]}, None) == {3, 4}
    assert stop_ids({}, None) == set()


@pytest.mark.parametrize("value", [2.0, "2", [[1]], [None], True, {"a": 1}])
def test_what_is_no_id_is_named(value):
    with pytest.raises(ValueError, match="eos_token_id must be a whole number or a list of such, got"):
        stop_ids({"eos_token_id": value}, 40)
