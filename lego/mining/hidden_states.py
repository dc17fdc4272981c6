"""The store that phase 2 reads: exit states of whole blocks in shards, with a manifest that says whose they are."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, FiniteFloat, NonNegativeInt, PositiveInt
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lego.base.artifacts import (
    ArtifactError,
    read_checked,
    read_tensors,
    sha256,
    write_facts,
    write_json,
    write_tensors,
)
from lego.base.digests import inside, verify, way_back

MANIFEST = "manifest.json"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
NUMBER_BYTES = {name: dtype.itemsize for name, dtype in DTYPES.items()}


class _Shard(BaseModel):
    model_config = ConfigDict(strict=True)
    file: str
    blocks: PositiveInt
    tokens: PositiveInt
    hard_tokens: NonNegativeInt
    shape: list[PositiveInt]
    sha256: str


class _Progress(BaseModel):
    """What a killed run had finished."""

    model_config = ConfigDict(strict=True)
    shards: list[_Shard]
    error: FiniteFloat
    norm: FiniteFloat
    confidence: FiniteFloat


class StoreWriter:
    """Writes whole blocks into shards; `close` writes the manifest. In a folder left by a killed run it continues:
    a hidden file beside the folder says which shards are whole.

    Args:
        folder: an existing folder, empty or with the finished shards of the same store.
        threshold: a token is hard if its confidence is strictly below.
        dtype: of the stored exit states: float32, float16 or bfloat16; None stores none, phase 2 computes them again.
        shard_tokens: tokens per shard, rounded up to whole batches.
    """

    def __init__(self, folder: str | Path, threshold: float, dtype: str | None, shard_tokens: int) -> None:
        self.folder, self.threshold, self.dtype, self.shard_tokens = Path(folder), threshold, dtype, shard_tokens
        self.pending: list[dict[str, Tensor]] = []
        self.shards: list[dict[str, Any]] = []
        self.error = self.norm = self.confidence = 0.0
        self.progress = self.folder.with_name(f".{self.folder.name}.progress.json")
        if self.progress.exists():
            self._continue()

    def _continue(self) -> None:
        """Takes up what a killed run had finished, if all of it is as that run wrote it."""
        try:
            done = _Progress.model_validate(read_checked(self.progress, _Progress))
            files = [inside(self.folder, shard.file, self.progress) for shard in done.shards]
        except ArtifactError:
            print(f"{self.progress}: is damaged, so mining starts afresh", flush=True)
            return
        if not all(file.exists() for file in files):  # they were published
            return
        for file, shard in zip(files, done.shards, strict=True):
            if sha256(file) != shard.sha256:  # the sums below count every shard: none can be left out
                print(f"{file}: is damaged, so mining starts afresh", flush=True)
                return
        self.shards = [shard.model_dump() for shard in done.shards]
        self.error, self.norm, self.confidence = done.error, done.norm, done.confidence

    @property
    def blocks(self) -> int:
        """Blocks in finished shards."""
        return sum(shard["blocks"] for shard in self.shards)

    def add(self, inputs: Tensor, targets: Tensor, states: Tensor, confidences: Tensor) -> None:
        """Takes blocks: ids (B, T), targets (B, T), exit states (B, T, D), confidences (B, T).

        Raises:
            ArtifactError: an exit state does not fit the dtype.
        """
        hard = confidences < self.threshold
        self.confidence += confidences[hard].double().sum().item()
        tensors = {"inputs": inputs.int(), "targets": targets.int(), "confidences": confidences, "hard": hard}
        self.pending.append(tensors | ({} if self.dtype is None else {"exit_states": self._stored(states)}))
        if sum(batch["hard"].numel() for batch in self.pending) >= self.shard_tokens:
            self._flush()

    def _stored(self, states: Tensor) -> Tensor:
        """Exit states in the store's dtype, whose rounding is summed up."""
        stored = states.to(DTYPES[self.dtype or "float32"])
        if not torch.isfinite(stored).all():
            raise ArtifactError(
                f"params.yaml: ashem.store_dtype {self.dtype} cannot hold an exit state of magnitude "
                f"{states.abs().max():g}; use float32 or bfloat16"
            )
        self.error += (stored.double() - states.double()).square().sum().item()
        self.norm += states.double().square().sum().item()
        return stored

    def _flush(self) -> None:
        if not self.pending:
            return
        tensors = {name: torch.cat([batch[name] for batch in self.pending]) for name in self.pending[0]}
        name = f"shard-{len(self.shards):05d}.safetensors"
        write_tensors(self.folder / name, tensors)
        self.shards.append(
            {
                "file": name,
                "blocks": len(tensors["hard"]),
                "tokens": tensors["hard"].numel(),
                "hard_tokens": int(tensors["hard"].sum()),
                "shape": list(tensors["inputs" if self.dtype is None else "exit_states"].shape),
                "sha256": sha256(self.folder / name),
            }
        )
        self.pending = []
        sums = {"error": self.error, "norm": self.norm, "confidence": self.confidence}
        write_facts(self.progress, {"shards": self.shards, **sums})

    def close(self, **origin: Any) -> dict[str, Any]:
        """Writes and returns the manifest.

        Args:
            **origin: whose states these are: split, block1_sha256, tokenizer_sha256, ...

        Raises:
            ArtifactError: no token is hard.
        """
        self._flush()
        hard = sum(shard["hard_tokens"] for shard in self.shards)
        if not hard:
            raise ArtifactError(
                f"no hard token: no confidence lies below the threshold {self.threshold:g}; "
                "raise ashem.hard_example_ratio in params.yaml"
            )
        manifest = {
            "shards": self.shards,
            "tokens": sum(shard["tokens"] for shard in self.shards),
            "hard_tokens": hard,
            "dtype": self.dtype,
            "threshold": self.threshold,
            "relative_error": (self.error / self.norm) ** 0.5 if self.norm else 0.0,
            "mean_hard_confidence": self.confidence / hard,
            **origin,
        }
        write_json(self.folder / MANIFEST, manifest)
        return manifest


