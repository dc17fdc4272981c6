"""Contexts: a network whose context vectors predict (objective predict) or settle (fixed_point) -> data/cvfp/phase1.

dvc repro stages/cvfp/dvc.yaml:train_phase1          (python -m stages.cvfp.train_phase1)
"""

from lego.base.artifacts import atomic_folder, write_csv, write_json
from lego.base.harness import Stage, exit_cleanly
from lego.cvfp.ranks import effective_rank
from lego.cvfp.run import first_phase
from lego.cvfp.sections import load
from lego.cvfp.store import save, save_reader
from lego.cvfp.text import read_text_ids


def main() -> None:
    params = load()
    with Stage("cvfp/train_phase1", params.seed, params.threads) as stage:
        text = read_text_ids("data/cvfp/tokens")
        done = first_phase(params, text, stage.seed)
        with atomic_folder("data/cvfp/phase1") as folder:
            save(done.model, params, folder, weights_version=done.weights_version)
            save_reader(done.reader, folder)
        with atomic_folder("data/cvfp/untrained") as folder:
            save(done.untrained, params, folder, weights_version=0)
        facts = done.facts()
        if done.carried is not None:
            facts["carried_rank"] = effective_rank(done.carried[: params.checks.rank_tokens])
        write_json("metrics/cvfp/train_phase1.json", facts)
        write_csv("metrics/cvfp/curves/train_phase1.csv", done.rows)
        stage.record |= {"counts": {"tokens": len(text.ids["train"]) * len(done.rows)}}


if __name__ == "__main__":
    exit_cleanly(main)
