"""Profile compat, what the founding note and the original describe, over seeds -> metrics/satipatthana/compat.json.

dvc repro stages/satipatthana/dvc.yaml:compat          (python -m stages.satipatthana.compat)
"""

from lego.artifacts import write_json
from lego.harness import Stage, exit_cleanly
from lego.satipatthana.curriculum import STAGES, advance, begin, how_to_use, judge, means, written
from lego.satipatthana.sections import WRITTEN, load, with_profile
from lego.satipatthana.tasks import read_task


def main() -> None:
    params = with_profile(load(), "compat")
    with Stage("satipatthana/compat", params.seed, params.threads):
        task, found = read_task("data/satipatthana/task"), []
        for seed in range(params.seeds):
            system = begin(task, params, seed)
            for number in STAGES:
                advance(system, number, task, params, seed)
            found.append(judge(system, task, how_to_use(system, task, params.reject), params, seed))
            print(f"seed {seed}: accuracy {found[-1]['accuracy']:.4f}, AURC {found[-1]['aurc']:.5f}", flush=True)
        write_json("metrics/satipatthana/compat.json", means(found) | {"seeds": [written(one) for one in found]})


if __name__ == "__main__":
    exit_cleanly(main, WRITTEN)
