"""Mutated input for every parser of what a user may touch: a result or one clear sentence, never another exception.

python tests/fuzz.py params --seconds 300       (or: text, manifest, blocks, model)

Each case is drawn from a seed of its own; a failure prints it and keeps the input: `--seed N --cases 1` runs it again.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from lego.base.artifacts import ArtifactError, sha256  # noqa: E402
from lego.base.parameter_files import ParamsError  # noqa: E402
from lego.base.params import load_params  # noqa: E402
from lego.growing.hard_batches import HardTokenBatches  # noqa: E402
from lego.mining.hidden_states import HiddenStateStore, StoreWriter  # noqa: E402
from lego.model.checkpoint import load_model, save_model  # noqa: E402
from lego.model.transformer import DeepSupervisionTransformer  # noqa: E402
from lego.text.sources import documents  # noqa: E402
from lego.tokens.blocks import BlockWriter, PackedBlocks  # noqa: E402

TOKENS = [
    b"null",
    b"-1",
    b"1e999",
    b"nan",
    b"[]",
    b"{}",
    b'"',
    b"\n",
    b"\r\n",
    b"\x00",
    b"\xff",
    b"\xef\xbb\xbf",
    b": ",
]
TOKENS += [b"true", b"0", b"99999999999999999999", b"&a", b"*a", b"!!python/object:x", b"\\ud800", b",", b"'", b"- "]


def mutate(content: bytes, chooser: random.Random) -> bytes:
    """A few random edits: bytes changed, cut out, repeated, moved; telling tokens put in."""
    edited = bytearray(content)
    for _ in range(chooser.choice([1, 1, 2, 4, 8])):
        at = chooser.randrange(len(edited) + 1)
        end = min(len(edited), at + chooser.choice([1, 1, 4, 20, 200]))
        match chooser.randrange(6):
            case 0 if edited[at:end]:
                edited[at] = chooser.randrange(256)
            case 1:
                del edited[at:end]
            case 2:
                edited[at:at] = edited[at:end]
            case 3:
                edited[at:at] = chooser.choice(TOKENS)
            case 4:
                edited[at:end] = chooser.choice(TOKENS)
            case _:
                if chooser.random() < 0.2:
                    del edited[at:]
    return bytes(edited)


def one_line(error: Exception) -> None:
    assert str(error), "an empty sentence"
    assert "\n" not in str(error), f"more than one line: {error!r}"


def fuzz_params(folder: Path, chooser: random.Random) -> None:
    path = folder / "params.yaml"
    path.write_bytes(mutate((ROOT / "params.yaml").read_bytes(), chooser))
    try:
        load_params(path)
    except ParamsError as error:
        one_line(error)


def _text_files() -> dict[str, bytes]:
    import pyarrow as pa
    import pyarrow.parquet as pq
    import zstandard

    text = "First line, naïve ☕\n = Heading = \nthe end\n" * 3
    rows = [{"text": text, "id": 1}, {"text": "other", "id": 2}, {"text": None, "id": 3}]
    jsonl = "".join(json.dumps(row) + "\n" for row in rows).encode()
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return {
        "a.txt": text.encode(),
        "a.txt.gz": gzip.compress(text.encode()),
        "a.md.zst": zstandard.compress(text.encode()),
        "a.jsonl": jsonl,
        "a.jsonl.gz": gzip.compress(jsonl),
        "a.csv": b'id,text\n1,"quoted, text"\n2,plain\n3,"two\nlines"\n',
        "a.parquet": sink.getvalue().to_pybytes(),
    }


def fuzz_text(folder: Path, chooser: random.Random) -> None:
    name, content = chooser.choice(sorted(_text_files().items()))
    path = folder / name
    path.write_bytes(mutate(content, chooser))
    update = {"source": "text", "path": str(path), "split_on": chooser.choice([None, " = "])}
    try:
        for document in documents(load_params(ROOT / "params.yaml").data.model_copy(update=update)):
            document.text.encode()
    except ArtifactError as error:
        one_line(error)
    finally:
        path.unlink()


def _mutate_one(folder: Path, chooser: random.Random, names: list[str]) -> None:
    path = folder / chooser.choice(names)
    path.write_bytes(mutate(path.read_bytes(), chooser))


def fuzz_manifest(folder: Path, chooser: random.Random) -> None:
    store = folder / "store"
    shutil.rmtree(store, ignore_errors=True)
    store.mkdir()
    writer = StoreWriter(store, 0.5, "float16", 8)
    for _ in range(2):
        ids = torch.randint(0, 9, (2, 4))
        writer.add(ids, ids, torch.randn(2, 4, 3), torch.tensor([[0.1, 0.9, 0.2, 0.8]] * 2))
    writer.close(split="train", macs=1, block1_sha256="a", tokenizer_sha256="b")
    _mutate_one(store, chooser, ["manifest.json"] * 3 + ["shard-00000.safetensors"])
    try:
        opened = HiddenStateStore(store)
        opened.verify("a", "b")
        list(HardTokenBatches(opened, 3, 6, 0))
    except ArtifactError as error:
        one_line(error)


def fuzz_blocks(folder: Path, chooser: random.Random) -> None:
    tokens = folder / "tokens"
    shutil.rmtree(tokens, ignore_errors=True)
    tokens.mkdir()
    writer = BlockWriter(tokens / "train", 4)
    writer.add(np.arange(50))
    writer.close()
    facts = {"train": {"files_sha256": sha256(writer.folder), "tokens": 48, "bytes": 9, "documents": 1, "sha256": ""}}
    (tokens / "corpus.json").write_text(json.dumps({"splits": facts, "vocab_size": 50, "seq_len": 4}))
    _mutate_one(tokens, chooser, ["corpus.json", "train/state.json", "train/data-00000-of-00001.arrow"])
    try:
        blocks = PackedBlocks(tokens, "train")
        blocks.rows(torch.arange(len(blocks)))
    except ArtifactError as error:
        one_line(error)


def fuzz_model(folder: Path, chooser: random.Random) -> None:
    model = folder / "model"
    model.mkdir(exist_ok=True)
    save_model(DeepSupervisionTransformer(7, 8, 2, 2), model)
    _mutate_one(model, chooser, ["config.json"] * 3 + ["model.safetensors"])
    try:
        load_model(model)
    except ArtifactError as error:
        one_line(error)


TARGETS: dict[str, Callable[[Path, random.Random], None]] = {
    "params": fuzz_params,
    "text": fuzz_text,
    "manifest": fuzz_manifest,
    "blocks": fuzz_blocks,
    "model": fuzz_model,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", type=int, default=sys.maxsize)
    arguments = parser.parse_args()
    end, case = time.monotonic() + arguments.seconds, 0
    folder = Path(tempfile.mkdtemp(prefix="lego-fuzz-"))
    while time.monotonic() < end and case < arguments.cases:
        try:
            TARGETS[arguments.target](folder, random.Random(arguments.seed + case))
        except Exception:
            traceback.print_exc()
            print(f"{arguments.target}: seed {arguments.seed + case} fails; its input is in {folder}", file=sys.stderr)
            return 1
        case += 1
    shutil.rmtree(folder)
    print(f"{arguments.target}: {case:,} cases, no finding")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
