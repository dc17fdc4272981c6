"""Mining: block 1's exit states, confidences and hard tokens of the text that phase 2 learns from.

dvc repro collect_hard      (python -m stages.collect_hard)
"""

from lego.base.artifacts import identity, publish, read_number, write_facts
from lego.base.harness import Stage, exit_cleanly, resolve_device
from lego.base.params import Params, load_params
from lego.base.progress import share, track
from lego.mining.hard_tokens import exit_states
from lego.mining.hidden_states import NUMBER_BYTES, StoreWriter
from lego.model.checkpoint import load_model
from lego.model.cost import Ledger
from lego.tokens.batches import EvaluationBatches
from lego.tokens.blocks import PackedBlocks, data_digests, train_text


def mined(params: Params) -> PackedBlocks:
    """The text that is mined."""
    ashem = params.ashem
    if ashem.hard_split == "validation":
        return PackedBlocks("data/tokens", "validation")
    return train_text("data/tokens", 2, ashem.phase2_share, ashem.phase2_split, params.seed, ashem.phase2_text)


def main() -> None:
    params = load_params()
    ashem = params.ashem
    with Stage("collect_hard", params.seed, params.train.threads) as stage:
        folder = stage.scratch / "store"  # what is finished of it outlives a killed run
        folder.mkdir(parents=True, exist_ok=True)
        blocks, model = mined(params), load_model("data/phase1")
        threshold = read_number("data/facts/compute_threshold.json", "threshold", high=1.0)
        branch = ashem.branch_of(model.num_layers)
        keys_values = ashem.states == "keys_values" and branch is not None
        writer = StoreWriter(folder, threshold, ashem.stored_dtype, ashem.shard_tokens)
        # shuffled, so that each shard, which phase 2 reads one after another, is a sample of all the text
        batches = EvaluationBatches(blocks, params.evaluation.batch_size, writer.blocks, shuffle_seed=stage.seed)
        if continued := writer.blocks > 0:
            print(f"mining continues after {share(writer.blocks, len(blocks), 'blocks')}", flush=True)
        device = resolve_device(params.train.device)
        for batch in track(exit_states(model, batches, device, branch, keys_values), len(batches), "mining", "batch"):
            writer.add(*batch)
        calibrated = read_number("data/facts/compute_threshold.json", "tokens")  # read once for the threshold
        ledger = Ledger.of(model, blocks.seq_len)
        macs = ledger.mine(blocks.tokens + round(calibrated))
        states = "stored" if ashem.states == "keys_values" and branch is None else ashem.states
        print(ledger.states_line(blocks.tokens, NUMBER_BYTES[ashem.store_dtype], states, branch), flush=True)
        manifest = writer.close(
            split=ashem.hard_split,
            text="all" if ashem.hard_split == "validation" else ashem.phase2_text,
            block1_sha256=identity("data/phase1"),
            tokenizer_sha256=identity("data/tokens/tokenizer/tokenizer.json"),
            macs=macs,
            **({} if branch is None else {"layer": branch}),
            **({"keys_values": True} if keys_values else {}),
        )
        hard, tokens = manifest["hard_tokens"], manifest["tokens"]
        write_facts(
            "data/facts/collect_hard.json",
            {
                "n_hard": hard,
                "n_tokens": tokens,
                "hard_share": hard / tokens,
                "mean_hard_confidence": manifest["mean_hard_confidence"],
                "store_relative_error": manifest["relative_error"],
                "macs": macs,
                "shards": len(manifest["shards"]),
                "leaky": ashem.hard_split == "validation",
            },
        )
        publish(folder, "data/hard")  # last: whoever is killed before it has lost no shard
        stage.continued = continued
        print(f"hard: {share(hard, tokens)} of {ashem.hard_split} text, below confidence {threshold:.4f}")
        stage.record |= data_digests("data/tokens") | {"counts": {"tokens": tokens}}


if __name__ == "__main__":
    exit_cleanly(main)
