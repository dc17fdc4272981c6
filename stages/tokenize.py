"""Text to packed blocks, with the n-gram references that any model of it must beat.

dvc repro tokenize          (python -m stages.tokenize)
"""

from pathlib import Path

from lego.artifacts import atomic_folder, write_json
from lego.blocks import BlockWriter
from lego.corpus import SPLITS, Corpus, NearDuplicates
from lego.harness import Stage, exit_cleanly
from lego.ngram import references
from lego.params import load_params
from lego.progress import track
from lego.sections import DataParams, pretrained_tokenizer
from lego.sources import documents
from lego.tokenizer import TextEncoder, fit_bpe, fit_words, write_tokens

BYTES_PER_TOKEN = 8  # when streaming: so much text surely gives a token, whatever the tokenizer


def gather(data: DataParams, path: Path) -> Corpus:
    """The source's documents by split; of a stream no more than the token limits can use."""
    shares = {split: getattr(data, f"{split}_share") for split in SPLITS[1:]}
    enough = {split: BYTES_PER_TOKEN * getattr(data, f"max_{split}_tokens") for split in SPLITS}
    streaming = data.source == "hub" and data.streaming
    read = track(documents(data), None, "reading", "document")
    return Corpus(read, path, shares, enough if streaming else None)


def fit_tokenizer(data: DataParams, init_from: str | None, corpus: Corpus) -> TextEncoder:
    if pretrained := pretrained_tokenizer(data, init_from):
        return TextEncoder.load(*pretrained)
    fit = fit_bpe if data.tokenizer == "bpe" else fit_words
    return TextEncoder.fitted(fit(corpus.texts("train"), data.vocab_size, data.max_tokenizer_bytes))


def main() -> None:
    params = load_params()
    data, seq_len = params.data, params.model.seq_len
    with Stage("tokenize") as stage, atomic_folder("data/tokens") as folder:
        spool = folder / ".documents.arrow"
        corpus = gather(data, spool)
        encoder = fit_tokenizer(data, params.model.init_from, corpus)
        encoder.save(folder / "tokenizer")
        near = NearDuplicates(data.near_duplicate_similarity) if data.near_duplicates == "drop" else None
        facts, ids = {}, {}
        for split in ("test", "calibration", "validation", "train"):  # in this order near-duplicates give way
            texts = corpus.texts(split) if near is None else near.novel(corpus.texts(split), remember=split != "train")
            writer, limit = BlockWriter(folder / split, seq_len), getattr(data, f"max_{split}_tokens")
            encoded = track(encoder.encode(texts), limit, f"tokenizing {split}", "token", size=lambda one: len(one[0]))
            facts[split], ids[split] = write_tokens(encoded, encoder, writer, limit, data.max_ngram_tokens)
        spool.unlink()
        sizes = {"vocab_size": encoder.vocab_size, "seq_len": seq_len, "end_of_text": encoder.end}
        write_json(folder / "corpus.json", sizes | {"splits": facts})
        counted = ("documents", "tokens", "bytes", "sha256")
        metrics = {f"{split}_{key}": fact[key] for split, fact in facts.items() for key in counted}
        dropped = {"duplicates": corpus.duplicates, "near_duplicates": near.dropped if near else 0}
        per_byte = {split: facts[split]["tokens"] / facts[split]["bytes"] for split in facts}
        held_out = {split: ids[split] for split in ("validation", "test")}
        metrics |= references(ids["train"], held_out, encoder.vocab_size, per_byte)
        write_json("metrics/tokenize.json", metrics | dropped)
        stage.record |= {f"{split}_sha256": fact["sha256"] for split, fact in facts.items()}
        stage.record |= {"counts": {"tokens": sum(fact["tokens"] for fact in facts.values())}}


if __name__ == "__main__":
    exit_cleanly(main)
