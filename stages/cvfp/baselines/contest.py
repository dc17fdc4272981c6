"""One model over all seeds, some side by side; the first chooses the rate on validation text -> metrics/cvfp/baselines.

dvc repro stages/cvfp/baselines/dvc.yaml          (python -m stages.cvfp.baselines.contest gru)
"""

import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from typing import Any

import torch

from lego.artifacts import derived_seed, read_json, write_json
from lego.cvfp.contest import compete
from lego.cvfp.sections import WRITTEN, CvfpParams, load
from lego.cvfp.text import read_text_ids
from lego.harness import Stage, StageError, exit_cleanly


def one_run(name: str, params: CvfpParams, run: tuple[int, float]) -> dict[str, Any]:
    """In a process of its own, on one thread."""
    torch.set_num_threads(1)
    torch.set_deterministic_debug_mode("error")
    seed, lr = run
    text, own = read_text_ids("data/cvfp/tokens"), derived_seed(params.seed, f"{name}/{seed}")
    try:
        return compete(name, params, text, own, lr)
    except FloatingPointError as error:  # of a rate that is too high; the search takes another
        return {"val_loss": sys.float_info.max, "diverged": str(error)}


def kept(
    stage: Stage, work: Callable[[tuple[int, float]], dict[str, Any]], runs: list[tuple[int, float]], workers: int
) -> list[dict[str, Any]]:
    """Results of the runs in order; those that a killed stage finished are taken from its scratch folder."""
    files = [stage.keep("runs") / f"{seed}-{lr:g}.json" for seed, lr in runs]
    missing = [(file, run) for file, run in zip(files, runs, strict=True) if not file.exists()]
    stage.continued |= len(missing) < len(runs)
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        for (file, (seed, lr)), found in zip(missing, pool.map(work, [run for _, run in missing]), strict=True):
            write_json(file, found)
            said = found.get("diverged") or f"validation loss {found['val_loss']:.4f}, ppl {found['ppl']:.2f}"
            print(f"seed {seed}, rate {lr:g}: {said}", flush=True)
    return [read_json(file, "val_loss") for file in files]


def main() -> None:
    params = load()
    if len(sys.argv) != 2 or sys.argv[1] not in params.peers.lr:
        raise StageError(f"give one of the models of peers.lr: {', '.join(params.peers.lr)}")
    name = sys.argv[1]
    with Stage(f"cvfp/baselines/contest@{name}", params.seed, 1) as stage:
        read_json("data/cvfp/tokens/text.json", "counts")
        work, base = partial(one_run, name, params), params.peers.lr[name]
        rates = [base * factor for factor in params.peers.lr_factors]
        first = kept(stage, work, [(0, lr) for lr in rates], params.peers.workers)
        best = min(range(len(rates)), key=lambda number: first[number]["val_loss"])
        runs = [(seed, rates[best]) for seed in range(1, params.peers.seeds)]
        found = [first[best], *kept(stage, work, runs, params.peers.workers)]
        if diverged := [number for number, one in enumerate(found) if "diverged" in one]:
            raise StageError(f"{name}: seed {diverged[0]} diverged at rate {rates[best]:g}; lower peers.lr.{name}")
        metrics: dict[str, Any] = {"lr": rates[best], "rate_at_an_end": best in (0, len(rates) - 1) and len(rates) > 1}
        for key in ("ppl", "bits_per_byte"):
            metrics |= {f"{key}_{seed}": one[key] for seed, one in enumerate(found)}
        metrics |= {key: sum(one[key] for one in found) / len(found) for key in found[0] if key not in metrics}
        write_json(f"metrics/cvfp/baselines/{name}.json", metrics)
        stage.record |= {"counts": {"tokens": sum(one.get("tokens", 0) for one in (*first, *found[1:]))}}


if __name__ == "__main__":
    exit_cleanly(main, WRITTEN)
