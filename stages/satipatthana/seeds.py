"""Work for every seed, some side by side in processes of their own."""

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from typing import TypeVar

import torch

from lego.satipatthana.sections import SatipatthanaParams

Result = TypeVar("Result")


def for_each_seed(work: Callable[[int], Result], params: SatipatthanaParams, seeds: int | None = None) -> list[Result]:
    """Results of the seeds 0, 1, ... in order; the same for any number of workers.

    Args:
        work: of a seed's number; a function that can be pickled.
        params: `seeds`, `threads` and `workers` are read.
        seeds: instead of params.seeds.
    """
    numbers = range(params.seeds if seeds is None else seeds)
    if min(params.workers, len(numbers)) == 1:
        return [work(number) for number in numbers]
    with ProcessPoolExecutor(min(params.workers, len(numbers)), mp_context=get_context("spawn")) as pool:
        return list(pool.map(partial(_on_threads, work, params.threads), numbers))


def _on_threads(work: Callable[[int], Result], threads: int, seed: int) -> Result:
    torch.set_num_threads(threads)
    torch.set_deterministic_debug_mode("error")
    return work(seed)
