"""The sentence that each faulty file or folder of text gets."""

from __future__ import annotations

import gzip
from pathlib import Path

import pyarrow as pa
import pytest

from lego.tokens.blocks import CorpusError
from tests.text.test_sources import LONG_ZSTD, TEXTS, pa_bytes, read, table_bytes

GOOD_GZIP = gzip.compress(b"some text that is long enough to be cut in the middle")
NO_ROWS = pa_bytes(pa.table({"text": pa.array([], pa.string())}))
FAULTY = {  # file name -> content, what its sentence says
    "empty.txt": (b"", r"empty\.txt: is empty; put text there or remove the file"),
    "blank.md": (b" \n\t\n", r"blank\.md: is empty"),
    "latin.txt": ("naïve".encode("latin-1"), r"latin\.txt: is not UTF-8 \(byte 0xef\); convert it"),
    "binary.txt": (b"\x00\x01\x02", r"binary\.txt: holds zero bytes, so it is not text"),
    "cut.txt.gz": (
        GOOD_GZIP[:30],
        r"cut\.txt\.gz: cannot be read \(Compressed file ended .*restore or remove the file",
    ),
    "fake.txt.gz": (b"no gzip at all", r"fake\.txt\.gz: cannot be read \(Not a gzipped file"),
    "edited.txt.gz": (GOOD_GZIP[:20] + b"\xff" * 8 + GOOD_GZIP[28:], r"edited\.txt\.gz: cannot be read"),
    "fake.md.zst": (b"no zstandard", r"fake\.md\.zst: cannot be read"),
    "cut.parquet": (table_bytes("parquet", TEXTS)[:-20], r"cut\.parquet: cannot be read"),
    "fake.parquet": (b"no parquet", r"fake\.parquet: cannot be read"),
    "broken.jsonl": (b'{"text": "a"}\n{"text": \n', r"broken\.jsonl: cannot be read"),
    "empty.jsonl": (b"", r"empty\.jsonl: (is empty|cannot be read)"),
    "empty.csv": (b"", r"empty\.csv: (is empty|cannot be read)"),
    "other.jsonl": (
        b'{"body": "a"}\n',
        r"other\.jsonl: has no column text; set params\.yaml: data\.column to body",
    ),
    "other.csv": (b"id,body\n1,a\n", r"other\.csv: has no column text; .* to id, body"),
    "comma.csv": (b"id,text\n1,a\n2,b,c\n", r"comma\.csv: cannot be read \(line 3: more cells than the header has"),
    "quote.csv": (b'id,text\n1,"a\n2,b\n', r"quote\.csv: cannot be read \(line \d: unexpected end of data"),
    "list.jsonl": (b'["a"]\n', r"list\.jsonl: cannot be read \(line 1 is no JSON object\)"),
    "number.jsonl": (b'{"text": 3}\n', r"number\.jsonl: text holds int, not text"),
    "cut.txt.zst": (LONG_ZSTD[: len(LONG_ZSTD) // 2], r"cut\.txt\.zst: cannot be read \(the file is cut short\)"),
    "cut.jsonl.zst": (LONG_ZSTD[:-1], r"cut\.jsonl\.zst: cannot be read \(the file is cut short\)"),
    "nested.jsonl": (b'{"text": {"deep": 1}}\n', r"nested\.jsonl: text holds dict, not text"),
    "nothing.jsonl": (b'{"text": ""}\n{"text": null}\n', r"nothing\.jsonl: is empty"),
    "norows.parquet": (NO_ROWS, r"norows\.parquet: is empty"),
    "deep.jsonl": (
        b'{"text": "kept"}\n\n{"text": ' + b"[" * 900 + b'"x"' + b"]" * 900 + b"}\n",
        r"deep\.jsonl: line 3 is nested more than 20 deep, as no chat is; remove it",
    ),
    "deeper.jsonl": (
        b'{"text": "kept", "other": ' + b"[" * 10**5 + b"]" * 10**5 + b"}\n",
        r"deeper\.jsonl: cannot be read \(line 1 is nested too deep\)",
    ),
    "huge.jsonl": (
        b'{"text": "a"}\n{"text": "b", "id": ' + b"9" * 5000 + b"}\n",
        r"huge\.jsonl: cannot be read \(line 2: a number of more than 4300 digits\); restore or remove the file",
    ),
    "semicolons.csv": (b'id;text\n1;"a, b"\n', r"semicolons\.csv: line 1 separates its cells by semicolons; write the"),
    "quoted.csv": (b'"id";"text"\n"1";"a"\n', r"quoted\.csv: line 1 separates its cells by semicolons"),
    "tabs.csv": (b"id\ttext\n1\ta\n", r"tabs\.csv: line 1 separates its cells by tabs; write the file anew with comm"),
    "excel.csv": (b"sep=;\r\nid;text\r\n1;a\r\n", r"excel\.csv: line 1 separates its cells by semicolons"),
    "blank.csv": (b"\nid,text\n1,a\n", r"blank\.csv: line 1 is blank where the names of the columns should stand"),
    "commas.csv": (b" ,,\r\nid,text,x\r\n1,a,b\r\n", r"commas\.csv: line 1 is blank where the names"),
    "twice.csv": (b"text,text\n1,a\n", r"twice\.csv: line 1 has the column text twice; drop or rename one"),
    "date.parquet": (
        pa_bytes(pa.table({"text": pa.array([10**7], pa.date32())})),
        r"date\.parquet: text holds date32, not text; set params\.yaml: data\.column",
    ),
    "picture.png": (b"\x89PNG", r"picture\.png: is of no kind that can be read; params\.yaml: data\.path takes \.txt"),
}


@pytest.mark.parametrize("name", FAULTY)
def test_a_faulty_file_is_named_with_what_is_wrong(tmp_path, name):
    content, sentence = FAULTY[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CorpusError, match=sentence) as caught:
        read(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_a_folder_without_text_and_a_missing_one_are_named(tmp_path):
    with pytest.raises(CorpusError, match=r"holds no text; put files there \(\.txt, .*\) or set .*data\.path"):
        read(tmp_path)
    with pytest.raises(CorpusError, match=r"nowhere: is missing; set params\.yaml: data\.path"):
        read(tmp_path / "nowhere")


def test_a_file_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("text")

    def refused(self, *args, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refused)  # the tests may run as root, who may read everything
    with pytest.raises(CorpusError, match=r"a\.txt: cannot be read \(\[Errno 13\] Permission denied\)"):
        read(tmp_path)
