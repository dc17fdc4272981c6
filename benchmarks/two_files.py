"""Two text files as a folder for data.path: all documents of the second are test text, and none of the first is.

python -m benchmarks.two_files train.txt test.txt wikitext2 --split-on ' = [^=]'

A document's split follows from a hash of its content. So line breaks are added at its end until the hash lies where it
should: below data.test_share for documents of the second file, above it for those of the first. So the folder is made
for the data.test_share of params.yaml, and for this --split-on as data.split_on.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections import Counter
from pathlib import Path

from pydantic import ValidationError

from lego.base.artifacts import atomic_folder
from lego.base.parameter_files import ParamsError
from lego.base.params import load_params
from lego.base.sections import DataParams
from lego.text.corpus import split_of, unit_hash
from lego.text.readers import kind_of
from lego.text.sources import documents, file_texts
from lego.tokens.blocks import CorpusError


def padded(text: str, test: bool, share: float) -> str:
    """The text with as many line breaks at its end as bring it into the test split, or out of it."""
    while (unit_hash(hashlib.sha256(text.encode()).hexdigest()) < share) != test:
        text += "\n"
    return text


def arrange(train: Path, test: Path, folder: Path, data: DataParams) -> Counter[str]:
    """Writes both files into a new folder; returns the number of documents by split.

    Args:
        train, test: plain text files.
        folder: is made; whatever else it held would be read too.
        data: its split_on and shares count.

    Raises:
        CorpusError: a file cannot be read, is not plain text, or the folder holds something.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CorpusError(f"{folder}: must be a new or empty folder, as all that it holds is read")
    texts = {}
    for file, is_test in ((train, False), (test, True)):
        if kind_of(file) not in (".txt", ".md"):
            raise CorpusError(f"{file}: must be a .txt or .md file; rows of other kinds would stick together")
        # a line break at the end, so that the next document begins at a line
        whole = [text if text.endswith("\n") else text + "\n" for text in file_texts(file, data) if text.strip()]
        texts[is_test] = [padded(text, is_test, data.test_share) for text in whole]
    with atomic_folder(folder, digests=False) as written:
        for is_test, name in ((False, "train.txt"), (True, "test.txt")):
            (written / name).write_text("".join(texts[is_test]), "utf-8")
    found = list(documents(data.model_copy(update={"source": "text", "path": str(folder)})))
    counts = Counter(split_of(document.group, **data.held_out_shares) for document in found if document.text.strip())
    if counts["test"] != len(texts[True]) or counts.total() != len(texts[True]) + len(texts[False]):
        raise CorpusError(f"{folder}: does not read back as it was written; choose --split-on so that it cuts by lines")
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train", type=Path)
    parser.add_argument("test", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--split-on", help="a document begins at each line this regular expression matches")
    asked = parser.parse_args()
    try:
        data = DataParams.model_validate(load_params().data.model_dump() | {"split_on": asked.split_on})
        counts = arrange(asked.train, asked.test, asked.folder, data)
    except ValidationError as error:
        sys.exit(f"error: --{error.errors()[0]['msg'].removeprefix('Value error, ')}")
    except (CorpusError, ParamsError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"{asked.folder}: documents by split: {dict(counts)}")


if __name__ == "__main__":
    main()
