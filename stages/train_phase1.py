"""Phase 1: block 1 learns from all tokens of its part of train.

dvc repro train_phase1      (python -m stages.train_phase1)
"""

from typing import Any

from lego.artifacts import atomic_folder, write_csv, write_json
from lego.batches import EvaluationBatches, TrainingBatches
from lego.blocks import PackedBlocks, bits_per_byte, corpus_facts, data_digests, train_part
from lego.checkpoint import save_model
from lego.cost import Ledger
from lego.epochs import TrainingState, epoch_rows
from lego.harness import Stage, exit_cleanly, resolve_device
from lego.params import Params, load_params
from lego.steps import build_training
from lego.trainer import Trainer, create_standard_config
from lego.transformer import BaseTransformer, DeepSupervisionTransformer


def train(params: Params, stage: Stage, batches: TrainingBatches) -> tuple[BaseTransformer, dict[str, Any]]:
    """A new block 1, trained until validation perplexity stops falling, and what the training saw."""
    ashem, device = params.ashem, resolve_device(params.train.device)
    validation = EvaluationBatches(PackedBlocks("data/tokens", "validation"), params.evaluation.batch_size)
    sizes = params.model.model_dump(exclude={"seq_len"})
    vocab_size, depth = corpus_facts("data/tokens")["vocab_size"], ashem.phase1_layers
    model = DeepSupervisionTransformer(vocab_size, num_layers=depth, exit_layer=depth, **sizes).to(device)
    print(f"block 1: {sum(p.numel() for p in model.parameters()):,} parameters on {device}", flush=True)
    steps = ashem.phase1_epochs * -(-len(batches) // params.train.grad_accumulation)
    optimizer, options = build_training(model, ashem.phase1_lr, steps, params.train)
    trainer = Trainer(create_standard_config(depth), vocab_size, device, options=options)
    state = TrainingState(stage.scratch / "state.safetensors", model, optimizer, options.scheduler)
    result = trainer.train_with_early_stopping(
        model,
        batches,
        validation,
        optimizer,
        ashem.phase1_epochs,
        ashem.phase1_patience,
        on_best=lambda epoch: save_model(model, stage.keep("best")),
        state=state,
    )
    stage.continued = state.continued
    return model, result


def main() -> None:
    params = load_params()
    with Stage("train_phase1", params.seed, params.train.threads) as stage:
        blocks = PackedBlocks("data/tokens", "train", train_part(params.ashem.phase2_share, phase=1))
        per_epoch = -(-params.train.tokens_per_epoch // blocks.seq_len)
        batches = TrainingBatches(blocks, params.train.batch_size, per_epoch, stage.seed)
        model, result = train(params, stage, batches)
        with atomic_folder("data/phase1") as folder:
            save_model(model, folder, tokenizer="data/tokens/tokenizer")
        epoch_tokens = batches.count * blocks.seq_len
        tokens = result["total_epochs"] * epoch_tokens
        best, facts = result["best_epoch"] - 1, corpus_facts("data/tokens")["splits"]
        write_csv("metrics/curves/train_phase1.csv", epoch_rows(result, epoch_tokens, tokens))
        write_json(
            "metrics/train_phase1.json",
            {
                "val_ppl": result["val_losses"][best],
                "val_bits_per_byte": bits_per_byte(result["val_losses"][best], facts["validation"]),
                "val_acc": result["val_accs"][best],
                "best_epoch": result["best_epoch"],
                "total_epochs": result["total_epochs"],
                "phase1_converged": result["stopped_early"],
                "train_tokens": tokens,
                "train_text_tokens": blocks.tokens,
                "parameters": sum(p.numel() for p in model.parameters()),
                "train_macs": Ledger.of(model, blocks.seq_len).train_block1(tokens),
            },
        )
        stage.record |= data_digests("data/tokens") | {"counts": {"trained_tokens": tokens}}


if __name__ == "__main__":
    exit_cleanly(main)
