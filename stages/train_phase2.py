"""Phase 2: block 2 learns from the stored exit states of hard tokens; block 1 and its exit stay as they are.

dvc repro train_phase2      (python -m stages.train_phase2)
"""

from typing import Any

import torch

from lego.artifacts import atomic_folder, read_number, sha256, write_csv, write_json
from lego.batches import EvaluationBatches
from lego.blocks import PackedBlocks, bits_per_byte, corpus_facts, data_digests
from lego.checkpoint import grow_model, load_model, same_block1, save_model
from lego.cost import Ledger
from lego.epochs import epoch_rows
from lego.harness import Stage, exit_cleanly, resolve_device
from lego.hidden_states import HiddenStateStore
from lego.params import Params, load_params
from lego.phase2 import Batches, hard_batches, train_block2
from lego.search import Search, Trial, search_rates
from lego.transformer import CONTEXT_AT_INFERENCE, BaseTransformer, DeepSupervisionTransformer


def grown(params: Params, stage: Stage, block1: BaseTransformer, threshold: float) -> DeepSupervisionTransformer:
    """Block 1 with untrained layers on top; each call gives the same weights."""
    ashem = params.ashem
    torch.manual_seed(stage.seed)
    return grow_model(
        block1,
        block1.num_layers + ashem.phase2_layers - ashem.phase1_layers,
        init=ashem.init_new_layers,
        routing_threshold=threshold,
        block2_context=CONTEXT_AT_INFERENCE[ashem.phase2_context],
        head=ashem.head,
    )


def search(params: Params, stage: Stage, block1: BaseTransformer, threshold: float, batches: Batches) -> Search:
    """Trains block 2 at each learning rate."""
    ashem, device = params.ashem, resolve_device(params.train.device)
    validation = EvaluationBatches(PackedBlocks("data/tokens", "validation"), params.evaluation.batch_size)

    def train(lr: float) -> Trial:
        model = grown(params, stage, block1, threshold)
        history, continued = train_block2(
            model,
            batches,
            lr,
            ashem.phase2_epochs,
            ashem.phase2_patience,
            params.train,
            validation,
            device,
            stage.scratch / f"state-{lr:g}.safetensors",
            on_best=lambda epoch: save_model(model, stage.keep(f"best-{lr:g}")),
        )
        stage.continued |= continued
        return Trial(lr, model, history)

    return search_rates(ashem.phase2_lr, params.search.lr_factors, train)


def report(params: Params, found: Search, batches: Batches, store: HiddenStateStore) -> dict[str, Any]:
    """Writes what the run cost and its curve; returns the metrics of the training."""
    facts, history, model = corpus_facts("data/tokens"), found.best.history, found.best.model
    result, leaky = history.as_result(), store.manifest["split"] == "validation"
    streamed, seen = batches.seen(result["total_epochs"])
    by_epoch = [batches.seen(n)[1] for n in range(1, result["total_epochs"] + 1)]
    macs = Ledger.of(model, facts["seq_len"]).train_block2(seen, params.ashem.head != "shared", streamed)
    budget = {"collect_hard_macs": store.manifest["macs"], "train_phase2_macs": macs}
    before = read_number("metrics/train_phase1.json", "train_macs") + store.manifest["macs"]
    write_csv("metrics/curves/train_phase2.csv", epoch_rows(result, by_epoch, macs, before))
    write_json("metrics/added_macs.json", budget | {"added_macs": sum(budget.values()), "leaky": leaky})
    return {
        "val_ppl": history.best["ppl"],
        "val_bits_per_byte": bits_per_byte(history.best["ppl"], facts["splits"]["validation"]),
        "val_acc": history.best["acc"],
        "best_epoch": result["best_epoch"],
        "total_epochs": result["total_epochs"],
        "hard_tokens_seen": seen,
        "hard_tokens_stored": store.hard_tokens,
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "leaky": leaky,
    } | found.facts


def main() -> None:
    params = load_params()
    with Stage("train_phase2", params.seed, params.train.threads) as stage:
        store, seq_len = HiddenStateStore("data/hard"), corpus_facts("data/tokens")["seq_len"]
        store.verify(sha256("data/phase1"), sha256("data/tokens/tokenizer/tokenizer.json"))
        block1 = load_model("data/phase1")
        batches = hard_batches(store, params.ashem.phase2_context, params.train, seq_len, stage.seed)
        print(f"block 2: {store.hard_tokens:,} hard tokens stored", flush=True)
        found = search(params, stage, block1, store.threshold, batches)
        with atomic_folder("data/phase2") as folder:
            save_model(found.best.model, folder, tokenizer="data/tokens/tokenizer")
        metrics = report(params, found, batches, store)
        write_json("metrics/train_phase2.json", metrics | {"block1_unchanged": same_block1(block1, found.best.model)})
        seen = metrics["hard_tokens_seen"] * len(found.tried)
        stage.record |= data_digests("data/tokens") | {"counts": {"trained_tokens": seen}}


if __name__ == "__main__":
    exit_cleanly(main)
