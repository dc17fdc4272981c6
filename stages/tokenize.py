"""Text to packed blocks, with the n-gram references that any model of it must beat.

dvc repro tokenize          (python -m stages.tokenize)
"""

import hashlib
import math

import numpy as np

from lego.artifacts import atomic_folder, write_json
from lego.corpus import (
    SPLITS,
    encode,
    fit_bpe,
    pack,
    save_blocks,
    save_tokenizer,
    split_documents,
    stdlib_documents,
    token_bytes,
)
from lego.harness import Stage, exit_cleanly
from lego.ngram import KneserNey, unigram_nll
from lego.params import load_params


def main() -> None:
    params = load_params()
    data, seq_len = params.data, params.model.seq_len
    with Stage("tokenize") as stage, atomic_folder("data/tokens") as folder:
        splits = split_documents(
            stdlib_documents(),
            validation=data.validation_share,
            calibration=data.calibration_share,
            test=data.test_share,
        )
        tokenizer = fit_bpe((d.text for d in splits["train"]), data.vocab_size, data.max_tokenizer_bytes)
        save_tokenizer(tokenizer, folder / "tokenizer")
        limits = {split: getattr(data, f"max_{split}_tokens") for split in SPLITS}
        lengths, ids, facts = token_bytes(tokenizer), {}, {}
        for split, documents in splits.items():
            ids[split], used = encode(tokenizer, [d.text for d in documents], limits[split])
            rows = pack(ids[split], seq_len)
            save_blocks(rows, folder / split)
            facts[split] = {
                "documents": used,
                "tokens": rows[:, 1:].size,
                "bytes": int(lengths[rows[:, 1:]].sum()),
                "sha256": hashlib.sha256(np.ascontiguousarray(rows).tobytes()).hexdigest(),
            }
        write_json(folder / "corpus.json", {"vocab_size": data.vocab_size, "seq_len": seq_len, "splits": facts})
        fivegram = KneserNey(ids["train"], data.vocab_size, order=5)
        metrics = {f"{split}_{key}": value for split, fact in facts.items() for key, value in fact.items()}
        for split in ("validation", "test"):
            per_byte = len(ids[split]) / lengths[ids[split]].sum() / math.log(2)
            unigram = unigram_nll(ids["train"], ids[split], data.vocab_size)
            for name, nll in (("unigram", unigram), ("fivegram", fivegram.nll(ids[split]))):
                metrics |= {f"{split}_{name}_ppl": math.exp(nll), f"{split}_{name}_bits_per_byte": nll * per_byte}
        write_json("metrics/tokenize.json", metrics)
        stage.record |= {f"{split}_sha256": fact["sha256"] for split, fact in facts.items()}
        stage.record |= {"counts": {"tokens": sum(len(part) for part in ids.values())}}


if __name__ == "__main__":
    exit_cleanly(main)
