"""The head, and what reads the context, learn the next token from fixed contexts -> data/cvfp/phase2.

dvc repro stages/cvfp/dvc.yaml:train_phase2          (python -m stages.cvfp.train_phase2)
"""

from lego.base.artifacts import atomic_folder, write_csv, write_json
from lego.base.harness import Stage, exit_cleanly
from lego.cvfp.checks import require_no_identity
from lego.cvfp.phase2 import train_head
from lego.cvfp.run import fixed_text
from lego.cvfp.sections import load
from lego.cvfp.store import load_network, load_reader, parameter_counts, save
from lego.cvfp.text import read_text_ids


def main() -> None:
    params = load()
    with Stage("cvfp/train_phase2", params.seed, params.threads) as stage:
        text = read_text_ids("data/cvfp/tokens")
        snapshot, _, facts = load_network("data/cvfp/phase1")
        require_no_identity(snapshot, params.checks, stage.seed)
        train, validation = (
            fixed_text(text, split, "data/cvfp/contexts", snapshot) for split in ("train", "validation")
        )
        model, result = train_head(
            snapshot, train, validation, params.phase2, stage.seed, load_reader("data/cvfp/phase1")
        )
        with atomic_folder("data/cvfp/phase2") as folder:
            (folder / "snapshot").mkdir()  # what makes C* of any further text, as phase 2 may change the blocks
            save(snapshot, params, folder / "snapshot", **{"weights_version": facts["weights_version"]})
            save(model, params, folder, weights_version=facts["weights_version"] + result.updates)
        best = result.validation[result.best - 1]
        counts = {f"parameters_{part}": count for part, count in parameter_counts(model).items()}
        metrics = {"val_ppl": best.ppl, "val_accuracy": best.accuracy, "epochs": len(result.train), "best": result.best}
        write_json("metrics/cvfp/train_phase2.json", counts | metrics | {"updates": result.updates})
        rows = [
            {"epoch": number, "train_loss": loss, "val_ppl": one.ppl, "val_accuracy": one.accuracy}
            for number, (loss, one) in enumerate(zip(result.train, result.validation, strict=True), 1)
        ]
        write_csv("metrics/cvfp/curves/train_phase2.csv", rows)
        stage.record |= {"counts": {"tokens": train.predictions * len(result.train)}}


if __name__ == "__main__":
    exit_cleanly(main)
