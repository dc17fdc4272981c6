"""The yardstick: block 1 trained on for exactly the MACs that collect_hard and train_phase2 cost.

It reads the part of train that phase 2 mines (ashem.phase2_text), also where hard_split mines validation text.

dvc repro train_shallow_continued      (python -m stages.train_shallow_continued)
"""

from typing import Any

from lego.artifacts import atomic_folder, read_json, read_number, write_csv, write_json
from lego.batches import EvaluationBatches, TrainingBatches
from lego.blocks import PackedBlocks, bits_per_byte, corpus_facts, data_digests, train_part
from lego.checkpoint import load_model, save_model
from lego.cost import Ledger
from lego.epochs import History, TrainingState, epoch_rows, fit
from lego.evaluation import shallow_metrics, token_table
from lego.harness import Stage, StageError, exit_cleanly, resolve_device
from lego.params import Params, load_params
from lego.steps import build_training
from lego.trainer import Trainer, create_standard_config
from lego.transformer import BaseTransformer


def train(params: Params, stage: Stage, model: BaseTransformer, blocks: PackedBlocks, affordable: int) -> History:
    """Trains the model on `affordable` blocks with a fresh schedule, and keeps its best state on validation text."""
    train, device = params.train, resolve_device(params.train.device)
    validation = EvaluationBatches(PackedBlocks("data/tokens", "validation"), params.evaluation.batch_size)
    per_epoch = -(-train.tokens_per_epoch // blocks.seq_len)
    batches = TrainingBatches(blocks, train.batch_size, per_epoch, stage.seed, total_blocks=affordable)
    epochs = -(-affordable // batches.blocks_per_epoch)
    steps = 0
    for epoch in range(epochs):  # an epoch ends with a step of its own, so count them one by one
        batches.set_epoch(epoch)
        steps += -(-len(batches) // train.grad_accumulation)
    optimizer, options = build_training(model.to(device), params.yardstick.lr, steps, train)
    trainer = Trainer(create_standard_config(model.num_layers), model.sizes["vocab_size"], device, options=options)

    state = TrainingState(stage.scratch / "state.safetensors", model, optimizer, options.scheduler)
    history = fit(
        model,
        batches,
        lambda: trainer.train_epoch(model, batches, optimizer),
        lambda: trainer.evaluate(model, validation),
        max_epochs=epochs,
        patience=epochs + 1,  # the whole budget is spent
        keep_start=True,
        on_best=lambda epoch: save_model(model, stage.keep("best")),
        state=state,
    )
    stage.continued = state.continued
    rows = epoch_rows(history.as_result(), batches.blocks_per_epoch * blocks.seq_len, affordable * blocks.seq_len)
    write_csv("metrics/curves/shallow_continued.csv", rows)
    return history


def model_metrics(params: Params, model: BaseTransformer, block1: BaseTransformer, ledger: Ledger) -> dict[str, Any]:
    """The keys of a model file that follow from what the model says of validation and test text."""
    device = resolve_device(params.train.device)
    tables = {}
    for split in ("test", "validation"):
        batches = EvaluationBatches(PackedBlocks("data/tokens", split), params.evaluation.batch_size)
        tables[split] = token_table(model, batches, device)
        tables[f"block1_{split}"] = token_table(block1, batches, device)
    return shallow_metrics(
        **tables,
        threshold=read_number("metrics/compute_threshold.json", "threshold", high=1.0),
        ledger=ledger.grown(
            block1.num_layers + params.ashem.phase2_layers - params.ashem.phase1_layers, params.ashem.phase2_context
        ),
        test_facts=corpus_facts("data/tokens")["splits"]["test"],
    )


def main() -> None:
    params = load_params()
    with Stage("train_shallow_continued", params.seed, params.train.threads) as stage:
        part = train_part(params.ashem.phase2_share, phase=2, phase2_text=params.ashem.phase2_text)
        blocks = PackedBlocks("data/tokens", "train", part)
        block1, model = load_model("data/phase1"), load_model("data/phase1")
        ledger, budget = Ledger.of(model, blocks.seq_len), read_number("metrics/added_macs.json", "added_macs")
        affordable = round(budget / ledger.train_block1(blocks.seq_len))
        before = read_number("metrics/train_phase1.json", "train_macs")
        leaky = read_json("metrics/added_macs.json", "leaky")["leaky"]
        if not affordable:
            raise StageError("metrics/added_macs.json: the budget pays for no block; raise ashem.phase2_epochs")
        tokens = affordable * blocks.seq_len
        print(f"block 1 trains on: {tokens:,} tokens for {budget:.3e} MACs", flush=True)
        history = train(params, stage, model, blocks, affordable)
        with atomic_folder("data/baseline/shallow_continued") as folder:
            save_model(model, folder, tokenizer="data/tokens/tokenizer")
        macs = ledger.train_block1(tokens)
        validation = corpus_facts("data/tokens")["splits"]["validation"]
        common = {
            "train_macs": before + macs,
            "n_hard": None,  # it learns from every token
            "hard_share": None,
            "leaky": leaky,
        }
        metrics = model_metrics(params, model, block1, ledger) | common
        write_json("metrics/baseline/shallow_continued.json", metrics)
        write_json(
            "metrics/train_shallow_continued.json",
            {
                "added_macs": macs,
                "budget_macs": budget,
                "distance_from_budget": macs / budget - 1,
                "best_epoch": history.best_epoch,
                "total_epochs": len(history.evaluations),
                "val_ppl": history.best["ppl"],
                "val_bits_per_byte": bits_per_byte(history.best["ppl"], validation),
                "leaky": leaky,
            },
        )
        stage.record |= data_digests("data/tokens") | {"counts": {"trained_tokens": tokens}}


if __name__ == "__main__":
    exit_cleanly(main)
