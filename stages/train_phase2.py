"""Phase 2: block 2 learns from the stored exit states of hard tokens; block 1 and its exit stay as they are.

dvc repro train_phase2      (python -m stages.train_phase2)
"""

from dataclasses import replace
from typing import Any

from lego.base.artifacts import atomic_folder, identity, read_number, write_csv, write_facts
from lego.base.harness import Stage, exit_cleanly, resolve_device
from lego.base.params import Params, load_params
from lego.growing.phase2 import Batches, grown, hard_batches, train_block2
from lego.growing.selection import recompute, with_replay
from lego.mining.hidden_states import HiddenStateStore
from lego.model.checkpoint import load_model, same_block1, save_model
from lego.model.cost import Ledger
from lego.model.transformer import BaseTransformer
from lego.tokens.batches import split_batches
from lego.tokens.blocks import bits_per_byte, corpus_facts, data_digests
from lego.training.epochs import epoch_rows
from lego.training.search import Search, Trial, search_rates


def search(params: Params, stage: Stage, block1: BaseTransformer, threshold: float, batches: Batches) -> Search:
    """Trains block 2 at each learning rate."""
    ashem, device = params.ashem, resolve_device(params.train.device)
    validation = split_batches("data/tokens", "validation", params.evaluation.batch_size)

    def train(lr: float) -> Trial:
        model = grown(ashem, block1, threshold, stage.seed)
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
    seen, streamed = batches.seen(result["total_epochs"]), batches.streamed(result["total_epochs"])
    ledger = replace(Ledger.of(model, facts["seq_len"]), online=store.online, kept=store.kept)
    macs = ledger.train_block2(seen[-1], params.ashem.head != "shared", streamed)
    budget = {"collect_hard_macs": store.manifest["macs"], "train_phase2_macs": macs}
    before = read_number("data/facts/train_phase1.json", "train_macs") + store.manifest["macs"]
    write_csv("data/curves/train_phase2.csv", epoch_rows(result, seen, macs, before))
    write_facts("data/facts/added_macs.json", budget | {"added_macs": sum(budget.values()), "leaky": leaky})
    return {
        "val_ppl": history.best["ppl"],
        "val_bits_per_byte": bits_per_byte(history.best["ppl"], facts["splits"]["validation"]),
        "val_acc": history.best["acc"],
        "best_epoch": result["best_epoch"],
        "total_epochs": result["total_epochs"],
        "hard_tokens_seen": seen[-1],
        "hard_tokens_stored": store.hard_tokens,
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "leaky": leaky,
    } | found.facts


def main() -> None:
    params = load_params()
    with Stage("train_phase2", params.seed, params.train.threads) as stage:
        store, seq_len = HiddenStateStore("data/hard"), corpus_facts("data/tokens")["seq_len"]
        store.verify(identity("data/phase1"), identity("data/tokens/tokenizer/tokenizer.json"))
        block1 = load_model("data/phase1")
        store.require_layer(branch := params.ashem.branch_of(block1.num_layers))
        if store.online:
            recompute(store, block1, resolve_device(params.train.device), branch)
        learned = with_replay(store, params.ashem.replay_share, stage.seed)
        batches = hard_batches(learned, params.ashem.phase2_context, params.train, seq_len, stage.seed)
        easy = learned.hard_tokens - store.hard_tokens
        replayed = f" and {easy:,} easy ones" if easy else ""
        print(f"block 2: {store.hard_tokens:,} hard tokens{replayed} stored", flush=True)
        found = search(params, stage, block1, store.threshold, batches)
        with atomic_folder("data/phase2") as folder:
            save_model(found.best.model, folder, tokenizer="data/tokens/tokenizer")
        metrics = report(params, found, batches, store)
        write_facts(
            "data/facts/train_phase2.json", metrics | {"block1_unchanged": same_block1(block1, found.best.model)}
        )
        seen = metrics["hard_tokens_seen"] * len(found.tried)
        stage.record |= data_digests("data/tokens") | {"counts": {"trained_tokens": seen}}


if __name__ == "__main__":
    exit_cleanly(main)
