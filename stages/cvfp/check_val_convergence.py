"""Whether contexts of validation text settle over frozen passes, with both verdicts.

dvc repro stages/cvfp/dvc.yaml:check_val_convergence
python -m stages.cvfp.check_val_convergence --num-trials 10          the same with another number of passes
"""

import argparse
from contextlib import nullcontext

from lego.base.artifacts import write_csv, write_json
from lego.base.harness import Stage, StageError, exit_cleanly
from lego.cvfp.checks import validation_trend
from lego.cvfp.run import telling
from lego.cvfp.sections import load
from lego.cvfp.store import load_network
from lego.cvfp.text import read_text_ids


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-trials", "--num_trials", type=int, help="default: checks.num_trials of params.yaml")
    asked, params = parser.parse_args(), load()
    if asked.num_trials is not None and asked.num_trials < 1:
        raise StageError(f"--num-trials must be at least 1, got {asked.num_trials}")
    trials = asked.num_trials or params.checks.num_trials
    by_hand = asked.num_trials is not None  # which leaves the pipeline's files as they are
    with nullcontext() if by_hand else Stage("cvfp/check_val_convergence", params.seed, params.threads):
        ids = read_text_ids("data/cvfp/tokens").ids["validation"][: params.checks.rank_tokens]
        model, _, _ = load_network("data/cvfp/phase1")
        settings = params.checks.model_copy(update={"num_trials": trials})
        threshold = params.phase1.convergence_threshold
        found = validation_trend(model, model.embed(ids).detach(), threshold, settings, telling(params.progress))
        print(f"{len(ids):,} tokens", flush=True)
        for trial, loss in enumerate([None, *found.losses], 1):
            print(f"trial {trial}/{trials}: {'N/A' if loss is None else f'MSE {loss:.6g}'}", flush=True)
        print("\n".join(found.lines()), flush=True)
        if not by_hand:
            facts = {
                "tokens": len(ids),
                "slope": found.slope,
                "std": found.std,
                "legacy": found.legacy,
                "verdict": found.verdict,
            }
            write_json("metrics/cvfp/check_val_convergence.json", facts | {"final_mse": found.losses[-1]})
            rows = [{"trial": trial, "mse": loss} for trial, loss in enumerate(found.losses, 2)]
            write_csv("metrics/cvfp/curves/check_val_convergence.csv", rows)


if __name__ == "__main__":
    exit_cleanly(main)
