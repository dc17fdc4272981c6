"""The profile `sound` with one change over some seeds, side by side -> metrics/cvfp/trials/<name>.json.

dvc repro stages/cvfp/trials/dvc.yaml          (python -m stages.cvfp.trials.train no_regularizer)
"""

import sys
from functools import partial
from typing import Any

from lego.base.artifacts import write_json
from lego.base.harness import Stage, StageError, exit_cleanly
from lego.cvfp import forms
from lego.cvfp.contest import trial_digest
from lego.cvfp.sections import PARAMS, changed, load
from lego.cvfp.text import read_text_ids
from stages.cvfp.baselines.contest import Run, kept, one_run

SHOWN = ("val_loss", "ppl")


def main() -> None:
    whole = load()
    trials = whole.contest.trials
    if len(sys.argv) != 2 or sys.argv[1] not in trials:
        raise StageError(f"give one of the changes of contest.trials: {', '.join(trials)}")
    name = sys.argv[1]
    params = changed(whole, trials[name], f"{PARAMS}: contest.trials.{name}")
    with Stage(f"cvfp/trials/train@{name}", params.seed, 1) as stage:
        runs = [Run(seed, params.predict.lr) for seed in range(params.contest.trial_seeds)]
        found = kept(stage, partial(one_run, forms.compete, "sound", params), runs, params.contest.workers)
        metrics: dict[str, Any] = {"diverged": sum("diverged" in one for one in found)}
        if not metrics["diverged"]:
            metrics |= {f"{key}_{seed}": one[key] for key in SHOWN for seed, one in enumerate(found)}
            metrics |= {key: sum(one[key] for one in found) / len(found) for key in (*SHOWN, "parameters")}
        of = trial_digest(params, read_text_ids("data/cvfp/tokens").digests())
        write_json(f"metrics/cvfp/trials/{name}.json", metrics | {"made_of": of})


if __name__ == "__main__":
    exit_cleanly(main)
