"""python -m lego.generate: what it writes is what the functions write, and it names what it cannot use."""

from __future__ import annotations

import io
import json
import re
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from lego import load_model, save_model
from lego.routing import command_line
from lego.routing.command_line import main
from lego.routing.generation import generate
from lego.routing.spelling import spelled
from lego.text.tokenizer import TextEncoder, fit_bpe, fit_words
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


WORDS = "one two three four five six seven eight nine ten eleven twelve"
BYTES = fit_bpe([f"{WORDS} naïve ☕ 日本語 "], 290, 10**6)


def test_words_are_printed_with_the_spaces_between_them(tmp_path, capsys):
    texts = [" ".join(WORDS.split()[:n]) for n in range(1, 13)]
    encoder = TextEncoder.fitted(fit_words(texts, 14, 10**6))
    encoder.save(tmp_path)
    model = random_model("sequence", vocab=14)
    model.sizes["context"], model.routing_threshold = 40, 0.4
    save_model(model, tmp_path)
    assert main([str(tmp_path), "One two", "--max-new-tokens", "9", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    tokens = [token["text"] for token in result["tokens"]]
    assert all(re.fullmatch(r" \S+", text) for text in tokens)
    assert result["text"] == "".join(tokens)
    assert main([str(tmp_path), "One two", "--max-new-tokens", "9"]) == 0
    assert capsys.readouterr().out == "One two" + result["text"] + "\n"
    assert main([str(tmp_path), "One two", "--max-new-tokens", "9", "--show-exits"]) == 0
    assert re.sub(r"\x1b\[\d+m", "", capsys.readouterr().out) == "One two" + result["text"] + "\n"


@given(text=st.text("a ï☕日本\n語🎉", min_size=1, max_size=20), places=st.tuples(st.floats(0, 1), st.floats(0, 1)))
def test_what_tokens_add_is_whole_characters_wherever_the_text_is_cut(text, places):
    ids = BYTES.encode(text, add_special_tokens=False).ids
    start, end = sorted(round(place * len(ids)) for place in places)
    added = spelled(BYTES.decode, ids[:start], ids[start:end])
    assert len(added) == end - start
    assert "\ufffd" not in "".join(added)
    assert text.startswith(BYTES.decode(ids[:start]).rstrip("\ufffd") + "".join(added))
    if end == len(ids):
        assert text.endswith("".join(added))


def test_a_token_that_takes_back_a_space_adds_nothing_twice():
    joined = {1: "don", 2: "don '", 3: "don't", 4: "don't do"}
    assert spelled(lambda ids: joined.get(len(ids), ""), [7], [7, 7, 7]) == ["", "'t", " do"]
    assert spelled(lambda ids: "", [1], []) == []


ODD = {"prompt": "p\x1b]0;title\x07", "text": "é☕\x1b[2J\ttab\nline\r"}


@pytest.mark.parametrize(
    ("encoding", "terminal", "exits", "shown"),
    [
        ("utf-8", False, False, "p\x1b]0;title\x07é☕\x1b[2J\ttab\nline\r\n"),  # a file has what was written
        ("utf-8", True, False, "p\\x1b]0;title\\x07é☕\\x1b[2J\ttab\nline\\x0d\n"),
        ("latin-1", True, False, "p\\x1b]0;title\\x07é\\u2615\\x1b[2J\ttab\nline\\x0d\n"),
        ("ascii", False, True, "p\\x1b]0;title\\x07\x1b[33m\\xe9\\u2615\\x1b[2J\ttab\nline\\x0d\x1b[0m\n"),
    ],
)
def test_what_a_terminal_cannot_show_or_would_obey_is_spelled_out(monkeypatch, encoding, terminal, exits, shown):
    tokens = [{"id": 1, "text": ODD["text"], "deep": True, "exit": 2}]
    speeds = {"shallow_ratio": 0.0, "tokens_per_second": 1.0, "full_tokens_per_second": 1.0}
    monkeypatch.setattr(command_line, "_write", lambda arguments: ODD | speeds | {"tokens": tokens})
    written = io.BytesIO()
    stdout = io.TextIOWrapper(written, encoding=encoding, newline="")
    stdout.isatty = lambda: terminal
    monkeypatch.setattr(sys, "stdout", stdout)
    assert main(["folder", "p", *(["--show-exits"] if exits else [])]) == 0
    stdout.flush()
    assert written.getvalue().decode(encoding) == shown


def test_a_sentence_about_a_name_is_shown_as_it_is_spelled(capsys):
    assert main(["no\x1b[31mfolder", "p"]) == 1
    assert "error: no\\x1b[31mfolder/" in capsys.readouterr().err
