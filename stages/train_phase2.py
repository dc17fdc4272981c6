"""Phase 2: block 2 learns from the stored exit states of hard tokens; block 1 and its exit stay as they are.

dvc repro train_phase2      (python -m stages.train_phase2)
"""

import torch

from lego.artifacts import atomic_folder, sha256, write_csv, write_json
from lego.ashem import train_gathered, train_upper_layers
from lego.batches import EvaluationBatches
from lego.blocks import PackedBlocks, bits_per_byte, corpus_facts, data_digests
from lego.checkpoint import grow_model, load_model, same_block1, save_model
from lego.cost import Ledger
from lego.epochs import History, TrainingState, epoch_rows, fit
from lego.hard_batches import HardBlockBatches, HardTokenBatches
from lego.harness import Stage, exit_cleanly, resolve_device
from lego.hidden_states import HiddenStateStore
from lego.params import Params, load_params
from lego.routing import evaluate
from lego.steps import build_training
from lego.transformer import CONTEXT_AT_INFERENCE, DeepSupervisionTransformer

Batches = HardTokenBatches | HardBlockBatches


def train(params: Params, stage: Stage, model: DeepSupervisionTransformer, batches: Batches) -> History:
    """Trains what the grown model has on top of block 1 until routed validation perplexity stops falling."""
    ashem, device = params.ashem, resolve_device(params.train.device)
    validation = EvaluationBatches(PackedBlocks("data/tokens", "validation"), params.evaluation.batch_size)
    vocab_size, k = model.sizes["vocab_size"], model.exit_layer
    steps = ashem.phase2_epochs * -(-len(batches) // params.train.grad_accumulation)
    optimizer, options = build_training(model.to(device), ashem.phase2_lr, steps, params.train)

    def train_once() -> float:
        if isinstance(batches, HardBlockBatches):
            return train_gathered(model, batches, optimizer, device, options=options)
        return train_upper_layers(model, batches, optimizer, vocab_size, device, k, options=options)

    state = TrainingState(stage.scratch / "state.safetensors", model, optimizer, options.scheduler)
    history = fit(
        model,
        batches,
        train_once,
        lambda: evaluate(model, validation, model.routing_threshold, device),
        max_epochs=ashem.phase2_epochs,
        patience=ashem.phase2_patience,
        keep_start=True,
        on_best=lambda epoch: save_model(model, stage.keep("best")),
        state=state,
    )
    stage.continued = state.continued
    return history


def main() -> None:
    params = load_params()
    ashem, batch_blocks = params.ashem, params.train.batch_size
    with Stage("train_phase2", params.seed, params.train.threads) as stage:
        store = HiddenStateStore("data/hard")
        store.verify(sha256("data/phase1"), sha256("data/tokens/tokenizer/tokenizer.json"))
        facts = corpus_facts("data/tokens")
        seq_len, leaky = facts["seq_len"], store.manifest["split"] == "validation"
        block1 = load_model("data/phase1")
        torch.manual_seed(stage.seed)  # load_model drew random weights before it replaced them
        model = grow_model(
            block1,
            block1.num_layers + ashem.phase2_layers - ashem.phase1_layers,
            init=ashem.init_new_layers,
            routing_threshold=store.threshold,
            block2_context=CONTEXT_AT_INFERENCE[ashem.phase2_context],
            head=ashem.head,
        )
        kind = HardBlockBatches if ashem.phase2_context == "sequence" else HardTokenBatches
        batches = kind(store, batch_blocks * seq_len, params.train.tokens_per_epoch, stage.seed)
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        print(f"block 2: {trainable:,} trainable parameters, {store.hard_tokens:,} hard tokens stored", flush=True)
        history = train(params, stage, model, batches)
        with atomic_folder("data/phase2") as folder:
            save_model(model, folder, tokenizer="data/tokens/tokenizer")
        result = history.as_result()
        streamed, seen = batches.seen(result["total_epochs"])
        write_csv("metrics/curves/train_phase2.csv", epoch_rows(result, batches.seen(1)[1], seen))
        write_json(
            "metrics/train_phase2.json",
            {
                "val_ppl": history.best["ppl"],
                "val_bits_per_byte": bits_per_byte(history.best["ppl"], facts["splits"]["validation"]),
                "val_acc": history.best["acc"],
                "best_epoch": result["best_epoch"],
                "total_epochs": result["total_epochs"],
                "hard_tokens_seen": seen,
                "hard_tokens_stored": store.hard_tokens,
                "trainable_parameters": trainable,
                "block1_unchanged": same_block1(block1, model),
                "leaky": leaky,
            },
        )
        macs = Ledger.of(model, seq_len).train_block2(seen, ashem.head != "shared", streamed)
        budget = {"collect_hard_macs": store.manifest["macs"], "train_phase2_macs": macs}
        write_json("metrics/added_macs.json", budget | {"added_macs": sum(budget.values()), "leaky": leaky})
        stage.record |= data_digests("data/tokens") | {"counts": {"trained_tokens": seen}}


if __name__ == "__main__":
    exit_cleanly(main)
