"""Where text comes from: the standard library, files of many kinds, or a Hugging Face dataset."""

from __future__ import annotations

import hashlib
import io
import os
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from lego.base.outside import shown, special
from lego.base.patterns import LinePattern, SlowPatternError
from lego.base.sections import DataParams
from lego.text.chats import MOST_NESTED, NestedError, ShapeError, joined, told
from lego.text.corpus import Document
from lego.text.readers import READABLE, Row, csv_rows, json_rows, kind_of, lines
from lego.text.tables import parquet_rows
from lego.tokens.blocks import CorpusError

# data-like packages are left out: 82 % of the lines of encodings/ stand in a sibling file
EXCLUDED_FOLDERS = {"site-packages", "dist-packages", "encodings", "pydoc_data"}
TEST_FOLDERS = {"test", "tests", "idle_test"}
DATA_PATH = "params.yaml: data.path"  # the key that names files
EXCLUDED_FILES = "_sysconfigdata"  # written by the build of this very interpreter, paths included


def documents(data: DataParams, refused: Counter[str] | None = None) -> Iterator[Document]:
    """The documents of the source that params.yaml names.

    Args:
        data: section of the parameters.
        refused: counts the chats of no known shape that are left out, by what they are made of.

    Raises:
        CorpusError: a file, column, dataset or revision that cannot be read; the message names it.
    """
    if data.source == "python-stdlib":
        return stdlib_documents(tests=data.stdlib_tests)
    refused = Counter() if refused is None else refused
    texts = file_texts(Path(data.path), data, refused) if data.source == "text" else hub_texts(data, refused)
    return (_named_by_content(text) for text in texts)


def _named_by_content(text: str) -> Document:
    """So that equal text has an equal place, whatever file or row holds it."""
    text = text.encode(errors="replace").decode()  # half a surrogate pair, which JSON can spell, is no character
    name = hashlib.sha256(text.encode()).hexdigest()
    return Document(name, name, text)


def stdlib_documents(root: str | Path | None = None, tests: bool = False) -> Iterator[Document]:
    """The running interpreter's standard library: its .py files without site-packages.

    Args:
        root: folder to read instead. The group of a file is its top-level module or package.
        tests: whether its tests are read too: twice as much again, where the interpreter ships them.
    """
    excluded = EXCLUDED_FOLDERS if tests else EXCLUDED_FOLDERS | TEST_FOLDERS
    root = Path(root or sysconfig.get_path("stdlib"))
    found = False
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if excluded.intersection(parts[:-1]) or path.name.startswith(EXCLUDED_FILES):
            continue
        found = True
        # test/test_json.py goes where json goes; all of test/ in one split would make another domain of it
        group = parts[1].removeprefix("test_") if parts[0] == "test" and len(parts) > 1 else parts[0]
        yield Document("/".join(parts), group.removesuffix(".py"), path.read_text("utf-8", "replace"))
    if not found:
        raise CorpusError(f"{root}: holds no .py file of a standard library; use a Python that ships its sources")


def text_files(path: Path, key: str = DATA_PATH) -> list[Path]:
    """The readable files of a folder in order of their names, or the one file.

    Raises:
        CorpusError: there is none.
    """
    if not path.exists():
        raise CorpusError(f"{path}: is missing; set {key} to a file or folder of {READABLE}")
    if what := special(path):
        raise CorpusError(f"{path}: is {what}, neither file nor folder; save what it gives as a file of {READABLE}")
    if path.is_file():
        if kind_of(path) is None:
            raise CorpusError(f"{path}: is of no kind that can be read; {key} takes {READABLE}")
        return [path]
    visible = sorted(_walk(path))
    files = [file for file in visible if kind_of(file) and file.is_file()]  # no pipe, whose reading may never end
    if not files:
        raise CorpusError(f"{path}: holds no text; put files there ({READABLE}) or set {key}")
    if others := len(visible) - len(files):
        print(f"{shown(str(path))}: {others} of {len(visible)} files are of another kind and not read", flush=True)
    return files


def _walk(folder: Path) -> Iterator[Path]:
    """All files that are not hidden; links to folders are followed, each folder is entered once."""
    entered: set[str] = set()
    for name, folders, files in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(name)) in entered:
            folders.clear()
            continue
        entered.add(real)
        folders[:] = [sub for sub in sorted(folders) if sub[0] != "."]
        yield from (Path(name, file) for file in files if file[0] != ".")


def file_texts(
    path: Path, data: DataParams, refused: Counter[str] | None = None, key: str = DATA_PATH
) -> Iterator[str]:
    """One text a file or row, or as `split_on` cuts them.

    Args:
        path, data: what is read and how.
        key: that names the path, for sentences.
        refused: as for `documents`.

    Raises:
        CorpusError: naming the file that is empty, damaged, not text, or lacks the column.
    """
    rows = {".jsonl": json_rows, ".csv": csv_rows, ".parquet": parquet_rows}
    counted: Counter[str] = Counter() if refused is None else refused
    for file in text_files(path, key):
        kind = str(kind_of(file))
        if kind in rows:
            unit = "row" if kind == ".parquet" else "line"
            found = rows[kind](file, data.column)
            texts = _texts(found, str(file), data, counted, unit, ragged=kind == ".jsonl")
        else:
            texts = _cut(lines(file), data.split_on, str(file)) if data.split_on else iter(["".join(lines(file))])
        empty = True
        for text in texts:
            empty = empty and not text.strip()
            yield text
        if empty:
            raise CorpusError(f"{file}: is empty; put text there or remove the file")


