"""Phase 1: block 1 learns from all tokens of its part of train.

dvc repro train_phase1      (python -m stages.train_phase1)
"""

import torch

from lego.base.artifacts import atomic_folder, write_csv, write_facts
from lego.base.harness import Stage, exit_cleanly, resolve_device
from lego.base.params import Params, load_params
from lego.model.checkpoint import save_model
from lego.model.cost import Ledger
from lego.model.llama import load_llama, require_fit
from lego.model.transformer import BaseTransformer, DeepSupervisionTransformer
from lego.tokens.batches import TrainingBatches, blocks_in_epoch, split_batches
from lego.tokens.blocks import bits_per_byte, corpus_facts, data_digests, train_text
from lego.training.epochs import History, TrainingState, epoch_rows, fit
from lego.training.setup import build_training
from lego.training.trainer import Trainer, create_standard_config


def block1(params: Params, device: torch.device) -> DeepSupervisionTransformer:
    """A new block 1, or the trained one that model.init_from names."""
    wanted, ashem, facts = params.model, params.ashem, corpus_facts("data/tokens")
    if wanted.init_from is None:
        sizes = wanted.model_dump(exclude={"seq_len", "init_from", "init_layers"}) | {"context": wanted.seq_len}
        depth = ashem.phase1_layers
        model = DeepSupervisionTransformer(facts["vocab_size"], num_layers=depth, exit_layer=depth, **sizes)
    else:
        model = load_llama(wanted.init_from, ashem.phase1_layers if wanted.init_layers == "phase1_layers" else None)
        require_fit(model, facts["vocab_size"], wanted.seq_len)
    print(f"block 1: {sum(p.numel() for p in model.parameters()):,} parameters on {device}", flush=True)
    return model.to(device)


def train(params: Params, stage: Stage, batches: TrainingBatches) -> tuple[BaseTransformer, History]:
    """Block 1, trained until validation perplexity stops falling, and what the training saw."""
    ashem, device = params.ashem, resolve_device(params.train.device)
    validation = split_batches("data/tokens", "validation", params.evaluation.batch_size)
    model = block1(params, device)
    steps = max(1, ashem.phase1_epochs) * -(-len(batches) // params.train.grad_accumulation)
    optimizer, options = build_training(model, ashem.phase1_lr, steps, params.train)
    depth, vocab_size = model.num_layers, model.sizes["vocab_size"]
    trainer = Trainer(create_standard_config(depth), vocab_size, device, options=options)
    state = TrainingState(stage.scratch / "state.safetensors", model, optimizer, options.scheduler)
    history = fit(
        model,
        batches,
        lambda: trainer.train_epoch(model, batches, optimizer),
        lambda: trainer.evaluate(model, validation),
        max_epochs=ashem.phase1_epochs,
        patience=ashem.phase1_patience,
        keep_start=params.model.init_from is not None,
        on_best=lambda epoch: save_model(model, stage.keep("best")),
        state=state,
    )
    stage.continued = state.continued
    return model, history


def main() -> None:
    params = load_params()
    with Stage("train_phase1", params.seed, params.train.threads) as stage:
        ashem = params.ashem
        blocks = train_text("data/tokens", 1, ashem.phase2_share, ashem.phase2_split, params.seed)
        per_epoch = blocks_in_epoch(params.train.tokens_per_epoch, blocks) if ashem.phase1_epochs else 1
        batches = TrainingBatches(blocks, params.train.batch_size, per_epoch, stage.seed)
        model, history = train(params, stage, batches)
        with atomic_folder("data/phase1") as folder:
            save_model(model, folder, tokenizer="data/tokens/tokenizer")
        result, best = history.as_result(), history.best
        epoch_tokens = batches.count * blocks.seq_len
        tokens = result["total_epochs"] * epoch_tokens
        untrained = [
            {"epoch": 0, "tokens": 0, "macs": 0, "train_loss": None, "val_ppl": best["ppl"], "val_acc": best["acc"]}
        ]
        macs = Ledger.of(model, blocks.seq_len).train_block1(tokens)
        seen = batches.seen(result["total_epochs"])
        write_csv("data/curves/train_phase1.csv", epoch_rows(result, seen, macs) or untrained)
        facts = corpus_facts("data/tokens")["splits"]
        write_facts(
            "data/facts/train_phase1.json",
            {
                "val_ppl": best["ppl"],
                "val_bits_per_byte": bits_per_byte(best["ppl"], facts["validation"]),
                "val_acc": best["acc"],
                "best_epoch": result["best_epoch"],
                "total_epochs": result["total_epochs"],
                # a given block 1 was trained elsewhere: nothing is known of it
                "phase1_converged": result["stopped_early"] if result["total_epochs"] else None,
                "train_tokens": tokens,
                "train_text_tokens": blocks.tokens,
                "parameters": sum(p.numel() for p in model.parameters()),
                "train_macs": macs,
            },
        )
        stage.record |= data_digests("data/tokens") | {"counts": {"trained_tokens": tokens}}


if __name__ == "__main__":
    exit_cleanly(main)
