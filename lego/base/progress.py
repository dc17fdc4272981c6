"""Progress that suits both a terminal and a queue's log file."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")
PLAIN_INTERVAL = 10.0  # seconds between lines where there is no terminal
LINE = "{desc}: {n_fmt}/{total_fmt} {unit} ({percentage:.0f} %), {rate_noinv_fmt}, {remaining} left"
LINE_WITHOUT_TOTAL = "{desc}: {n_fmt} {unit}, {rate_noinv_fmt}"


def track(
    items: Iterable[T],
    total: int | None,
    description: str,
    unit: str,
    size: Callable[[T], int] = lambda item: 1,
) -> Iterator[T]:
    """Passes items on while showing count, percent, rate and time left: a bar on a terminal, else a line every 10 s.

    Args:
        items: what to pass on.
        total: how many units there are; None if unknown.
        description: what is being done.
        unit: what is counted, e.g. "batch".
        size: how many units an item is.
    """
    if sys.stderr.isatty():
        with tqdm(total=total, desc=description, unit=unit, leave=False, unit_scale=(total or 0) > 10_000) as bar:
            for item in items:
                yield item
                bar.update(size(item))
        return
    start = shown = time.monotonic()
    count = 0
    for item in items:
        yield item
        count += size(item)
        now = time.monotonic()
        if now - shown >= PLAIN_INTERVAL:
            shown = now
            line = tqdm.format_meter(
                count,
                total or 0,
                now - start,
                prefix=description,
                unit=unit,
                unit_scale=count > 10_000,
                bar_format=LINE if total else LINE_WITHOUT_TOTAL,
            )
            print(" ".join(line.split()), file=sys.stderr, flush=True)  # tqdm pads the rate


def share(part: int, whole: int, unit: str = "tokens") -> str:
    """A proportion with its base, as in `52.3 % (41,984/80,256 tokens)`."""
    return f"{100 * part / whole:.1f} % ({part:,}/{whole:,} {unit})"
