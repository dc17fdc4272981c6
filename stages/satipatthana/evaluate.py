"""All numbers of every seed, and the system in use -> metrics/satipatthana/evaluate.json, data/satipatthana/system.

dvc repro stages/satipatthana/dvc.yaml:evaluate          (python -m stages.satipatthana.evaluate)
"""

from lego.base.artifacts import atomic_folder, write_json, write_metrics
from lego.base.harness import Stage, exit_cleanly
from lego.satipatthana.curriculum import STAGES, how_to_use, in_short, judge, means, resume, written
from lego.satipatthana.sections import load
from lego.satipatthana.store import save
from lego.satipatthana.tasks import read_task

SUMMARY_KEYS = ("accuracy", "auroc_anomaly", "auroc_near", "coverage", "ece", "r2")
"""What `dvc metrics` shows, as far as the job has it: means over seeds; `coverage` is the share that is accepted."""


def main() -> None:
    params = load()
    with Stage("satipatthana/evaluate", params.seed, params.threads):
        task, found = read_task("data/satipatthana/task"), []
        for seed in range(params.seeds):
            system = resume(task, params, seed, STAGES[-1], f"data/satipatthana/stage3/seed_{seed}")
            use = how_to_use(system, task, params.reject)
            found.append(judge(system, task, use, params, seed))
            if not seed:
                with atomic_folder("data/satipatthana/system") as folder:
                    save(system, folder, use, guide=False)
            print(f"seed {seed}: {in_short(found[-1])}", flush=True)
        mean = means(found)
        write_json("metrics/satipatthana/evaluate.json", mean)
        write_metrics("metrics/satipatthana/summary.json", {key: mean.get(key) for key in SUMMARY_KEYS})
        write_json("metrics/satipatthana/seeds.json", {str(seed): written(one) for seed, one in enumerate(found)})


if __name__ == "__main__":
    exit_cleanly(main)