class _Manifest(BaseModel):
    """What the reader relies on; the writer adds more."""

    model_config = ConfigDict(strict=True)
    shards: list[_Shard]
    hard_tokens: NonNegativeInt
    threshold: FiniteFloat
    split: str
    macs: NonNegativeInt
    block1_sha256: str
    tokenizer_sha256: str


class HiddenStateStore:
    """A store on disk, read one shard at a time.

    Args:
        folder: what collect_hard wrote, data/hard.

    Raises:
        ArtifactError: the manifest is missing, damaged or incomplete.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.manifest = read_checked(self.folder / MANIFEST, _Manifest)
        self.shards: list[dict[str, Any]] = self.manifest["shards"]
        self.masks: list[Tensor] | None = None
        self.compute: Callable[[Tensor], Tensor] | None = None
        self.hard_tokens: int = self.manifest["hard_tokens"]
        self.threshold: float = self.manifest["threshold"]
        counted = sum(shard["hard_tokens"] for shard in self.shards)
        if counted != self.hard_tokens or not counted:
            file = self.folder / MANIFEST
            raise ArtifactError(f"{file}: its counts disagree; {way_back(file)}")

    def verify(self, block1_sha256: str, tokenizer_sha256: str) -> None:
        """Makes sure the store is whole and was made by this block 1 and tokenizer.

        Raises:
            ArtifactError: another block 1 or tokenizer made it, or a shard is missing or was changed.
        """
        for what, wanted in (("block1", block1_sha256), ("tokenizer", tokenizer_sha256)):
            if self.manifest.get(f"{what}_sha256") != wanted:
                raise ArtifactError(f"{self.folder}: was made by another {what}; run dvc repro collect_hard")
        for shard in self.shards:
            file = inside(self.folder, shard["file"], self.folder / MANIFEST)
            if not verify(file) and sha256(file) != shard["sha256"]:
                raise ArtifactError(f"{file}: was changed; {way_back(file)}")

    def require_layer(self, layer: int | None) -> None:
        """Makes sure that it holds the outputs of this layer of block 1, None being its exit.

        Raises:
            ArtifactError: they are another layer's.
        """
        if self.manifest.get("layer") != layer:
            what = "holds states of another layer than ashem.branch_layer"
            raise ArtifactError(f"{self.folder}: {what}; run dvc repro collect_hard")

    def selecting(self, masks: list[Tensor]) -> HiddenStateStore:
        """The same states with other tokens in the place of the hard ones.

        Args:
            masks: per shard (b, T), true for the tokens.

        Raises:
            ArtifactError: none is true.
        """
        view = copy.copy(self)
        counts = [int(mask.sum()) for mask in masks]
        view.masks, view.hard_tokens = masks, sum(counts)
        view.shards = [shard | {"hard_tokens": n} for shard, n in zip(self.shards, counts, strict=True)]
        if not view.hard_tokens:
            raise ArtifactError(f"{self.folder}: no token is selected")
        return view

    @property
    def kept(self) -> bool:
        """Whether it holds all that block 2 reads, as `Reached.packed`, and not the states alone."""
        return bool(self.manifest.get("keys_values"))

    @property
    def online(self) -> bool:
        """Whether it holds no exit states, so that `compute` must make them of inputs (b, T)."""
        return self.manifest["dtype"] is None

    def states(self, shard: dict[str, Tensor], places: Tensor | slice = slice(None)) -> Tensor:
        """Exit states (b, T, D) of some of a shard's blocks, stored or made anew.

        Raises:
            ArtifactError: there are none, and nothing to make them with.
        """
        if not self.online:
            return shard["exit_states"][places]
        if self.compute is None:
            raise ArtifactError(f"{self.folder}: holds no exit states (ashem.states online); give it a model")
        return self.compute(shard["inputs"][places].long())

    def read_shard(self, index: int) -> dict[str, Tensor]:
        """Whole blocks: inputs, targets, confidences, hard (b, T) and, if stored, exit_states (b, T, D) as stored."""
        shard = read_tensors(inside(self.folder, self.shards[index]["file"], self.folder / MANIFEST))
        return shard if self.masks is None else shard | {"hard": self.masks[index]}

    def hard_counts(self, index: int) -> Tensor:
        """Hard tokens (b,) of each block of a shard, without reading its states.

        Raises:
            ArtifactError: the shard cannot be read.
        """
        if self.masks is not None:
            return self.masks[index].sum(dim=1)
        file = inside(self.folder, self.shards[index]["file"], self.folder / MANIFEST)
        verify(file)
        try:
            with safe_open(file, "pt") as shard:
                return shard.get_tensor("hard").sum(dim=1)
        except (OSError, SafetensorError) as error:
            raise ArtifactError(f"{file}: cannot be read as safetensors ({error}); {way_back(file)}") from None

    def hard_examples(self, index: int) -> dict[str, Tensor]:
        """The flattened view of one shard's hard tokens, as collect_hard_examples returns it (float32)."""
        if self.kept:
            raise ArtifactError(f"{self.folder}: holds keys and values too, which lone tokens do not read")
        shard = self.read_shard(index)
        hard = shard["hard"]
        return {
            "inputs": shard["inputs"][hard].long(),  # (n,)
            "hidden_states": self.states(shard)[hard].float(),  # (n, D)
            "targets": shard["targets"][hard].long(),  # (n,)
            "confidences": shard["confidences"][hard],  # (n,)
        }
