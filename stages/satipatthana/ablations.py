"""What the parts are worth, and what they cost -> metrics/satipatthana/ablations.json.

dvc repro stages/satipatthana/dvc.yaml:ablations          (python -m stages.satipatthana.ablations)
"""

from typing import Any

import numpy as np

from lego.artifacts import derived_seed, write_json
from lego.harness import Stage, exit_cleanly
from lego.satipatthana.ablation import heads, macs
from lego.satipatthana.curriculum import STAGES, advance, begin, means, resume, written
from lego.satipatthana.peers import Plain
from lego.satipatthana.sections import WRITTEN, changed, load
from lego.satipatthana.tasks import read_task


def main() -> None:
    params = load()
    with Stage("satipatthana/ablations", params.seed, params.threads):
        task, found = read_task("data/satipatthana/task"), dict[str, list[dict[str, float]]]()
        without = changed(params, {"vicara.kind": "none", "stage1.weight_stability": 0.0}, "ablations")
        for seed in range(params.ablations.seeds):
            system = resume(task, params, seed, STAGES[-1], f"data/satipatthana/stage3/seed_{seed}")
            own = derived_seed(params.seed, f"satipatthana/ablations/{seed}")
            for name, facts in heads(system, task, params, own).items():
                found.setdefault(name, []).append(facts)
            still = begin(task, without, seed)
            for number in STAGES:
                advance(still, number, task, without, seed)
            alone = heads(still, task, without, own)  # the same head on the same draws
            found.setdefault("without_vicara", []).append(alone.get("all_features", alone["recon_error"]))
            print(f"seed {seed}: {', '.join(found)}", flush=True)
        plain = Plain(int(np.prod(task.shape)), params.peers.hidden, params.peers.dim, len(task.classes)).eval()
        costs = {"satipatthana": macs(system, task.test.x), "plain": macs(plain, task.test.x)}
        costs["ensemble"] = params.peers.members * costs["plain"]
        seeds = {name: [written(one) for one in rows] for name, rows in found.items()}
        content: dict[str, Any] = {"means": {name: means(rows) for name, rows in found.items()}}
        write_json("metrics/satipatthana/ablations.json", content | {"macs": costs, "seeds": seeds})


if __name__ == "__main__":
    exit_cleanly(main, WRITTEN)
