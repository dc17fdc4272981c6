"""Two text files as a folder for data.path: all documents of the second are test text, and none of the first is.

python -m benchmarks.two_files train.txt test.txt wikitext2 --split-on ' = [^=]'

A document's split follows from a hash of its content. So line breaks are added at its end until the hash lies where it
should: below data.test_share for documents of the second file, above it for those of the first.
"""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path

from lego.corpus import split_of, unit_hash
from lego.params import load_params
from lego.sections import DataParams
from lego.sources import file_texts


def padded(text: str, test: bool, share: float) -> str:
    """The text with as many line breaks at its end as bring it into the test split, or out of it."""
    while (unit_hash(hashlib.sha256(text.encode()).hexdigest()) < share) != test:
        text += "\n"
    return text


def arrange(train: Path, test: Path, folder: Path, data: DataParams) -> dict[str, int]:
    """Writes both files into the folder; returns the number of documents by split.

    Args:
        train, test: text files.
        folder: is made if need be.
        data: its split_on and shares count.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shares = {name: getattr(data, f"{name}_share") for name in ("validation", "calibration", "test")}
    counts: dict[str, int] = {}
    for source, is_test in ((train, False), (test, True)):
        texts = [padded(text, is_test, data.test_share) for text in file_texts(source, data) if text.strip()]
        for text in texts:
            split = split_of(hashlib.sha256(text.encode()).hexdigest(), **shares)
            counts[split] = counts.get(split, 0) + 1
        (folder / f"{'test' if is_test else 'train'}.txt").write_text("".join(texts), "utf-8")
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train", type=Path)
    parser.add_argument("test", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--split-on", help="a document begins at each line this regular expression matches")
    asked = parser.parse_args()
    data = load_params().data.model_copy(update={"split_on": asked.split_on})
    print(f"{asked.folder}: documents by split: {arrange(asked.train, asked.test, asked.folder, data)}")


if __name__ == "__main__":
    main()
