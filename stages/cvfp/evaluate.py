"""Held-out perplexity, what contexts are worth, ranks beside references, critical checks -> metrics/cvfp/evaluate.json.

dvc repro stages/cvfp/dvc.yaml:evaluate          (python -m stages.cvfp.evaluate)
"""

from typing import Any

from lego.base.artifacts import read_json, write_csv, write_json, write_metrics, write_text
from lego.base.harness import Stage, exit_cleanly
from lego.cvfp.evaluation import critical_checks, mandatory, ranks, worth
from lego.cvfp.reports import report
from lego.cvfp.run import fixed_text, telling
from lego.cvfp.sections import load
from lego.cvfp.store import load_network, parameter_counts
from lego.cvfp.text import LABELS, SPLITS, read_text_ids

SUMMARY_KEYS = ("acc", "bits_per_byte", "ppl", "val_rank")
"""What `dvc metrics` shows: of test text, and the effective rank of contexts of validation text."""


def main() -> None:
    params = load()
    with Stage("cvfp/evaluate", params.seed, params.threads) as stage:
        text = read_text_ids("data/cvfp/tokens")
        phase1 = read_json("metrics/cvfp/train_phase1.json", "updates", "passes", "converged")
        (model, _, _), (snapshot, _, _) = load_network("data/cvfp/phase2"), load_network("data/cvfp/phase2/snapshot")
        untrained, _, _ = load_network("data/cvfp/untrained")
        fixed = {split: fixed_text(text, split, "data/cvfp/contexts", snapshot) for split in SPLITS}
        held_out = fixed["test"], fixed["validation"]
        metrics: dict[str, Any] = dict(worth(model, params.phase2.mode, text, *held_out, stage.seed))
        n, rank, told = params.checks.rank_tokens, dict[str, float](), telling(params.progress)
        for prefix, split in (("train", "train"), ("val", "validation")):
            rank |= ranks(snapshot, untrained, fixed[split].ids[:n], params.checks, stage.seed, prefix, told)
        checks, still = critical_checks(snapshot, untrained, fixed["train"], params, stage.seed, told)
        facts = mandatory(snapshot, params, phase1, still, fixed["validation"], rank, told)
        metrics |= {
            "parameters": sum(parameter_counts(model).values()),
            "validation_is": LABELS.get(text.validation, text.validation),
        }
        metrics |= rank | checks | {"updates": phase1["updates"]}
        write_json("metrics/cvfp/evaluate.json", metrics)
        write_metrics("metrics/cvfp/summary.json", {key: metrics[key] for key in SUMMARY_KEYS})
        write_csv(
            "metrics/cvfp/curves/convergence.csv",
            [{"pass": n, "l2": one} for n, one in enumerate(still.differences, 2)],
        )
        lines = report(*facts) + "".join(
            f"\nFrozen passes over train, {name}: convergence {100 * checks[key] / checks['frozen_tokens']:.1f}% "
            f"({checks[key]}/{checks['frozen_tokens']} tokens), final_diff = {checks[last]:.6f}"
            for name, key, last in (
                ("trained", "converged_when_frozen", "final_diff_l2"),
                ("untrained", "untrained_converged_when_frozen", "untrained_final_diff_l2"),
            )
        )
        write_text("metrics/cvfp/report.txt", lines + "\n")
        print(lines, flush=True)
        stage.record |= {"counts": {"tokens": sum(len(one.ids) for one in fixed.values())}}


if __name__ == "__main__":
    exit_cleanly(main)
