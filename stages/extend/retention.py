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
TEXTS_AT_A_TIME = 32


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
def own_words(tokens: int, end: int, length: int, device: torch.device) -> Iterator[tuple[np.ndarray, int]]:
    """Ids (n,) and bytes of texts that the given model writes from end-of-text on, sampled from its own distribution.

    Of such text no model expects a lower loss than the one that wrote it, so whatever another has unlearned shows.

    Args:
        tokens: at least so many in all.
        end: id of end-of-text, with which each text begins and ends.
        length: of a text, at most.
        device: where the model runs.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    model, tokenizer = AutoModelForCausalLM.from_pretrained(BASE).to(device), AutoTokenizer.from_pretrained(BASE)
    plain = GenerationConfig(
        do_sample=True, top_k=0, top_p=1.0, temperature=1.0, max_new_tokens=length, eos_token_id=end, pad_token_id=end
    )
    start = torch.full((min(TEXTS_AT_A_TIME, -(-tokens // length)), 1), end, device=device)
    while tokens > 0:
        for row in model.generate(start, attention_mask=torch.ones_like(start), generation_config=plain)[:, 1:].cpu():
            stops = (row == end).nonzero()
            ids = row[: int(stops[0]) if len(stops) else length]
            tokens -= len(ids) + 1
            yield np.append(ids.numpy(), end), len(tokenizer.decode(ids).encode())


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
            encoded = own_words(limit, encoder.end, params.model.seq_len, resolve_device(train.device))
        else:
            encoded = encoder.encode(texts(settings.path))
        facts, _ = write_tokens(encoded, encoder, writer, limit, 1)
        sizes = {"vocab_size": encoder.vocab_size, "seq_len": params.model.seq_len, "end_of_text": encoder.end}
        write_json(folder / "corpus.json", sizes | {"splits": {"test": facts}})
        stage.record |= {"counts": {"tokens": facts["tokens"]}}


if __name__ == "__main__":
    exit_cleanly(main)
