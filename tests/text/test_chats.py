"""Cells that hold chats: every usual shape is text, every other is counted and told."""

from __future__ import annotations

import json
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lego.base.artifacts import read_json
from lego.text.chats import told
from lego.text.packing import write_splits
from lego.text.sources import documents
from lego.tokens.blocks import CorpusError
from tests.text.test_sources import read, source


@pytest.mark.parametrize(
    "chat",
    [
        ["hi", "yo"],
        [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}],
        [{"from": "user", "value": "hi"}, {"from": "assistant", "value": "yo"}],
        {"role": ["user", "assistant"], "content": ["hi", "yo"]},
    ],
)
def test_the_turns_of_a_chat_are_joined(tmp_path, chat):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": chat}) + "\n")
    expected = "hi\n\nyo" if chat == ["hi", "yo"] else "user: hi\n\nassistant: yo"
    assert read(tmp_path) == [expected]


def test_turns_without_content_are_left_out_and_parts_of_text_are_read(tmp_path):
    chats = [
        [{"role": "user", "content": "hi"}, {"role": "assistant", "content": None}],
        [{"role": "user", "content": None}],
        [{"role": "assistant", "tool_calls": []}, {"role": "tool", "content": "42"}],
        [{"role": "user", "content": [{"type": "text", "text": "look"}, {"type": "image", "url": "x"}]}],
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": chat}) + "\n" for chat in chats))
    assert read(tmp_path) == ["user: hi", "tool: 42", "user: look"]


@pytest.mark.parametrize(
    ("turn", "text"),
    [
        ({"role": "user", "type": "text", "content": "hi"}, "user: hi"),
        ({"role": "user", "type": "message", "content": [{"type": "input_text", "text": "hi"}]}, "user: hi"),
        ({"role": "user", "type": "text", "content": {"type": "text", "text": "hi"}}, "user: hi"),
        ({"role": "user", "text": "hi"}, "user: hi"),
        ({"role": "user", "value": "hi"}, "user: hi"),
        ({"role": None, "content": None, "from": "user", "value": "hi"}, "user: hi"),
        ({"role": "user", "content": "", "text": "hi"}, "user: hi"),
        ({"speaker": "user", "text": "hi"}, "user: hi"),
        ({"type": "human", "content": "hi"}, "human: hi"),
        ({"text": "hi"}, "hi"),
        ({"role": "user", "content": ["hi", {"type": "image_url", "image_url": {"url": "x"}}]}, "user: hi"),
        ({"role": "tool", "content": [{"type": "tool_result", "content": "42"}]}, "tool: 42"),
    ],
)
def test_turns_of_every_usual_shape_are_text(tmp_path, turn, text):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": [turn, {"role": "assistant", "text": "yo"}]}) + "\n")
    assert read(tmp_path) == [f"{text}\n\nassistant: yo"]
    if all(isinstance(value, str | None) for value in turn.values()):
        pq.write_table(pa.table({"text": [[turn], None]}), tmp_path / "a.parquet")
        assert read(tmp_path / "a.parquet") == [text]


def test_chats_of_other_shapes_are_counted_by_their_keys_and_none_is_lost_in_silence(tmp_path):
    odd = [{"speaker": "x", "words": "a"}, {"role": "user", "words": "b"}, {"role": "user", "content": 3}]
    chats = [[{"role": "user", "content": "hi"}], *([one] for one in odd), [odd[0]], [3], [], {"a\nb": 1}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": chat}) + "\n" for chat in chats))
    refused: Counter[str] = Counter()
    assert [document.text for document in documents(source(tmp_path), refused)] == ["user: hi"]
    assert refused == {"speaker, words": 2, "role, words": 1, "role, content (int)": 1, "int": 1, "a b": 1}
    assert told(refused).startswith("2 with speaker, words; 1 with ")


def test_a_file_of_chats_of_no_known_shape_is_refused_by_name(tmp_path):
    row = json.dumps({"text": [{"speaker": "x", "words": "a"}]}) + "\n"
    (tmp_path / "odd.jsonl").write_text(9 * row)
    sentence = r"odd\.jsonl: text holds list, not text or turns of role and content \(9 with speaker, words\); set"
    with pytest.raises(CorpusError, match=sentence):
        read(tmp_path)


def test_what_is_left_out_is_told_at_the_end_and_nothing_where_nothing_is(tmp_path, capsys):
    fine = [[{"role": "user", "content": f"number {number} of many"}] for number in range(90)]
    odd = [[{"speaker": "x", "words\x1b[31m": "a"}]] * 9
    for name, chats in (("with", fine + odd), ("without", fine)):
        (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": chat}) + "\n" for chat in chats))
        (tmp_path / name).mkdir()
        data = source(tmp_path / "a.jsonl", vocab_size=257, max_tokenizer_bytes=1000)
        done = write_splits(data, 8, None, tmp_path / name)
        said = capsys.readouterr().out
        expected = (
            "9 chats are left out, as text has no turns of role and content there: 9 with speaker, words\\x1b[31m\n"
        )
        assert said == (expected if name == "with" else "")
        assert done.dropped.get("unknown_chats") == (9 if name == "with" else None)
    assert read_json(tmp_path / "with" / "corpus.json") == read_json(tmp_path / "without" / "corpus.json")
    few = source(tmp_path / "a.jsonl", vocab_size=257)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": chat}) + "\n" for chat in fine[:1] + odd))
    with pytest.raises(CorpusError, match=r"leaves the .* split without a document"):
        write_splits(few, 8, None, tmp_path / "with")
    assert "9 chats are left out" in capsys.readouterr().out
