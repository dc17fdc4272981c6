"""The yardstick: block 1 trained on, for exactly the MACs that collect_hard and train_phase2 cost, on the same text.

dvc repro train_shallow_continued      (python -m stages.train_shallow_continued)
"""

from lego.artifacts import atomic_folder, read_json, write_csv, write_json
from lego.batches import EvaluationBatches, TrainingBatches
from lego.checkpoint import load_model, save_model
from lego.corpus import PackedBlocks, corpus_facts, train_part
from lego.cost import Ledger
from lego.evaluation import shallow_metrics, token_table
from lego.harness import Stage, StageError, exit_cleanly, resolve_device
from lego.params import load_params
from lego.trainer import Trainer, build_training, create_standard_config, epoch_rows


def main() -> None:
    params = load_params()
    train, ashem = params.train, params.ashem
    with Stage("train_shallow_continued", params.seed, train.threads) as stage:
        part = train_part(ashem.phase2_share, phase=2, phase2_text=ashem.phase2_text)
        blocks = PackedBlocks("data/tokens", "train", part)
        validation, test = (
            EvaluationBatches(PackedBlocks("data/tokens", split), params.evaluation.batch_size)
            for split in ("validation", "test")
        )
        block1, model = load_model("data/phase1"), load_model("data/phase1")
        device = resolve_device(train.device)
        model.to(device)
        ledger = Ledger.of(model, blocks.seq_len)
        budget = read_json("metrics/added_macs.json")
        affordable = round(budget["added_macs"] / ledger.train_block1(blocks.seq_len))
        if not affordable:
            raise StageError("metrics/added_macs.json: the budget pays for no block; raise ashem.phase2_epochs")
        per_epoch = -(-train.tokens_per_epoch // blocks.seq_len)
        batches = TrainingBatches(blocks, train.batch_size, per_epoch, stage.seed, total_blocks=affordable)
        epochs = -(-affordable // batches.blocks_per_epoch)
        steps = -(-affordable // (train.batch_size * train.grad_accumulation))
        optimizer, options = build_training(model, params.yardstick.lr, steps, train)
        vocab_size = model.sizes["vocab_size"]
        trainer = Trainer(create_standard_config(model.num_layers), vocab_size, device, options=options)
        result = trainer.train_with_early_stopping(model, batches, validation, optimizer, epochs, patience=epochs)
        with atomic_folder("data/baseline/shallow_continued") as folder:
            save_model(model, folder, tokenizer="data/tokens/tokenizer")
        routed = Ledger.of(model, blocks.seq_len).grown(ashem.phase2_layers, ashem.phase2_context)
        macs = ledger.train_block1(affordable * blocks.seq_len)
        metrics = shallow_metrics(
            test=token_table(model, test, device),
            validation=token_table(model, validation, device),
            block1_test=token_table(block1, test, device),
            block1_validation=token_table(block1, validation, device),
            threshold=read_json("metrics/compute_threshold.json")["threshold"],
            ledger=routed,
            test_bytes=corpus_facts("data/tokens")["splits"]["test"]["bytes"],
        ) | {
            "train_macs": read_json("metrics/train_phase1.json")["train_macs"] + macs,
            "n_hard": None,  # it learns from every token
            "hard_share": None,
            "leaky": budget["leaky"],
        }
        write_json("metrics/baseline/shallow_continued.json", metrics)
        write_csv("metrics/curves/shallow_continued.csv", epoch_rows(result, batches.blocks_per_epoch * blocks.seq_len))
        write_json(
            "metrics/train_shallow_continued.json",
            {
                "added_macs": macs,
                "budget_macs": budget["added_macs"],
                "distance_from_budget": macs / budget["added_macs"] - 1,
                "best_epoch": result["best_epoch"],
                "total_epochs": result["total_epochs"],
                "val_ppl": min(result["val_losses"]),
            },
        )
        stage.record["counts"] = {"trained_tokens": affordable * blocks.seq_len}


if __name__ == "__main__":
    exit_cleanly(main)
