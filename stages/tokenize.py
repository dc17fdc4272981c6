"""Text to packed blocks, with the n-gram references that any model of it must beat.

dvc repro tokenize          (python -m stages.tokenize)
"""

from lego.base.artifacts import atomic_folder, write_facts
from lego.base.experiments import require_tracked
from lego.base.harness import Stage, exit_cleanly
from lego.base.params import load_params
from lego.text.ngram import references
from lego.text.packing import write_splits


def main() -> None:
    params = load_params()
    if params.data.source == "text":
        require_tracked(params.data.path, "data.path")
    with Stage("tokenize") as stage, atomic_folder("data/tokens") as folder:
        done = write_splits(params.data, params.model.seq_len, params.model.init_from, folder)
        facts, counted = done.facts, ("documents", "tokens", "bytes", "sha256")
        metrics = {f"{split}_{key}": fact[key] for split, fact in facts.items() for key in counted}
        per_byte = {split: facts[split]["tokens"] / facts[split]["bytes"] for split in facts}
        held_out = {split: done.ids[split] for split in ("validation", "test")}
        metrics |= references(done.ids["train"], held_out, done.encoder.vocab_size, per_byte)
        write_facts("data/facts/tokenize.json", metrics | done.dropped)
        stage.record |= {f"{split}_sha256": fact["sha256"] for split, fact in facts.items()}
        stage.record |= {"counts": {"tokens": sum(fact["tokens"] for fact in facts.values())}}


if __name__ == "__main__":
    exit_cleanly(main)
