"""What comes from outside: how large it may grow, what a file is, and how to show it on a terminal."""

from __future__ import annotations

import csv
import stat
import sys
import unicodedata
from collections.abc import Collection
from pathlib import Path

ROOM = 64 * 2**20  # bytes that any file may unpack to
RATIO = 200  # text packs 3 to 20 times, logs up to 100; bombs a thousand times and more


def allowed(packed: int) -> int:
    """Bytes that a file of so many may unpack to: more than any text needs, less than what fills a disk."""
    return max(ROOM, RATIO * packed)


def special(path: Path) -> str | None:
    """What a path is that exists and is neither file nor folder: reading it may never begin, or never end."""
    mode = path.stat().st_mode
    for is_one, name in (
        (stat.S_ISFIFO, "a pipe"),
        (stat.S_ISSOCK, "a socket"),
        (stat.S_ISCHR, "a device"),
        (stat.S_ISBLK, "a device"),
    ):
        if is_one(mode):
            return name
    return None


def other_separator(header: str, wanted: Collection[str] = ()) -> str | None:
    """The name of what seems to separate the cells of a CSV header, if that is not commas.

    Args:
        header: the first line.
        wanted: columns that should be there; where they are tells a separator from a mark within a name.
    """
    names = {";": "semicolons", "\t": "tabs", "|": "bars"}

    def has_wanted(mark: str) -> bool:
        try:
            cells = next(csv.reader([header.rstrip("\r\n")], delimiter=mark), [])
        except csv.Error:  # a cell of over 131,072 characters
            return False
        return bool(wanted) and {*wanted} <= {cell.strip() for cell in cells}

    if has_wanted(","):
        return None
    found = (name for mark, name in names.items() if has_wanted(mark))
    return next(found, None) or (
        None if "," in header else next((name for mark, name in names.items() if mark in header), None)
    )


def printable(text: str) -> str:
    """Text whose control characters, which a terminal would obey, are spelled out; line ends and tabs stay."""
    shown = (
        letter if letter in "\n\t" or unicodedata.category(letter) != "Cc" else f"\\x{ord(letter):02x}"
        for letter in text
    )
    return text if text.isprintable() else "".join(shown)


def encodable(text: str, encoding: str | None) -> str:
    """Text whose characters that an encoding lacks are spelled out."""
    name = encoding or "utf-8"
    return text.encode(name, "backslashreplace").decode(name)


def shown(text: str) -> str:
    """Text as it may be printed to standard output, whatever it holds."""
    return encodable(printable(text), sys.stdout.encoding)
