"""Mining for a block above block 2: the tokens that every exit below finds hard, and what the block reads of them.

dvc repro stages/cascade/dvc.yaml:mine@third      (python -m stages.cascade.mine third)
"""

import sys

import torch

from lego.base.artifacts import identity, publish, write_facts
from lego.base.harness import Stage, StageError, exit_cleanly, resolve_device
from lego.base.params import load_params
from lego.base.progress import share, track
from lego.mining.hard_tokens import climbed, climbing_states
from lego.mining.hidden_states import StoreWriter
from lego.mining.thresholds import quantile_threshold
from lego.model.cost import cascade_macs
from lego.model.transformer import BaseTransformer
from lego.tokens.batches import EvaluationBatches, split_batches
from lego.tokens.blocks import data_digests, train_text
from stages.cascade.settings import block_of, stands_on


def threshold_of(
    model: BaseTransformer, thresholds: list[float], ratio: float, size: int, device: torch.device
) -> tuple[float, int]:
    """The confidence at the last exit below which a share of the tokens of calibration text lies that come there.

    Raises:
        StageError: none comes there.
    """
    parts = []
    for x, _ in split_batches("data/tokens", "calibration", size):
        parts.append(climbed(model, thresholds, x.to(device), model.blocks)[1].cpu())
    confidences = torch.cat(parts)
    if not len(confidences):
        raise StageError("no token of calibration text comes to the exit below; raise hard_example_ratio there")
    return quantile_threshold(confidences, ratio), len(confidences)


def main(name: str = "") -> None:
    params, block = load_params(), block_of(name)
    ashem, size = params.ashem, params.evaluation.batch_size
    with Stage(f"cascade/mine@{name}", params.seed, params.train.threads) as stage:
        device, (model, below) = resolve_device(params.train.device), stands_on(block.below)
        model, thresholds = model.to(device).eval(), below.thresholds
        threshold, there = threshold_of(model, thresholds, block.hard_example_ratio, size, device)
        folder = stage.scratch / "store"  # what is finished of it outlives a killed run
        folder.mkdir(parents=True, exist_ok=True)
        blocks = train_text("data/tokens", 2, ashem.phase2_share, ashem.phase2_split, params.seed, ashem.phase2_text)
        writer = StoreWriter(folder, threshold, ashem.store_dtype, ashem.shard_tokens)
        stage.continued = writer.blocks > 0
        batches = EvaluationBatches(blocks, size, writer.blocks, shuffle_seed=stage.seed)
        entered, read = [0] * len(thresholds), 0
        found = climbing_states(model, thresholds, batches, device, block.repeats)
        for batch, counts in track(found, len(batches), "mining", "batch"):
            writer.add(*batch)
            entered, read = [a + b for a, b in zip(entered, counts, strict=True)], read + batch[0].numel()
        shares = [count / max(1, read) for count in entered]  # of what this run read, as of all the text
        macs = round(cascade_macs(model, blocks.seq_len, shares) * blocks.tokens)
        manifest = writer.close(
            split="train",
            text=ashem.phase2_text,
            block1_sha256=identity(f"data/{block.below}"),
            tokenizer_sha256=identity("data/tokens/tokenizer/tokenizer.json"),
            macs=macs,
            keys_values=True,
            mined={"ratios": [*below.ratios, block.hard_example_ratio], "thresholds": [*thresholds, threshold]},
        )
        hard, tokens = manifest["hard_tokens"], manifest["tokens"]
        counted = {"n_hard": hard, "n_tokens": tokens, "macs": macs, "threshold": threshold, "calibrated_on": there}
        write_facts(f"data/cascade_facts/mine_{name}.json", counted)
        publish(folder, f"data/cascade_hard/{name}")  # last: whoever is killed before it has lost no shard
        print(f"hard at every exit: {share(hard, tokens)} of train text, at the last below confidence {threshold:.4f}")
        stage.record |= data_digests("data/tokens") | {"counts": {"tokens": tokens}}


if __name__ == "__main__":
    exit_cleanly(lambda: main(*sys.argv[1:]))
