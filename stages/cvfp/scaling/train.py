"""A model of the contest on parts of the train text, at the rate found there -> metrics/cvfp/scaling/<model>.json.

dvc repro stages/cvfp/scaling/dvc.yaml          (python -m stages.cvfp.scaling.train gru)
"""

import sys
from functools import partial

from lego.base.artifacts import read_json, write_json
from lego.base.harness import Stage, StageError, exit_cleanly
from lego.cvfp import forms, rivals
from lego.cvfp.contest import made_of
from lego.cvfp.sections import load
from lego.cvfp.text import read_text_ids
from stages.cvfp.baselines.contest import Run, kept, one_run


def main() -> None:
    params = load()
    scaling = params.contest.scaling
    if len(sys.argv) != 2 or sys.argv[1] not in scaling.models:
        raise StageError(f"give one of the models of contest.scaling.models: {', '.join(scaling.models)}")
    name = sys.argv[1]
    with Stage(f"cvfp/scaling/train@{name}", params.seed, 1) as stage:
        text = read_text_ids("data/cvfp/tokens")
        digests, least = text.digests(), 2 * max(params.peers.streams, params.predict.streams)
        if len(text.first(min(scaling.shares)).ids["train"]) < least:
            raise StageError(
                f"stages/cvfp/params.yaml: contest.scaling.shares leave fewer than {least} train tokens, two for each "
                "of the streams; raise the least share, or data.max_train_tokens"
            )
        lr = read_json(f"metrics/cvfp/baselines/{name}.json", "lr")["lr"]
        compete = forms.compete if name in params.contest.own else rivals.compete
        runs = [Run(seed, lr, share) for share in scaling.shares for seed in range(scaling.models[name])]
        done = kept(stage, partial(one_run, compete, name, params), runs, params.contest.workers)
        found: dict[str, dict[str, float]] = {}
        for run, one in zip(runs, done, strict=True):
            if "diverged" in one:
                raise StageError(f"{name}: seed {run.seed} diverged on {run.share:g} of train at rate {lr:g}")
            found.setdefault(f"{run.share:g}", {})[f"ppl_{run.seed}"] = one["ppl"]
        write_json(f"metrics/cvfp/scaling/{name}.json", {**found, "made_of": made_of(name, params, digests)})


if __name__ == "__main__":
    exit_cleanly(main)
