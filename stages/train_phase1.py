"""Phase 1: block 1 learns from all tokens of its part of train.

dvc repro train_phase1      (python -m stages.train_phase1)
"""

from lego.artifacts import atomic_folder, write_csv, write_json
from lego.batches import EvaluationBatches, TrainingBatches
from lego.checkpoint import save_model
from lego.corpus import PackedBlocks, corpus_facts, train_part
from lego.cost import Ledger
from lego.harness import Stage, exit_cleanly, resolve_device
from lego.params import load_params
from lego.trainer import Trainer, build_training, create_standard_config, epoch_rows
from lego.transformer import DeepSupervisionTransformer


def main() -> None:
    params = load_params()
    sizes, train, ashem = params.model.model_dump(exclude={"seq_len"}), params.train, params.ashem
    with Stage("train_phase1", params.seed, train.threads) as stage:
        blocks = PackedBlocks("data/tokens", "train", train_part(ashem.phase2_share, phase=1))
        validation = EvaluationBatches(PackedBlocks("data/tokens", "validation"), params.evaluation.batch_size)
        per_epoch = -(-train.tokens_per_epoch // blocks.seq_len)
        batches = TrainingBatches(blocks, train.batch_size, per_epoch, stage.seed)
        facts = corpus_facts("data/tokens")
        model = DeepSupervisionTransformer(
            facts["vocab_size"], num_layers=ashem.phase1_layers, exit_layer=ashem.phase1_layers, **sizes
        ).to(device := resolve_device(train.device))
        steps = ashem.phase1_epochs * -(-len(batches) // train.grad_accumulation)
        optimizer, options = build_training(model, ashem.phase1_lr, steps, train)
        trainer = Trainer(create_standard_config(ashem.phase1_layers), facts["vocab_size"], device, options=options)
        result = trainer.train_with_early_stopping(
            model,
            batches,
            validation,
            optimizer,
            ashem.phase1_epochs,
            ashem.phase1_patience,
            on_best=lambda epoch: save_model(model, stage.keep("best")),
        )
        with atomic_folder("data/phase1") as folder:
            save_model(model, folder, tokenizer="data/tokens/tokenizer")
        tokens = result["total_epochs"] * batches.count * blocks.seq_len
        best = result["best_epoch"] - 1
        write_csv("metrics/curves/train_phase1.csv", epoch_rows(result, batches.count * blocks.seq_len))
        write_json(
            "metrics/train_phase1.json",
            {
                "val_ppl": result["val_losses"][best],
                "val_acc": result["val_accs"][best],
                "best_epoch": result["best_epoch"],
                "total_epochs": result["total_epochs"],
                "phase1_converged": result["stopped_early"],
                "train_tokens": tokens,
                "train_text_tokens": blocks.tokens,
                "parameters": sum(p.numel() for p in model.parameters()),
                "train_macs": Ledger.of(model, blocks.seq_len).train_block1(tokens),
                "data_sha256": facts["splits"]["train"]["sha256"],
            },
        )
        stage.record["counts"] = {"trained_tokens": tokens}


if __name__ == "__main__":
    exit_cleanly(main)
