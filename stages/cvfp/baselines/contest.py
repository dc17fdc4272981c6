"""One model over all seeds, some side by side; the first seed chooses the rate on validation text.

What `own` and `peers` share: -> metrics/cvfp/baselines/<model>.json.
"""

import resource
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from lego.base.artifacts import derived_seed, read_json, write_json
from lego.base.harness import Stage, StageError
from lego.base.workers import side_by_side
from lego.cvfp.contest import made_of
from lego.cvfp.sections import PARAMS, CvfpParams, load
from lego.cvfp.text import Text, read_text_ids

Compete = Callable[[str, CvfpParams, Text, int, float], dict[str, Any]]


class Run(NamedTuple):
    """A seed's number, a rate, and the share of train text from its start."""

    seed: int
    lr: float
    share: float = 1.0

    def file(self) -> str:
        part = "" if self.share == 1 else f"-{self.share:g}"
        return f"{self.seed}-{self.lr:g}{part}.json"


def one_run(compete: Compete, name: str, params: CvfpParams, run: Run) -> dict[str, Any]:
    """In a process that serves this model alone."""
    own = derived_seed(params.seed, f"contest/{run.seed}")  # the same for all models
    text = read_text_ids("data/cvfp/tokens").first(run.share)
    begun = time.perf_counter()
    try:
        found = compete(name, params, text, own, run.lr)
        seconds = time.perf_counter() - begun - found.pop("seconds_besides", 0.0)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # KiB on Linux
        return found | {"seconds": seconds, "peak_mib": peak}
    except FloatingPointError as error:  # of a rate that is too high; the search takes another
        return {"val_loss": sys.float_info.max, "diverged": str(error)}


def kept(stage: Stage, work: Callable[[Run], dict[str, Any]], runs: list[Run], workers: int) -> list[dict[str, Any]]:
    """Results of the runs in order; those that a killed stage finished are taken from its scratch folder."""
    files = [stage.keep("runs") / run.file() for run in runs]
    missing = [(file, run) for file, run in zip(files, runs, strict=True) if not file.exists()]
    stage.continued |= len(missing) < len(runs)
    results = side_by_side(work, [run for _, run in missing], workers, 1, f"contest.workers in {PARAMS}")
    for (file, run), found in zip(missing, results, strict=True):
        write_json(file, found)
        part = "" if run.share == 1 else f", {run.share:g} of train"
        said = found.get("diverged") or f"validation loss {found['val_loss']:.4f}, ppl {found['ppl']:.2f}"
        print(f"seed {run.seed}, rate {run.lr:g}{part}: {said}", flush=True)
    return [read_json(file, "val_loss") for file in files]


def chosen(
    name: str, params: CvfpParams, base: float, runs: Callable[[list[Run]], list[dict[str, Any]]]
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Results by seed at the rate that suits the first one, and what was searched.

    Raises:
        StageError: a seed diverged at that rate.
    """
    rates = [base * factor for factor in params.contest.lr_factors]
    first = runs([Run(0, lr) for lr in rates])
    best = min(range(len(rates)), key=lambda number: first[number]["val_loss"])
    found = [first[best], *runs([Run(seed, rates[best]) for seed in range(1, params.contest.seeds)])]
    if diverged := [number for number, one in enumerate(found) if "diverged" in one]:
        raise StageError(f"{name}: seed {diverged[0]} diverged at rate {rates[best]:g}; lower its rate in contest")
    at_an_end = best in (0, len(rates) - 1) and len(rates) > 1
    searched = {f"val_loss_at_{lr:g}": one["val_loss"] for lr, one in zip(rates, first, strict=True)}
    return found, {"lr": rates[best], "rate_at_an_end": at_an_end} | searched


def run(group: str, compete: Compete) -> None:
    """Trains the model that the command line names.

    Args:
        group: `own` or `peers`, the list in the section contest that it is of.
        compete: trains one seed with one rate.

    Raises:
        StageError: there is no such model, or it diverges.
    """
    params = load()
    rates: dict[str, float] = getattr(params.contest, group)
    if len(sys.argv) != 2 or sys.argv[1] not in rates:
        raise StageError(f"give one of the models of contest.{group}: {', '.join(rates)}")
    name = sys.argv[1]
    with Stage(f"cvfp/baselines/{group}@{name}", params.seed, 1) as stage:
        text, work = read_text_ids("data/cvfp/tokens"), partial(one_run, compete, name, params)
        found, metrics = chosen(name, params, rates[name], lambda runs: kept(stage, work, runs, params.contest.workers))
        stage.record |= {"seconds_a_run": sum(one.pop("seconds") for one in found) / len(found)}
        stage.record |= {"peak_mib": max(one.pop("peak_mib") for one in found)}
        for key in [key for key in found[0] if key in ("ppl", "bits_per_byte") or "_trained_" in key]:
            metrics |= {f"{key}_{seed}": one[key] for seed, one in enumerate(found)}
        metrics |= {key: sum(one[key] for one in found) / len(found) for key in found[0]}
        write_json(f"metrics/cvfp/baselines/{name}.json", metrics | {"made_of": made_of(name, params, text.digests())})
