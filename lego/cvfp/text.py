"""Ids of train, validation and test text, and the rules that keep them honest (specification, section 6).

heldout_in_vocab: validation is of documents that train does not have. val_from_train: the last share of the train
tokens, decoded and tokenized again; a subset of train, from which nothing about generalization follows. The test ids
are held out in both.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lego.base.artifacts import ArtifactError, read_json, read_tensors, write_json, write_tensors
from lego.cvfp.sections import TextParams
from lego.text.tokenizer import TextEncoder
from lego.tokens.blocks import CorpusError, PackedBlocks

SPLITS = ("train", "validation", "test")
MODES = "heldout_in_vocab or val_from_train"
LABELS = {"val_from_train": "val_from_train (train-subset, not generalization)"}  # what a number on it is worth


class UnseenIdError(CorpusError):
    """Validation has ids that train never shows; the message counts them."""


def stream(folder: str | Path, split: str) -> np.ndarray:
    """All ids (n,) of a split that tokenize wrote, in the order of the text."""
    blocks = PackedBlocks(folder, split)
    return np.concatenate([blocks.rows(torch.tensor([0]))[0, :1].numpy(), blocks.targets()])


def digest(ids: np.ndarray | Tensor) -> str:
    """SHA-256 of ids (n,) as 64-bit integers."""
    return hashlib.sha256(np.ascontiguousarray(np.asarray(ids), dtype=np.int64).tobytes()).hexdigest()


def require_seen(ids: np.ndarray, train: np.ndarray, name: str) -> None:
    """Checks that every id (m,) occurs in train (n,).

    Raises:
        UnseenIdError: some do not.
    """
    unseen = np.setdiff1d(ids, train)
    if len(unseen):
        raise UnseenIdError(
            f"{name}: {len(unseen)} ids do not occur in train, the first is {unseen[0]}; make the text again with "
            "dvc repro stages/cvfp/dvc.yaml, or set text.unseen in stages/cvfp/params.yaml"
        )


def validation_from_train(train: np.ndarray, share: float, encoder: TextEncoder) -> np.ndarray:
    """The last `share` of train ids (n,), decoded to text and tokenized again without truncation.

    Raises:
        UnseenIdError: tokenizing again gave ids that train does not have, as borders of tokens may move.
    """
    last = train[len(train) - max(2, round(share * len(train))) :]
    spelled = encoder.fast.decode(last.tolist(), skip_special_tokens=False)
    encoder.fast.encode_special_tokens = False  # end-of-text, which decoding spelled out, is one token again
    again = np.array(encoder.fast.encode(spelled, add_special_tokens=False).ids, dtype=np.int64)
    encoder.fast.encode_special_tokens = True
    try:
        require_seen(again, train, "validation from train")
    except UnseenIdError as error:
        sentence = str(error).partition("; ")[0]
        raise UnseenIdError(
            f"{sentence}, as borders of tokens moved; change text.val_share or data.max_train_tokens in "
            "stages/cvfp/params.yaml, or set text.validation: heldout_in_vocab"
        ) from None
    return again


def auto_split(*_: object) -> np.ndarray:
    """What the first implementation fell back to: it is not allowed.

    Raises:
        ValueError: always; the message names the allowed modes.
    """
    raise ValueError(
        f"auto_split is not allowed: validation text is {MODES} (stages/cvfp/params.yaml: text.validation)"
    )


def in_vocabulary(ids: np.ndarray, train: np.ndarray, unseen: str, unknown: int) -> tuple[np.ndarray, int]:
    """Held-out ids (m,), those unknown to train left out (`filter`) or replaced (`unk`), and their count."""
    known = np.isin(ids, np.unique(train))
    count = int((~known).sum())
    return (ids[known] if unseen == "filter" else np.where(known, ids, unknown)), count


def overlap(ids: np.ndarray, train: np.ndarray, length: int) -> np.ndarray:
    """Whether each of the ids (m,) lies in a run of `length` ids that train (n,) has too."""
    marked = np.zeros(len(ids), dtype=bool)
    if min(len(ids), len(train)) < length:
        return marked
    windows = np.lib.stride_tricks.sliding_window_view
    keys = [_hashes(windows(one.astype(np.int64), length)) for one in (ids, train)]
    for start in np.flatnonzero(np.isin(keys[0], keys[1])):
        marked[start : start + length] = True
    return marked


def _hashes(rows: np.ndarray) -> np.ndarray:
    """64-bit hashes (n,) of rows (n, k): polynomial, modulo 2**64."""
    value = np.zeros(len(rows), dtype=np.uint64)
    for column in range(rows.shape[1]):
        value = value * np.uint64(0x9E3779B97F4A7C15) + rows[:, column].astype(np.uint64) + np.uint64(1)
    return value


def without_overlap(ids: np.ndarray, train: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Held-out ids (m,) without the runs of `length` that train has, cut until there is none, and where they stood."""
    places = np.arange(len(ids))
    while (marked := overlap(ids[places], train, length)).any():
        places = places[~marked]
    return ids[places], places


