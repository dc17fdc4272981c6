"""Progress that suits both a terminal and a queue's log file."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")
PLAIN_INTERVAL = 10.0  # seconds between lines where there is no terminal


def track(items: Iterable[T], total: int, description: str, unit: str) -> Iterator[T]:
    """Passes items on while showing count, percent and time left: a bar on a terminal, else a line every 10 s.

    Args:
        items: what to pass on.
        total: how many items there are; 0 if unknown, then nothing is shown.
        description: what is being done.
        unit: what one item is, e.g. "batch".
    """
    if not total:
        yield from items
        return
    if sys.stderr.isatty():
        yield from tqdm(items, total=total, desc=description, unit=unit, leave=False)
        return
    start = shown = time.monotonic()
    for count, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if now - shown >= PLAIN_INTERVAL:
            shown = now
            bar = "{desc}: {n_fmt}/{total_fmt} {unit} ({percentage:.0f} %), {remaining} left"
            print(
                tqdm.format_meter(count, total, now - start, prefix=description, unit=unit, bar_format=bar),
                file=sys.stderr,
                flush=True,
            )


def share(part: int, whole: int, unit: str = "tokens") -> str:
    """A proportion with its base, as in `52.3 % (41,984/80,256 tokens)`."""
    return f"{100 * part / whole:.1f} % ({part:,}/{whole:,} {unit})"
