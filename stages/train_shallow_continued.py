"""The yardstick: block 1 trained on for exactly the MACs that collect_hard and train_phase2 cost.

It reads the part of train that phase 2 mines (ashem.phase2_text), also where hard_split mines validation text.

dvc repro train_shallow_continued      (python -m stages.train_shallow_continued)
"""

from lego.base.artifacts import atomic_folder, read_json, read_number, write_csv, write_facts, write_json, write_metrics
from lego.base.harness import Stage, StageError, exit_cleanly, resolve_device
from lego.base.params import Params, load_params
from lego.evaluation.metrics import summary
from lego.evaluation.plain import Comparison
from lego.model.checkpoint import load_model, save_model
from lego.model.cost import Ledger
from lego.tokens.batches import TrainingBatches, blocks_in_epoch, split_batches
from lego.tokens.blocks import bits_per_byte, corpus_facts, data_digests, train_text
from lego.training.budget import Budget, train_blocks
from lego.training.epochs import epoch_rows
from lego.training.search import Search, Trial, search_rates
from lego.training.trainer import create_standard_config


def search(params: Params, stage: Stage, batches: TrainingBatches) -> Search:
    """Trains block 1 on at each learning rate, each time for the whole budget."""
    device = resolve_device(params.train.device)
    validation = split_batches("data/tokens", "validation", params.evaluation.batch_size)

    def train(lr: float) -> Trial:
        model = load_model("data/phase1")
        history, continued = train_blocks(
            model,
            create_standard_config(model.num_layers),
            batches,
            lr,
            params.train,
            validation,
            device,
            stage.scratch / f"state-{lr:g}.safetensors",
            keep_start=True,
            on_best=lambda epoch: save_model(model, stage.keep(f"best-{lr:g}")),
        )
        stage.continued |= continued
        return Trial(lr, model, history)

    return search_rates(params.yardstick.lr, params.search.lr_factors, train)


def main() -> None:
    params = load_params()
    train, ashem, block1 = params.train, params.ashem, load_model("data/phase1")
    with Stage("train_shallow_continued", params.seed, train.threads) as stage:
        blocks = train_text("data/tokens", 2, ashem.phase2_share, ashem.phase2_split, params.seed, ashem.phase2_text)
        ledger = Ledger.of(block1, blocks.seq_len)
        budget = read_number("data/facts/added_macs.json", "added_macs")
        affordable = round(budget / ledger.train_block1(blocks.seq_len))
        before = read_number("data/facts/train_phase1.json", "train_macs")
        leaky = read_json("data/facts/added_macs.json", "leaky")["leaky"]
        if not affordable:
            raise StageError("data/facts/added_macs.json: the budget pays for no block; raise ashem.phase2_epochs")
        tokens, per_epoch = affordable * blocks.seq_len, blocks_in_epoch(train.tokens_per_epoch, blocks)
        print(f"block 1 trains on: {tokens:,} tokens for {budget:.3e} MACs", flush=True)
        batches = TrainingBatches(blocks, train.batch_size, per_epoch, stage.seed, total_blocks=affordable)
        found = search(params, stage, batches)
        history, model, macs = found.best.history, found.best.model, ledger.train_block1(tokens)
        with atomic_folder("data/baseline/shallow_continued") as folder:
            save_model(model, folder, tokenizer="data/tokens/tokenizer")
        seen = batches.seen(len(history.evaluations))
        write_csv("data/curves/shallow_continued.csv", epoch_rows(history.as_result(), seen, macs, before))
        spent = Budget(budget, before).spent(macs, found.best.lr)
        unmined = {"n_hard": None, "hard_share": None, "leaky": leaky}  # it learns from every token
        threshold = read_number("data/facts/compute_threshold.json", "threshold", high=1.0)
        device = resolve_device(train.device)
        branch = ashem.branch_of(block1.num_layers)
        routed = ledger.grown(block1.num_layers + ashem.new_layers, ashem.phase2_context, branch)
        size = params.evaluation.batch_size
        metrics, documents = Comparison.on("data/tokens", size, block1, threshold, routed, device).judge(model)
        write_csv("data/documents/shallow_continued.csv", documents)
        metrics |= spent | unmined
        write_json("metrics/details/shallow_continued.json", metrics)
        write_metrics("metrics/yardstick.json", summary(metrics))
        trained = {"best_epoch": history.best_epoch, "total_epochs": len(history.evaluations), "leaky": leaky}
        validation = corpus_facts("data/tokens")["splits"]["validation"]
        reached = {"val_ppl": found.best.ppl, "val_bits_per_byte": bits_per_byte(found.best.ppl, validation)}
        write_facts("data/facts/train_shallow_continued.json", spent | found.facts | trained | reached)
        counted = {"trained_tokens": tokens * len(found.tried)}
        stage.record |= data_digests("data/tokens") | {"counts": counted}


if __name__ == "__main__":
    exit_cleanly(main)
