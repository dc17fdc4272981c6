"""What the parts are worth, and what they cost -> metrics/satipatthana/ablations.json.

dvc repro stages/satipatthana/dvc.yaml:ablations          (python -m stages.satipatthana.ablations)
"""

from functools import partial
from typing import Any

from lego.base.artifacts import derived_seed, write_json
from lego.base.harness import Stage, exit_cleanly
from lego.satipatthana.ablation import heads, macs
from lego.satipatthana.curriculum import STAGES, advance, begin, means, resume, written
from lego.satipatthana.jobs import classification_only
from lego.satipatthana.peers import plain_network
from lego.satipatthana.sections import SatipatthanaParams, changed, load
from lego.satipatthana.system import Satipatthana
from lego.satipatthana.tasks import Task, read_task
from stages.satipatthana.seeds import for_each_seed


def one_seed(params: SatipatthanaParams, seed: int) -> dict[str, dict[str, float]]:
    """Numbers by part of one seed."""
    task, own = read_task("data/satipatthana/task"), derived_seed(params.seed, f"satipatthana/ablations/{seed}")
    without = changed(params, {"vicara.kind": "none", "stage1.weight_stability": 0.0}, "ablations")
    found = heads(trained(task, params, seed), task, params, own)
    still = begin(task, without, seed)
    for number in STAGES:
        advance(still, number, task, without, seed)
    alone = heads(still, task, without, own)  # the same head on the same draws
    print(f"seed {seed}: {', '.join(found)}", flush=True)
    return found | {"without_vicara": alone.get("all_features", alone["recon_error"])}


def trained(task: Task, params: SatipatthanaParams, seed: int) -> Satipatthana:
    return resume(task, params, seed, STAGES[-1], f"data/satipatthana/stage3/seed_{seed}")


def main() -> None:
    params = load()
    classification_only(params, "ablations")
    with Stage("satipatthana/ablations", params.seed, params.threads):
        seeds_found = for_each_seed(partial(one_seed, params), params, params.ablations.seeds)
        found = {name: [one[name] for one in seeds_found] for name in seeds_found[0]}
        task = read_task("data/satipatthana/task")
        system = trained(task, params, 0)
        plain = plain_network(task, params.peers).eval()
        costs = {"satipatthana": macs(system, task.test.x), "plain": macs(plain, task.test.x)}
        costs["ensemble"] = params.peers.members * costs["plain"]
        seeds = {name: [written(one) for one in rows] for name, rows in found.items()}
        content: dict[str, Any] = {"means": {name: means(rows) for name, rows in found.items()}}
        write_json("metrics/satipatthana/ablations.json", content | {"macs": costs, "seeds": seeds})


if __name__ == "__main__":
    exit_cleanly(main)
