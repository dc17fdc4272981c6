"""Text on which an extended model should stay what it was: what the given model writes itself, or another kind of text.

dvc repro stages/extend/dvc.yaml:retention
"""

from collections.abc import Iterable, Iterator
from hashlib import sha256
from importlib import import_module
from importlib.metadata import files
from pathlib import Path

import numpy as np
import torch

from lego.base.artifacts import atomic_folder, write_json
from lego.base.harness import Stage, StageError, exit_cleanly, resolve_device
from lego.base.params import load_params
from lego.text.sources import file_texts, stdlib_documents
from lego.text.tokenizer import TextEncoder, write_tokens
from lego.tokens.blocks import BlockWriter
from stages.extend.settings import load_settings

TOKENIZER, BASE = "data/tokens/tokenizer", "data/base"
BLOCKS_AT_A_TIME = 32


def texts(path: str) -> Iterator[str]:
    """What `retention.path` names: texts that every installation has, or those of files as data.path takes them."""
    if path == "licences":
        yield from licences()
    elif path == "pydoc":
        yield from import_module("pydoc_data.topics").topics.values()
    elif path == "stdlib":
        yield from in_any_order(module.text for module in stdlib_documents())
    else:
        yield from file_texts(Path(path), load_params().data, key="extend.yaml: retention.path")


@torch.no_grad()
def own_words(
    blocks: int, seq_len: int, encoder: TextEncoder, device: torch.device
) -> Iterator[tuple[np.ndarray, int]]:
    """Ids and bytes of blocks that the given model writes from end-of-text on, sampled from its own distribution.

    Each is scored as it was written, so of it no model expects a lower loss than the one that wrote it (Gibbs): what
    another has unlearned shows. Only the end-of-text behind each block is not the model's.

    Args:
        blocks: so many.
        seq_len: ids of each.
        encoder: whose ids it may write, and whose end-of-text stands between.
        device: where the model runs.
    """
    from transformers import AutoModelForCausalLM, GenerationConfig

    model = AutoModelForCausalLM.from_pretrained(BASE, trust_remote_code=False).to(device)
    model.generation_config = GenerationConfig()  # its own may penalise or stop
    unused = [*range(encoder.vocab_size, model.config.vocab_size)] or None  # rows that only fill the embedding up
    plain = GenerationConfig(
        do_sample=True, top_k=0, top_p=1.0, temperature=1.0, max_new_tokens=seq_len - 1, suppress_tokens=unused
    )
    yield np.array([encoder.end]), 0
    for first in range(0, blocks, BLOCKS_AT_A_TIME):
        start = torch.full((min(BLOCKS_AT_A_TIME, blocks - first), 1), encoder.end, device=device)
        for row in model.generate(start, attention_mask=torch.ones_like(start), generation_config=plain)[:, 1:].cpu():
            yield np.append(row.numpy(), encoder.end), len(encoder.fast.decode(row.tolist()).encode())


def licences() -> Iterator[str]:
    """Those that torch brings, of itself and of what it is made of, each once: some 190 KB of English."""
    found = [Path(file.locate()) for file in files("torch") or [] if "licenses" in file.parts]
    yield from in_any_order({file.read_text(encoding="utf-8", errors="replace") for file in found})


def in_any_order(documents: Iterable[str]) -> Iterator[str]:
    """In an order that is always the same and follows nothing: of all of it a few are read."""
    yield from sorted(documents, key=lambda text: sha256(text.encode()).digest())


def main() -> None:
    settings, params = load_settings().retention, load_params()
    if settings.tokens <= params.model.seq_len:
        raise StageError(
            f"extend.yaml: retention.tokens must be greater than model.seq_len {params.model.seq_len}, got "
            f"{settings.tokens}; raise it"
        )
    train = params.train
    with Stage("extend/retention", params.seed, train.threads) as stage, atomic_folder("data/retention") as folder:
        encoder = TextEncoder.load(TOKENIZER, TOKENIZER)
        writer, limit = BlockWriter(folder / "test", params.model.seq_len), settings.tokens
        if settings.path == "own":
            blocks = -(-limit // params.model.seq_len)
            limit = blocks * params.model.seq_len + 1
            encoded = own_words(blocks, params.model.seq_len, encoder, resolve_device(train.device))
        else:
            encoded = encoder.encode(texts(settings.path))
        facts, _ = write_tokens(encoded, encoder, writer, limit, 1)
        if not facts["bytes"]:
            raise StageError("extend.yaml: retention.path own: the given model writes end-of-text alone; name another")
        sizes = {"vocab_size": encoder.vocab_size, "seq_len": params.model.seq_len, "end_of_text": encoder.end}
        write_json(folder / "corpus.json", sizes | {"splits": {"test": facts}})
        stage.record |= {"counts": {"tokens": facts["tokens"]}}


if __name__ == "__main__":
    exit_cleanly(main)
