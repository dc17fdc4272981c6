"""Every kind of file and dataset that text comes from, and what is named that is none."""

from __future__ import annotations

import csv
import gzip
import json
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from lego.base.artifacts import sha256
from lego.base.params import load_params
from lego.base.sections import DataParams
from lego.text.sources import documents
from lego.tokens.blocks import CorpusError
from tests.conftest import ROOT

TEXTS = ["First one.\nSecond line, naïve ☕\n", 'with "quotes", commas\r\nand a carriage return', "日本語 = text ="]
DEFAULTS = load_params(ROOT / "params.yaml").data
COMPRESS = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}


def source(path: Path | str, **changes: object) -> DataParams:
    key = {"path": str(path), "source": "text"} if "hub_name" not in changes else {"source": "hub"}
    return DEFAULTS.model_copy(update=key | changes)


def read(path: Path | str = "", **changes: object) -> list[str]:
    return [document.text for document in documents(source(path, **changes))]


def table_bytes(kind: str, texts: list, column: str = "text") -> bytes:
    rows = [{"id": i, column: text} for i, text in enumerate(texts)]
    if kind == "jsonl":
        return "".join(json.dumps(row) + "\n" for row in rows).encode()
    if kind == "parquet":
        return pa_bytes(pa.Table.from_pylist(rows))
    import io

    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, ["id", column])
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().encode()


