"""Text of another kind than what is learned, encoded alike: on it an extended model should stay what it was.

dvc repro stages/extend/dvc.yaml:retention
"""

from collections.abc import Iterable, Iterator
from hashlib import sha256
from importlib import import_module
from importlib.metadata import files
from pathlib import Path

from lego.base.artifacts import atomic_folder, write_json
from lego.base.harness import Stage, StageError, exit_cleanly
from lego.base.params import load_params
from lego.text.sources import file_texts, stdlib_documents
from lego.text.tokenizer import TextEncoder, write_tokens
from lego.tokens.blocks import BlockWriter
from stages.extend.settings import load_settings

TOKENIZER = "data/tokens/tokenizer"


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
    with Stage("extend/retention") as stage, atomic_folder("data/retention") as folder:
        encoder = TextEncoder.load(TOKENIZER, TOKENIZER)
        writer, limit = BlockWriter(folder / "test", params.model.seq_len), settings.tokens
        facts, _ = write_tokens(encoder.encode(texts(settings.path)), encoder, writer, limit, 1)
        sizes = {"vocab_size": encoder.vocab_size, "seq_len": params.model.seq_len, "end_of_text": encoder.end}
        write_json(folder / "corpus.json", sizes | {"splits": {"test": facts}})
        stage.record |= {"counts": {"tokens": facts["tokens"]}}


if __name__ == "__main__":
    exit_cleanly(main)
