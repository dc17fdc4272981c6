"""One task over all seeds, with scores to compare -> metrics/satipatthana/tasks/found/<name>.json.

dvc repro stages/satipatthana/tasks/dvc.yaml          (python -m stages.satipatthana.tasks.train wine)
"""

import sys
from functools import partial
from typing import Any

import numpy as np

from lego.base.artifacts import derived_seed, write_json
from lego.base.harness import Stage, StageError, exit_cleanly
from lego.satipatthana import jobs, metrics
from lego.satipatthana.curriculum import STAGES, advance, begin, how_to_use, in_short, judge, means, written
from lego.satipatthana.peers import judge as judge_peer
from lego.satipatthana.peers import networks, of_inputs, peer
from lego.satipatthana.sections import SatipatthanaParams, load, with_profile
from lego.satipatthana.system import Satipatthana
from lego.satipatthana.tasks import Task
from lego.satipatthana.tasks import load as load_task
from stages.satipatthana.seeds import for_each_seed

Facts = dict[str, float]
OF_CLASSES = ("msp", "energy", "knn", "mahalanobis", "input_knn", "isolation_forest")  # with answers of a plain network
OF_INPUTS = ("input_knn", "isolation_forest")


def one_seed(params: SatipatthanaParams, seed: int) -> dict[str, Facts]:
    """Numbers of the system and of the scores it is compared with."""
    task, own = load_task(params.task, params.test), derived_seed(params.seed, f"satipatthana/tasks/{seed}")
    system = begin(task, params, seed)
    for number in STAGES:
        advance(system, number, task, params, seed)
    found = {"satipatthana": judge(system, task, how_to_use(system, task, params.reject), params, seed)}
    print(f"seed {seed}: {in_short(found['satipatthana'])}", flush=True)
    if params.task.job == "classification":
        plain = networks("plain", task, params.peers, own, params.void)
        scored = {name: peer(name, plain, task, params.peers, own) for name in OF_CLASSES}
        return found | {name: judge_peer(one, task.test, task.outside) for name, one in scored.items()}
    return found | {name: by_inputs(name, system, task, params, own) for name in OF_INPUTS}


def by_inputs(name: str, system: Satipatthana, task: Task, params: SatipatthanaParams, seed: int) -> Facts:
    """Numbers of a score of inputs beside the answers of the system."""
    score = of_inputs(name, task, params.peers, seed)
    inside = score(task.test.x)
    strangers = {kind: score(rows) for kind, rows in task.outside.items()}
    facts = {f"auroc_{kind}": metrics.auroc(inside, away) for kind, away in strangers.items()}
    if params.task.job == "anomaly":
        return facts | jobs.flagged(inside, np.concatenate(list(strangers.values())))
    right = jobs.right(params.task.job, system(task.test.x).output, task.test.y, params.reject.tolerance).numpy()
    return facts | jobs.believed(inside, right)


def main() -> None:
    params = load()
    if len(sys.argv) != 2 or sys.argv[1] not in params.tasks.names:
        raise StageError(f"give one of the tasks {', '.join(params.tasks.names)}")
    name = sys.argv[1]
    params = with_profile(params, name)
    with Stage(f"satipatthana/tasks/train@{name}", params.seed, params.threads):
        seeds = for_each_seed(partial(one_seed, params), params, params.tasks.seeds)
        task = load_task(params.task, params.test)
        rows = {split: len(getattr(task, split)) for split in ("train", "validation", "test")}
        content: dict[str, Any] = {"job": params.task.job, "rows": rows}
        for model in seeds[0]:
            facts = [one[model] for one in seeds]
            content[model] = {"means": means(facts), "seeds": [written(one) for one in facts]}
        write_json(f"metrics/satipatthana/tasks/found/{name}.json", content)


if __name__ == "__main__":
    exit_cleanly(main)
