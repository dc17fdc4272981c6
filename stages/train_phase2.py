"""Phase 2: block 2 learns from the stored exit states of hard tokens; block 1 and its exit stay as they are.

dvc repro train_phase2      (python -m stages.train_phase2)
"""

import torch

from lego.artifacts import atomic_folder, sha256, write_csv, write_json
from lego.ashem import train_upper_layers
from lego.batches import EvaluationBatches
from lego.checkpoint import grow_model, load_model, same_block1, save_model
from lego.corpus import PackedBlocks
from lego.cost import Ledger
from lego.harness import Stage, exit_cleanly, resolve_device
from lego.hidden_states import HardTokenBatches, HiddenStateStore
from lego.params import load_params
from lego.trainer import StageConfig, Trainer, TrainingConfig, build_training, epoch_rows, fit


def main() -> None:
    params = load_params()
    train, ashem = params.train, params.ashem
    with Stage("train_phase2", params.seed, train.threads) as stage:
        store = HiddenStateStore("data/hard")
        store.verify(sha256("data/phase1/model.safetensors"), sha256("data/tokens/tokenizer/tokenizer.json"))
        validation = EvaluationBatches(PackedBlocks("data/tokens", "validation"), params.evaluation.batch_size)
        block1 = load_model("data/phase1")
        k, vocab_size, seq_len = block1.num_layers, block1.sizes["vocab_size"], validation.blocks.seq_len
        torch.manual_seed(stage.seed)  # load_model drew random weights before it replaced them
        model = grow_model(
            block1,
            ashem.phase2_layers,
            init=ashem.init_new_layers,
            routing_threshold=store.threshold,
            block2_context="token" if ashem.phase2_context == "token" else "full",
            head=ashem.head,
        ).to(device := resolve_device(train.device))
        batches = HardTokenBatches(store, train.batch_size * seq_len, train.tokens_per_epoch, stage.seed)
        steps = ashem.phase2_epochs * -(-len(batches) // train.grad_accumulation)
        optimizer, options = build_training(model, ashem.phase2_lr, steps, train)
        n = ashem.phase2_layers
        routed = Trainer(TrainingConfig([StageConfig((n, n))], store.threshold, k), vocab_size, device)

        def train_once(epoch: int) -> float:
            batches.set_epoch(epoch)
            return train_upper_layers(model, batches, optimizer, vocab_size, device, k, options=options)

        result = fit(
            model,
            train_once,
            lambda: routed.evaluate(model, validation),
            max_epochs=ashem.phase2_epochs,
            patience=ashem.phase2_patience,
            on_best=lambda epoch: save_model(model, stage.keep("best")),
        ).as_result()
        with atomic_folder("data/phase2") as folder:
            save_model(model, folder, tokenizer="data/tokens/tokenizer")
        seen = result["total_epochs"] * batches.count
        macs = Ledger.of(model, seq_len).train_block2(seen, head_trains=ashem.head != "shared")
        leaky = store.manifest["split"] == "validation"
        write_csv("metrics/curves/train_phase2.csv", epoch_rows(result, batches.count))
        write_json(
            "metrics/train_phase2.json",
            {
                "val_ppl": min(result["val_losses"]),
                "val_acc": result["val_accs"][result["best_epoch"] - 1],
                "best_epoch": result["best_epoch"],
                "total_epochs": result["total_epochs"],
                "hard_tokens_seen": seen,
                "hard_tokens_stored": store.hard_tokens,
                "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
                "block1_unchanged": same_block1(block1, model),
                "leaky": leaky,
            },
        )
        budget = {"collect_hard_macs": store.manifest["macs"], "train_phase2_macs": macs}
        write_json("metrics/added_macs.json", budget | {"added_macs": sum(budget.values()), "leaky": leaky})
        stage.record["counts"] = {"trained_tokens": seen}


if __name__ == "__main__":
    exit_cleanly(main)