def pa_bytes(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("kind", ["txt", "md", "jsonl", "csv", "parquet"])
def test_every_kind_and_compression_gives_the_texts_as_they_are(tmp_path, kind, compression):
    if kind in ("txt", "md"):
        for i, text in enumerate(TEXTS):
            (tmp_path / f"{i}.{kind}{compression}").write_bytes(COMPRESS[compression](text.encode()))
    else:
        content = table_bytes(kind, TEXTS, column="body")
        (tmp_path / f"all.{kind}{compression}").write_bytes(COMPRESS[compression](content))
    assert read(tmp_path, column="body") == TEXTS


def test_one_file_a_byte_order_mark_hidden_files_and_files_of_other_kinds(tmp_path, capsys):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.TXT").write_bytes(b"\xef\xbb\xbfwith a mark")
    (tmp_path / "a.md").write_text("first")
    (tmp_path / ".hidden.txt").write_text("unseen")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    assert read(tmp_path) == ["first", "with a mark"]
    assert "1 of 3 files are of another kind and not read" in capsys.readouterr().out
    assert read(tmp_path / "a.md") == ["first"]


def test_a_document_is_named_by_its_content(tmp_path):
    (tmp_path / "a.txt").write_text("same")
    (tmp_path / "b.jsonl").write_text('{"text": "same"}\n{"text": null}\n{"text": ""}\n{"text": "other"}\n')
    first, second, third = documents(source(tmp_path))
    assert first == second
    assert first.name == first.group != third.name


def test_cells_are_text_whatever_they_look_like_and_json_lines_may_differ(tmp_path):
    cells = ["NA", "null", "3", "2026-01-01", "text"]
    (tmp_path / "a.csv").write_bytes(table_bytes("csv", cells))
    assert read(tmp_path) == cells
    (tmp_path / "a.csv").unlink()
    (tmp_path / "a.jsonl").write_text('{"other": [1]}\n{"text": "a", "other": {}}\n\n{"text": "b"}\n')
    assert read(tmp_path) == ["a", "b"]


def test_all_frames_of_a_zstandard_file_are_read(tmp_path):
    (tmp_path / "a.txt.ZST").write_bytes(zstandard.compress(b"one ") + zstandard.compress(b"two") + LONG_ZSTD)
    (text,) = read(tmp_path)
    assert text.startswith("one twoline 0\n")
    assert text.endswith("line 399999\n")


def test_half_a_surrogate_pair_becomes_a_character(tmp_path):
    (tmp_path / "a.csv").write_text("text\nfine\n")
    assert read(tmp_path) == ["fine"]
    from lego.text.sources import _named_by_content

    assert _named_by_content("a\ud800b").text == "a?b"


@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_split_on_begins_a_document_at_each_matching_line(tmp_path, kind):
    lines = [" = One = \n", "text\n", " = = Part = = \n", "more\n", " = Two = \n", "end\n"]
    if kind == "txt":
        (tmp_path / "big.txt").write_text("".join(lines))
    else:  # a row a line, as WikiText has it
        (tmp_path / "big.jsonl").write_bytes(table_bytes("jsonl", [lines[0], "", *lines[1:]]))
    assert read(tmp_path, split_on=" = [^=]") == ["".join(lines[:4]), "".join(lines[4:])]


@settings(max_examples=100, deadline=None)
@given(
    text=st.text(alphabet="ab\n=\r\u2028", min_size=1, max_size=60).filter(str.strip), pattern=st.sampled_from("=a^$")
)
def test_cutting_loses_nothing(tmp_path_factory, text, pattern):
    path = tmp_path_factory.mktemp("text") / "a.txt"
    path.write_bytes(text.encode())
    assert "".join(read(path, split_on=pattern)) == text


@pytest.mark.parametrize("year", [0, 10000])
def test_of_a_table_only_the_wanted_column_is_read(tmp_path, year):
    seconds = (np.datetime64(f"{year:04d}-01-01", "s") if year else np.datetime64("-0001-01-01", "s")).astype(int)
    far = pa.array([int(seconds) * 10**6] * 2, pa.timestamp("us"))
    days = pa.array([int(seconds) // 86400] * 2, pa.date32())
    turn = pa.struct([("role", pa.string()), ("content", pa.string()), ("when", pa.timestamp("us"))])
    chats = [[{"role": "user", "content": text, "when": int(seconds) * 10**6}] for text in ("a", "b")]
    table = {"when": far, "day": days, "text": ["a", "b"], "text.day": days, "chat": pa.array(chats, pa.list_(turn))}
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    assert read(tmp_path) == ["a", "b"]
    assert read(tmp_path, column="chat") == ["user: a", "user: b"]
    for column, kind in (("when", "timestamp"), ("text.day", "date32")):
        with pytest.raises(CorpusError, match=rf"a\.parquet: {column} holds {kind}, not text; set .*data\.column"):
            read(tmp_path, column=column)
    with pytest.raises(CorpusError, match=r"has no column body; set .* to when, day, text, text\.day, chat"):
        read(tmp_path, column="body")


@pytest.mark.parametrize("streaming", [False, True])
def test_of_a_dataset_only_the_wanted_column_is_read(tmp_path, monkeypatch, streaming):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "dataset").mkdir()
    far = pa.array([10**7] * 2, pa.date32())
    pq.write_table(pa.table({"text": ["a", "b"], "when": far}), tmp_path / "dataset" / "train.parquet")
    assert read(hub_name=str(tmp_path / "dataset"), streaming=streaming) == ["a", "b"]


def test_a_table_whose_texts_repeat_and_one_of_every_kind_of_string_are_read(tmp_path):
    for number, kind in enumerate((pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string()))):
        pq.write_table(pa.table({"text": pa.array(["a", None, "b", "a"] * 900, kind)}), tmp_path / f"{number}.parquet")
    assert read(tmp_path) == ["a", "b", "a"] * 2700


def test_a_window_of_256_mebibytes_is_read(tmp_path):
    window = zstandard.ZstdCompressionParameters(window_log=28, enable_ldm=True, write_content_size=False)
    stream = zstandard.ZstdCompressor(compression_params=window).compressobj()
    (tmp_path / "a.jsonl.zst").write_bytes(stream.compress(table_bytes("jsonl", TEXTS)) + stream.flush())
    assert read(tmp_path) == TEXTS


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("pattern", ["= . =$", "= . =\\s*$", "= . =\\Z", "= . =", "= . =\\r?\\n"])
def test_split_on_finds_the_same_lines_whatever_ends_them(tmp_path, end, pattern):
    parts = [f"= {number} ={end}text{end}{end}" for number in range(10)]
    (tmp_path / "a.txt").write_bytes("".join(parts).encode())
    assert read(tmp_path, split_on=pattern) == parts


def test_a_pattern_that_never_ends_is_stopped_with_the_key_and_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr("lego.base.patterns.SECONDS", 0.2)
    (tmp_path / "a.txt").write_text("fine\n" + "a" * 60 + "!\n")
    sentence = r"params\.yaml: data\.split_on '\(a\|aa\)\+\$' tries too many ways .*a\.txt; write it without"
    with pytest.raises(CorpusError, match=sentence):
        read(tmp_path, split_on="(a|aa)+$")


def test_pipes_and_devices_are_named_and_in_a_folder_left_out(tmp_path, capsys):
    os.mkfifo(tmp_path / "a.txt")
    (tmp_path / "b.txt").write_text("text")
    assert read(tmp_path) == ["text"]
    assert "1 of 2 files are of another kind and not read" in capsys.readouterr().out
    for path, what in ((tmp_path / "a.txt", "a pipe"), ("/dev/zero", "a device")):
        with pytest.raises(CorpusError, match=rf"{path}: is {what}, neither file nor folder; save what it gives"):
            read(path)


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_a_name_that_looks_like_a_pattern_names_one_file(tmp_path, kind):
    (tmp_path / "[2024]").mkdir()
    (tmp_path / "[2024]" / f"data[1].{kind}").write_bytes(table_bytes(kind, ["right"]))
    (tmp_path / "[2024]" / f"data1.{kind}").write_bytes(table_bytes(kind, ["other"]))
    (tmp_path / f"a::b*.{kind}").write_bytes(table_bytes(kind, ["third"]))
    assert sorted(read(tmp_path)) == ["other", "right", "third"]
    assert read(tmp_path / "[2024]" / f"data[1].{kind}") == ["right"]


def test_links_to_folders_are_followed_once_and_odd_names_read(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a.txt").write_text("linked")
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "text" / "again").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "text" / "loop").symlink_to(tmp_path / "text")
    (tmp_path / "text" / "broken.txt").symlink_to(tmp_path / "nowhere")
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/text/\xff.txt")).write_text("odd")
    assert sorted(read(tmp_path / "text")) == ["linked", "odd"]
    assert len(sha256(tmp_path / "text")) == 64


