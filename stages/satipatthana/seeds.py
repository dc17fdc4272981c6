"""Work for every seed, some side by side in processes of their own."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from lego.base.workers import side_by_side
from lego.satipatthana.sections import PARAMS, SatipatthanaParams

Result = TypeVar("Result")


def for_each_seed(
    work: Callable[[int], Result], params: SatipatthanaParams, seeds: int | None = None, light: bool = False
) -> list[Result]:
    """Results of the seeds 0, 1, ... in order; the same for any number of workers.

    Args:
        work: of a seed's number; a function that can be pickled.
        params: `seeds`, `threads` and `workers` are read.
        seeds: instead of params.seeds.
        light: whether the work is done here, one seed after the other, as a process takes seconds to start.

    Raises:
        StageError: a worker was killed. A failure in this process is told once the other workers are done.
    """
    numbers = range(params.seeds if seeds is None else seeds)
    others = 0 if light else min(params.workers, len(numbers)) - 1
    if not others:
        return [work(number) for number in numbers]
    # this process is one of the workers: it has begun while the others still start, so it takes the larger share
    elsewhere = numbers[: len(numbers) * others // (others + 1)]
    with ThreadPoolExecutor(1) as watch:
        found = watch.submit(list, side_by_side(work, elsewhere, others, params.threads, f"workers in {PARAMS}"))
        here = []
        for number in numbers[len(elsewhere) :]:
            here.append(work(number))
            if found.done():
                found.result()  # a failure elsewhere is told before the next seed
        return [*found.result(), *here]