def hub_texts(data: DataParams, refused: Counter[str]) -> Iterator[str]:
    """Rows of a dataset by its hub name (or a local folder that `datasets` reads), as `split_on` cuts them.

    Raises:
        CorpusError: no such dataset, configuration, split, revision or column, no network, no room in its cache.
    """
    import datasets

    datasets.disable_progress_bars()  # what it has to say comes back as an exception; its own lines would bury ours
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    what = " ".join(str(part) for part in (data.hub_name, data.hub_config, data.hub_split, data.hub_revision) if part)
    print(
        f"reading {what} {'as a stream' if data.streaming else '(downloaded first, where it is not yet)'}", flush=True
    )
    try:
        rows = datasets.load_dataset(
            data.hub_name,
            data.hub_config,
            split=data.hub_split,
            revision=data.hub_revision,
            streaming=data.streaming,
            trust_remote_code=False,
        )
    except Exception as error:  # of the network, the hub, the file system and the dataset alike
        reason = (str(_cause(error)).strip() or type(error).__name__).split("\n")[0].rstrip(".")
        raise CorpusError(
            f"params.yaml: data.hub_name {what} cannot be loaded ({reason}); check data.hub_name, hub_config, "
            "hub_split and hub_revision, the network, and that the folder HF_HOME names can be written"
        ) from None
    if data.column in (rows.column_names or ()):  # unknown of some streams
        rows = rows.select_columns([data.column])  # what the others hold need not be read, or be readable
    yield from _texts(enumerate(_guarded(rows, what), 1), f"params.yaml: data.hub_name {what}", data, refused)


def _cause(error: BaseException) -> BaseException:
    """datasets wraps what really happened."""
    return _cause(error.__cause__) if error.__cause__ is not None else error


def _guarded(rows: Iterable[dict[str, Any]], what: str) -> Iterator[dict[str, Any]]:
    try:
        yield from rows
    except Exception as error:
        reason = (str(_cause(error)).strip() or type(error).__name__).split("\n")[0]
        raise CorpusError(
            f"params.yaml: data.hub_name {what}: reading stopped ({reason}); check the network and run dvc repro again"
        ) from None


def _texts(
    rows: Iterable[Row], origin: str, data: DataParams, refused: Counter[str], unit: str = "row", ragged: bool = False
) -> Iterator[str]:
    """The text of each row; rows without any are left out, and of `ragged` ones those without the column.

    Chats of no known shape are counted in `refused`; where there is nothing else, the source is refused.
    """

    def texts() -> Iterator[str]:
        columns, kind, found, strange = "", "", False, Counter[str]()
        for number, row in rows:
            if data.column not in row:
                columns = columns or " ".join(", ".join(row).split())[:200]  # a damaged header can hold anything
                if ragged:
                    continue
                break
            try:
                text = joined(row[data.column])
            except ShapeError as error:
                kind = type(row[data.column]).__name__
                if kind in ("list", "dict"):
                    strange[str(error)] += 1
                    refused[str(error)] += 1
                    continue
                sentence = f"{origin}: {data.column} holds {kind}, not text ({unit} {number})"
                raise CorpusError(f"{sentence}; set params.yaml: data.column") from None
            except NestedError:
                sentence = f"{origin}: {unit} {number} is nested more than {MOST_NESTED} deep, as no chat is; remove it"
                raise CorpusError(sentence) from None
            found = True
            if text:
                yield text
        if strange and not found:
            raise CorpusError(
                f"{origin}: {data.column} holds {kind}, not text or turns of role and content ({told(strange)}); set "
                "params.yaml: data.column, or write the turns so"
            )
        if columns and not found:
            raise CorpusError(f"{origin}: has no column {data.column}; set params.yaml: data.column to {columns}")

    if not data.split_on:
        return texts()
    lines = (line if line.endswith("\n") else line + "\n" for text in texts() for line in io.StringIO(text))
    return _cut(lines, data.split_on, origin)


def _cut(lines: Iterable[str], split_on: str, origin: str) -> Iterator[str]:
    """Documents, each of which begins at a line that the regular expression matches."""
    begins = LinePattern(split_on)
    current: list[str] = []
    for line in lines:
        try:
            if begins.matches(line) and current:
                yield "".join(current)
                current = []
        except SlowPatternError as error:
            raise CorpusError(
                f"params.yaml: data.split_on {split_on!r} {error} of {origin}; write it without repetitions inside "
                "repetitions"
            ) from None
        current.append(line)
    if current:
        yield "".join(current)
