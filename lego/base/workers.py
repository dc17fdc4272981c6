"""Independent work side by side, in processes of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from multiprocessing import get_context
from typing import TypeVar

import torch

from lego.base.harness import StageError, reuse_freed_memory

Item = TypeVar("Item")
Result = TypeVar("Result")


def side_by_side(
    work: Callable[[Item], Result], items: Sequence[Item], workers: int, threads: int, key: str
) -> Iterator[Result]:
    """Results in the order of the items, each as soon as it and those before it are there.

    Args:
        work: of an item; a function that can be pickled.
        items: what there is to do.
        workers: processes, each fresh and serving one item after another.
        threads: of each.
        key: that sets how many workers there are, for messages.

    Raises:
        StageError: a worker was killed.
    """
    if not items:
        return
    with ProcessPoolExecutor(min(workers, len(items)), mp_context=get_context("spawn")) as pool:
        try:
            yield from pool.map(partial(_on_threads, work, threads), items)
        except BrokenProcessPool:
            raise StageError(
                f"a worker was killed before it was done, perhaps for want of memory; free some or lower {key}, "
                "and run again"
            ) from None


def _on_threads(work: Callable[[Item], Result], threads: int, item: Item) -> Result:
    """The work in a process that is set up as a stage is."""
    reuse_freed_memory()
    torch.set_num_threads(threads)
    torch.set_deterministic_debug_mode("error")
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    return work(item)
