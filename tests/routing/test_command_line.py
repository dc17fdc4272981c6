"""python -m lego.generate: what it writes is what the functions write, and it names what it cannot use."""

from __future__ import annotations

import json
import re

import pytest
from transformers import AutoTokenizer

from lego import load_model, save_model
from lego.routing.command_line import main
from lego.routing.generation import generate
from lego.text.tokenizer import TextEncoder, fit_bpe
from tests.routing.conftest import greedy_by_recomputing, random_model


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    encoder = TextEncoder.fitted(fit_bpe(["def main(): pass\n" * 9], 257, 1000))
    encoder.save(folder)
    model = random_model("sequence", vocab=257)
    model.sizes["context"] = 40
    model.routing_threshold = 0.4
    save_model(model, folder)
    return folder


def test_the_command_writes_what_the_functions_write(saved, capsys):
    assert main([str(saved), "def main(", "--max-new-tokens", "20", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    model = load_model(saved)
    prompt = AutoTokenizer.from_pretrained(saved)("def main(")["input_ids"]
    expected = list(generate(model, [prompt], 20, 0.4, stop={model.sizes["vocab_size"]}))
    assert [token["id"] for token in result["tokens"]] == [token.id for token in expected][: len(result["tokens"])]
    assert result["shallow_ratio"] == pytest.approx(
        sum(not token["deep"] for token in result["tokens"]) / len(result["tokens"])
    )
    assert result["tokens_per_second"] > 0 < result["full_tokens_per_second"]
    assert main([str(saved), "def", "--max-new-tokens", "5", "--lossless", "--json"]) == 0
    lossless = json.loads(capsys.readouterr().out)
    prompt = AutoTokenizer.from_pretrained(saved)("def")["input_ids"]
    assert [t["id"] for t in lossless["tokens"]] == greedy_by_recomputing(model, prompt, len(lossless["tokens"]), None)
    assert main([str(saved), "def", "--max-new-tokens", "9", "--show-exits"]) == 0
    shown = capsys.readouterr()
    assert re.fullmatch(r"(?s)def((\x1b\[3[23]m).*)+\x1b\[0m\n", shown.out)
    assert re.search(r"\d+ tokens, \d+\.\d % shallow, [\d.]+ tokens/s; full model [\d.]+ tokens/s", shown.err)


def test_the_command_names_what_it_cannot_use(saved, tmp_path, capsys):
    for arguments, sentence in (
        ([str(tmp_path), "x"], r"error: \S+config\.json: cannot be read"),
        ([str(saved), "x" * 41], "error: prompt 0 has 41 tokens, the model was trained on 40; shorten it"),
        ([str(saved), ""], "error: prompt 0 is empty; give at least one token"),
        ([str(saved), "x", "--threshold", "-1"], r"error: threshold must be None or at least 0\.0, got -1\.0"),
        ([str(saved), "x", "--max-new-tokens", "0"], "error: --max-new-tokens must be at least 1, got 0"),
        ([str(saved), "x", "--seed", "9" * 20], r"error: --seed must be in \[0, 2\^63\), got 9+"),
        ([str(saved), "\udcff"], "error: the prompt is not UTF-8"),
        ([str(saved), "x", "--top-p", "2"], r"error: need temperature >= 0, top_k >= 0 and top_p in"),
    ):
        assert main(arguments) == 1
        assert re.search(sentence, capsys.readouterr().err)
