"""One stage of the curriculum for all seeds -> data/satipatthana/stage<number>.

dvc repro stages/satipatthana/dvc.yaml:train_stage2          (python -m stages.satipatthana.train_stage 2)
"""

import sys
import time
from functools import partial
from pathlib import Path

from lego.base.artifacts import atomic_folder, write_csv, write_json, write_text
from lego.base.harness import Stage, StageError, exit_cleanly
from lego.satipatthana.curriculum import STAGES, advance, begin, resume
from lego.satipatthana.sections import SatipatthanaParams, load
from lego.satipatthana.store import Use, save
from lego.satipatthana.tasks import read_task
from stages.satipatthana.seeds import for_each_seed

LIGHT = (0, 3)  # stages of a second or less a seed


def one_seed(number: int, params: SatipatthanaParams, folder: Path, seed: int) -> tuple[list[dict[str, float]], float]:
    """Trains a seed's system, saves it in the folder, and returns its terms by epoch and the seconds of training."""
    task, before = read_task("data/satipatthana/task"), f"data/satipatthana/stage{number - 1}/seed_{seed}"
    system = resume(task, params, seed, number - 1, before) if number else begin(task, params, seed)
    begun = time.perf_counter()
    history = advance(system, number, task, params, seed)
    seconds = time.perf_counter() - begun
    (folder / f"seed_{seed}").mkdir()
    save(system, folder / f"seed_{seed}", Use(task.classes))
    if history:
        said = ", ".join(f"{name} {value:.4f}" for name, value in history[-1].items())
        print(f"stage {number}, seed {seed}: {said}", flush=True)
    return history, seconds


def main() -> None:
    if len(sys.argv) != 2 or sys.argv[1] not in map(str, STAGES):
        raise StageError(f"give the number of a stage, {STAGES[0]} to {STAGES[-1]}")
    number, params = int(sys.argv[1]), load()
    with Stage(f"satipatthana/train_stage{number}", params.seed, params.threads) as stage:
        with atomic_folder(f"data/satipatthana/stage{number}") as folder:
            done = for_each_seed(partial(one_seed, number, params, folder), params, light=number in LIGHT)
        histories = [history for history, _ in done]
        rows = [
            {"seed": seed, "epoch": epoch} | terms
            for seed, history in enumerate(histories)
            for epoch, terms in enumerate(history, 1)
        ]
        last = [history[-1] for history in histories if history]
        means = {name: sum(one[name] for one in last) / len(last) for name in (last[0] if last else {})}
        write_json(f"metrics/satipatthana/stage{number}.json", means)
        curve = f"metrics/satipatthana/curves/stage{number}.csv"
        if rows:
            write_csv(curve, rows)
        else:
            write_text(curve, "seed,epoch,loss\n")
        stage.record |= {"seconds_a_seed": sum(seconds for _, seconds in done) / len(done)}
        stage.record |= {"counts": {"rows": len(read_task("data/satipatthana/task").train) * len(rows)}}


if __name__ == "__main__":
    exit_cleanly(main)
