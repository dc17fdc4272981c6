"""Work for every seed, some side by side in processes of their own."""

from collections.abc import Callable
from typing import TypeVar

from lego.satipatthana.sections import PARAMS, SatipatthanaParams
from lego.workers import side_by_side

Result = TypeVar("Result")


def for_each_seed(
    work: Callable[[int], Result], params: SatipatthanaParams, seeds: int | None = None, light: bool = False
) -> list[Result]:
    """Results of the seeds 0, 1, ... in order; the same for any number of workers.

    Args:
        work: of a seed's number; a function that can be pickled.
        params: `seeds`, `threads` and `workers` are read.
        seeds: instead of params.seeds.
        light: whether the work is done here, one seed after the other, as a process costs three seconds to start.

    Raises:
        StageError: a worker was killed.
    """
    numbers = range(params.seeds if seeds is None else seeds)
    if light or min(params.workers, len(numbers)) == 1:
        return [work(number) for number in numbers]
    return list(side_by_side(work, numbers, params.workers, params.threads, f"workers in {PARAMS}"))
