"""Few documents: each is cut into parts, so that every split gets some of them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from lego.text.corpus import Document

SIZES = (2000, 500, 125)  # characters of a part, tried in this order until no split is short of text


def pieces(text: str, size: int) -> Iterator[str]:
    """A text in parts of at most `size` characters that end with a paragraph, else a line, else a word, where they can.

    Nothing is lost: the parts together are the text.
    """
    start = 0
    while start < len(text):
        part = text[start : start + size]
        if start + size < len(text):
            for end in (r"\n\s*\n", r"\n", r"[。、]|\s"):
                if found := list(re.finditer(end, part[size // 2 :])):
                    part = part[: size // 2 + found[-1].end()]
                    break
        yield part
        start += len(part)


def parts(documents: Iterable[Document], size: int) -> Iterator[Document]:
    """Every part as a document with a split of its own."""
    for document in documents:
        for number, text in enumerate(pieces(document.text, size)):
            name = f"{document.name}#{number}"
            yield Document(name, name, text)
