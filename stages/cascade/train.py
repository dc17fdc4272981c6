"""A block above block 2 learns from the tokens that every exit below finds hard; all below stays as it is.

dvc repro stages/cascade/dvc.yaml:train@third      (python -m stages.cascade.train third)
"""

import sys

import torch

from lego.base.artifacts import atomic_folder, identity, write_csv, write_facts, write_json
from lego.base.harness import Stage, StageError, exit_cleanly, resolve_device
from lego.base.params import Params, load_params
from lego.evaluation.cascade import exit_table
from lego.growing.phase2 import Batches, hard_batches, train_block2
from lego.mining.hidden_states import HiddenStateStore
from lego.model.checkpoint import save_model
from lego.model.cost import Ledger
from lego.model.growth import add_block
from lego.model.transformer import BaseTransformer, DeepSupervisionTransformer
from lego.tokens.batches import split_batches
from lego.tokens.blocks import corpus_facts, data_digests
from lego.training.epochs import epoch_rows
from lego.training.search import Search, Trial, search_rates
from stages.cascade.settings import BlockParams, block_of, stands_on


def grown(block: BlockParams, below: BaseTransformer, seed: int) -> DeepSupervisionTransformer:
    """The model below with the untrained block on top; each call gives the same weights.

    Raises:
        StageError: it does not fit the model below.
    """
    torch.manual_seed(seed)
    try:
        return add_block(below, block.layers, repeats=block.repeats, init=block.init_new_layers, rank=block.rank)
    except ValueError as error:
        raise StageError(f"stages/cascade/params.yaml: {error}") from None


def search(
    params: Params, block: BlockParams, stage: Stage, below: BaseTransformer, thresholds: list[float], batches: Batches
) -> Search:
    """Trains the block at each learning rate."""
    device = resolve_device(params.train.device)
    validation = split_batches("data/tokens", "validation", params.evaluation.batch_size)

    def train(lr: float) -> Trial:
        model = grown(block, below, stage.seed)
        history, continued = train_block2(
            model,
            batches,
            lr,
            block.epochs,
            block.patience,
            params.train,
            validation,
            device,
            stage.scratch / f"state-{lr:g}.safetensors",
            on_best=lambda epoch: save_model(model, stage.keep(f"best-{lr:g}")),
            judge=lambda: exit_table(model, validation, device).routed(thresholds),
        )
        stage.continued |= continued
        return Trial(lr, model, history)

    return search_rates(block.lr, params.search.lr_factors, train)


def main(name: str = "") -> None:
    params, block = load_params(), block_of(name)
    with Stage(f"cascade/train@{name}", params.seed, params.train.threads) as stage:
        store, seq_len = HiddenStateStore(f"data/cascade_hard/{name}"), corpus_facts("data/tokens")["seq_len"]
        store.verify(identity(f"data/{block.below}"), identity("data/tokens/tokenizer/tokenizer.json"))
        below, _ = stands_on(block.below)
        batches = hard_batches(store, "sequence", params.train, seq_len, stage.seed)
        print(f"{name}: {store.hard_tokens:,} hard tokens stored", flush=True)
        thresholds = store.manifest["mined"]["thresholds"]
        found = search(params, block, stage, below, thresholds, batches)
        result, model = found.best.history.as_result(), found.best.model
        seen, streamed = batches.seen(result["total_epochs"]), batches.streamed(result["total_epochs"])
        macs = Ledger.of_block(model, model.blocks[-1], seq_len).train_block2(seen[-1], False, streamed)
        with atomic_folder(f"data/cascade/{name}") as folder:
            save_model(model, folder, tokenizer="data/tokens/tokenizer")
            write_json(folder / "mined.json", store.manifest["mined"])
        write_csv(f"data/curves/cascade_{name}.csv", epoch_rows(result, seen, macs, store.manifest["macs"]))
        facts = {"val_ppl": found.best.history.best["ppl"], "hard_tokens_seen": seen[-1]} | found.facts
        facts |= {"added_macs": store.manifest["macs"] + macs, "total_epochs": result["total_epochs"]}
        write_facts(f"data/cascade_facts/train_{name}.json", facts)
        stage.record |= data_digests("data/tokens") | {"counts": {"trained_tokens": seen[-1] * len(found.tried)}}


if __name__ == "__main__":
    exit_cleanly(lambda: main(*sys.argv[1:]))