@pytest.mark.parametrize("streaming", [False, True])
def test_a_dataset_is_read_by_name_configuration_split_and_column(tmp_path, monkeypatch, streaming):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "dataset"
    folder.mkdir()
    (folder / "train.jsonl").write_bytes(table_bytes("jsonl", TEXTS, "body"))
    (folder / "test.jsonl").write_bytes(table_bytes("jsonl", ["held out"], "body"))
    assert read(hub_name=str(folder), column="body", streaming=streaming) == TEXTS
    assert read(hub_name=str(folder), column="body", hub_split="test", streaming=streaming) == ["held out"]
    with pytest.raises(CorpusError, match=r"has no column text; set params\.yaml: data\.column to id, body"):
        read(hub_name=str(folder), streaming=streaming)
    with pytest.raises(CorpusError, match=r"dataset valid cannot be loaded \(.*valid.*train.*\); check .*hub_split"):
        read(hub_name=str(folder), hub_split="valid", streaming=streaming)
    with pytest.raises(CorpusError, match=r"other train cannot be loaded .*'other' not found.*hub_config"):
        read(hub_name=str(folder), hub_config="other", streaming=streaming)


def test_a_dataset_out_of_reach_names_itself_and_the_remedies(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CorpusError, match=r"data\.hub_name nobody/nothing train v1 cannot be loaded .*the network"):
        read(hub_name="nobody/nothing", hub_revision="v1")


LONG_ZSTD = zstandard.compress("".join(f"line {i}\n" for i in range(400_000)).encode())
