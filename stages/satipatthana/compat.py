"""Profile compat, what the founding note and the original describe, over seeds -> metrics/satipatthana/compat.json.

dvc repro stages/satipatthana/dvc.yaml:compat          (python -m stages.satipatthana.compat)
"""

from functools import partial

from lego.base.artifacts import write_json
from lego.base.harness import Stage, exit_cleanly
from lego.satipatthana.curriculum import STAGES, advance, begin, how_to_use, in_short, judge, means, written
from lego.satipatthana.jobs import classification_only
from lego.satipatthana.sections import SatipatthanaParams, load, with_profile
from lego.satipatthana.tasks import read_task
from stages.satipatthana.seeds import for_each_seed


def one_seed(params: SatipatthanaParams, seed: int) -> dict[str, float]:
    """All four stages, and all numbers."""
    task = read_task("data/satipatthana/task")
    system = begin(task, params, seed)
    for number in STAGES:
        advance(system, number, task, params, seed)
    found = judge(system, task, how_to_use(system, task, params.reject), params, seed)
    print(f"seed {seed}: {in_short(found)}", flush=True)
    return found


def main() -> None:
    params = with_profile(load(), "compat")
    classification_only(params, "compat")
    with Stage("satipatthana/compat", params.seed, params.threads):
        found = for_each_seed(partial(one_seed, params), params)
        write_json("metrics/satipatthana/compat.json", means(found) | {"seeds": [written(one) for one in found]})


if __name__ == "__main__":
    exit_cleanly(main)