@dataclass(frozen=True)
class Text:
    """Ids by split (n,), size of the vocabulary, bytes behind each id (V,), policy, and what `unk` hides of a split.

    hidden_bytes: what the predicted ids of a split stood for beyond the ids that replaced them.
    """

    ids: dict[str, Tensor]
    vocab_size: int
    token_bytes: Tensor
    validation: str
    end_of_text: int = 0
    hidden_bytes: dict[str, int] = field(default_factory=dict)

    def bytes_of(self, split: str) -> int:
        """Bytes of text that the predicted ids of a split stand for; the first one is not predicted."""
        return int(self.token_bytes[self.ids[split][1:]].sum()) + self.hidden_bytes.get(split, 0)

    def bits_per_byte(self, loss: float, split: str) -> float:
        """A mean loss in nats a token as bits a byte of text."""
        return loss / math.log(2) * (len(self.ids[split]) - 1) / self.bytes_of(split)

    def first(self, share: float) -> Text:
        """The same held-out text with the first `share` of train alone."""
        if share == 1:
            return self
        train = self.ids["train"]
        return replace(self, ids=self.ids | {"train": train[: round(share * len(train))]})

    def digests(self) -> dict[str, str]:
        """SHA-256 of the ids by split."""
        return {split: digest(ids) for split, ids in self.ids.items()}


def write_text_ids(folder: Path, tokens: str | Path, encoder: TextEncoder, settings: TextParams) -> dict[str, object]:
    """Applies the policy to what tokenize wrote, and writes ids.safetensors and text.json into a folder.

    Args:
        folder: exists.
        tokens: folder of blocks by split.
        encoder: the tokenizer.
        settings: section `text`.

    Returns:
        counts: tokens by split, unseen and overlapping ones left out.

    Raises:
        CorpusError: the tokenizer has no fixed bytes behind its ids, or nothing is left of a split.
    """
    lengths = encoder.token_bytes()
    if lengths is None:
        raise CorpusError("params.yaml: data.tokenizer must be a byte-level one, so that bytes are known")
    train, counts, hidden = stream(tokens, "train"), dict[str, object](), dict[str, int]()
    ids = {"train": train}
    for split in ("validation", "test"):
        if split == "validation" and settings.validation == "val_from_train":
            ids[split] = validation_from_train(train, settings.val_share, encoder)
            continue
        spelled = stream(tokens, split)
        held_out, counts[f"{split}_unseen"] = in_vocabulary(
            spelled, train, settings.unseen, encoder.end
        )  # before the cut: what is left out makes neighbours
        ids[split], places = without_overlap(held_out, train, settings.overlap_length)
        counts[f"{split}_overlapping"] = len(held_out) - len(places)
        if settings.unseen == "unk":
            hidden[split] = int((lengths[spelled[places]] - lengths[ids[split]])[1:].sum())
        if len(ids[split]) < 2:
            raise CorpusError(f"{split}: nothing is left of it after {counts}; raise data.max_{split}_tokens")
    write_tensors(
        folder / "ids.safetensors", {split: torch.from_numpy(one.astype(np.int64)) for split, one in ids.items()}
    )
    write_tensors(folder / "bytes.safetensors", {"bytes": torch.from_numpy(lengths)})
    counts |= {f"{split}_tokens": len(one) for split, one in ids.items()}
    facts: dict[str, object] = {f"{split}_sha256": digest(one) for split, one in ids.items()}
    facts |= {"vocab_size": encoder.vocab_size, "end_of_text": encoder.end, "validation": settings.validation}
    facts["hidden_bytes"] = hidden
    write_json(folder / "text.json", facts | {"counts": counts})
    return counts


def read_text_ids(folder: str | Path) -> Text:
    """Reads and checks the ids: files are those that were written together, and validation has no unseen id.

    Raises:
        FileNotFoundError: there is no text; none is made up.
        ArtifactError: train or validation was changed without the other.
        UnseenIdError: validation has an id that train does not have.
    """
    folder = Path(folder)
    for name in ("text.json", "ids.safetensors", "bytes.safetensors"):
        if not (folder / name).exists():
            raise FileNotFoundError(2, "is missing; run dvc repro stages/cvfp/dvc.yaml to make it", str(folder / name))
    known = ("vocab_size", "validation", "end_of_text", "hidden_bytes", *(f"{split}_sha256" for split in SPLITS))
    facts = read_json(folder / "text.json", *known)
    ids = read_tensors(folder / "ids.safetensors")
    for split in SPLITS:
        if split not in ids or digest(ids[split]) != facts[f"{split}_sha256"]:
            raise ArtifactError(
                f"{folder}/ids.safetensors: {split} is not what text.json was written with; train and validation are "
                "made together: run dvc repro stages/cvfp/dvc.yaml"
            )
    train = ids["train"].numpy()
    require_seen(ids["validation"].numpy(), train, f"{folder}/ids.safetensors: validation")
    token_bytes = read_tensors(folder / "bytes.safetensors")["bytes"]
    return Text(ids, facts["vocab_size"], token_bytes, facts["validation"], facts["end_of_text"], facts["hidden_bytes"])
