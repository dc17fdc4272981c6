"""The routed model on test text, the threshold sweep, and the yardstick beside it.

dvc repro evaluate_routing      (python -m stages.evaluate_routing)
"""

from lego.artifacts import atomic_folder, read_json, read_number, write_csv, write_json
from lego.batches import EvaluationBatches
from lego.blocks import PackedBlocks, corpus_facts, data_digests
from lego.checkpoint import load_model
from lego.cost import Ledger
from lego.evaluation import comparison_lines, routed_metrics, save_tables, threshold_sweep, token_table
from lego.harness import Stage, exit_cleanly, resolve_device
from lego.params import load_params
from lego.progress import share


def main() -> None:
    params = load_params()
    with Stage("evaluate_routing", threads=params.train.threads) as stage:
        mined = read_json("metrics/collect_hard.json", "n_hard", "hard_share", "leaky")
        converged = read_json("metrics/train_phase1.json", "phase1_converged")["phase1_converged"]
        train_macs = read_number("metrics/train_phase1.json", "train_macs")
        train_macs += read_number("metrics/added_macs.json", "added_macs")
        yardstick = read_json("metrics/baseline/shallow_continued.json")
        threshold = read_number("metrics/compute_threshold.json", "threshold", high=1.0)
        test, validation = (
            EvaluationBatches(PackedBlocks("data/tokens", split), params.evaluation.batch_size)
            for split in ("test", "validation")
        )
        model, device = load_model("data/phase2"), resolve_device(params.train.device)
        ledger = Ledger.of(model, test.blocks.seq_len)
        tables = token_table(model, test, device), token_table(model, validation, device)
        facts = corpus_facts("data/tokens")["splits"]
        metrics = routed_metrics(*tables, threshold, ledger, facts["test"]) | {
            "train_macs": train_macs,
            "n_hard": mined["n_hard"],
            "hard_share": mined["hard_share"],
            "leaky": mined["leaky"],
        }
        with atomic_folder("data/evaluation") as folder:
            save_tables(folder, test=tables[0], validation=tables[1])
        write_json("metrics/evaluate_routing.json", metrics)
        write_csv(
            "metrics/curves/evaluate_routing.csv", threshold_sweep(tables[0], ledger, params.evaluation.sweep_points)
        )
        easy = int(tables[0].easy(threshold).sum())
        print(f"shallow {share(easy, test.blocks.tokens)} of test text; phase 1 converged: {converged}")
        print("\n".join(comparison_lines(metrics, yardstick)))
        stage.record |= data_digests("data/tokens") | {"counts": {"tokens": test.blocks.tokens}}


if __name__ == "__main__":
    exit_cleanly(main)
