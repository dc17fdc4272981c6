"""Seconds that pieces of work take beside each other, on a machine whose speed changes."""

from __future__ import annotations

import time
from collections.abc import Callable


def fastest(works: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Seconds of the fastest of so many runs of each, in turns, so that a slow stretch of the machine slows all.

    Args:
        works: by name.
        repeats: runs of each.
    """
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeats):
        for name, work in works.items():
            start = time.perf_counter()
            work()
            times[name].append(time.perf_counter() - start)
    return {name: min(found) for name, found in times.items()}
