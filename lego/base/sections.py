"""Ranges of parameters, and the sections of params.yaml that any model has: text, sizes, training.

Those of the method are in lego/base/ashem_sections.py; lego/base/params.py reads the file.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, model_validator

from lego.base.patterns import compiled

SCIENTIFIC = re.compile(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+")


def _from_scientific(value: object) -> object:
    """DVC writes 1e-05, which YAML 1.1 reads as a string; every other string stays one and is rejected."""
    return float(value) if isinstance(value, str) and SCIENTIFIC.fullmatch(value) else value


def within(interval: str) -> AfterValidator:
    """Range check written as in mathematics: "(0, 1]" excludes 0 and includes 1."""
    low, high = (float(end) for end in interval[1:-1].split(","))

    def check(value: float) -> float:
        above = value > low if interval[0] == "(" else value >= low
        below = value < high if interval[-1] == ")" else value <= high
        if not (above and below):
            raise ValueError(f"must be in {interval}")
        return value

    return AfterValidator(check)


def at_least(low: int, high: int = 10**12) -> AfterValidator:
    def check(value: int) -> int:
        if value < low:
            raise ValueError(f"must be at least {low}")
        if value > high:
            raise ValueError(f"must be at most {high:,}")
        return value

    return AfterValidator(check)


Number = Annotated[float, BeforeValidator(_from_scientific)]
Positive = Annotated[Number, within("(0, inf)")]
NonNegative = Annotated[Number, within("[0, inf)")]
Share = Annotated[Number, within("(0, 1)")]
Unit = Annotated[Number, within("[0, 1]")]
Count = Annotated[int, at_least(1)]
CountOrZero = Annotated[int, at_least(0)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class DataParams(Section):
    source: Literal["python-stdlib", "text", "hub"]
    stdlib_tests: bool
    path: str
    column: str
    split_on: str | None
    hub_name: str | None
    hub_config: str | None
    hub_split: str
    hub_revision: str | None
    streaming: bool
    near_duplicates: Literal["keep", "drop"]
    near_duplicate_similarity: Share
    tokenizer: Literal["bpe", "word", "pretrained"]
    pretrained: str | None
    vocab_size: Annotated[int, at_least(257, 2**24)]  # 256 bytes and end-of-text
    max_tokenizer_bytes: Count
    max_ngram_tokens: Count
    max_train_tokens: Count
    max_validation_tokens: Count
    max_calibration_tokens: Count
    max_test_tokens: Count
    validation_share: Share
    calibration_share: Share
    test_share: Share

    @property
    def held_out_shares(self) -> dict[str, float]:
        """Share of the documents by split, without train, which has the rest."""
        return {
            "validation": self.validation_share,
            "calibration": self.calibration_share,
            "test": self.test_share,
        }

    @model_validator(mode="after")
    def _some_train_text(self) -> DataParams:
        held_out = sum(self.held_out_shares.values())
        if held_out >= 1:
            raise ValueError(
                f"validation_share + calibration_share + test_share must be below 1 to leave train text, "
                f"got {held_out:g}"
            )
        return self

    @model_validator(mode="after")
    def _complete(self) -> DataParams:
        place = Path(self.path)
        if not place.parts or place.parts[0] in {"~", "data", "metrics"}:
            raise ValueError(
                "path must name a file or folder outside data/ and metrics/, which the pipeline writes itself, "
                f"got {self.path!r}"
            )
        if self.source == "hub" and not self.hub_name:
            raise ValueError("hub_name must name a dataset when data.source is hub, got nothing")
        try:
            compiled(self.split_on or "")
        except ValueError as error:
            raise ValueError(f"split_on must be a regular expression ({error}), got {self.split_on!r}") from None
        return self


class ModelParams(Section):
    dim: Count
    num_heads: Count
    num_kv_heads: Count
    ffn_dim: Count
    seq_len: Annotated[int, at_least(2, 2**20)]
    tie_embeddings: bool
    rope_theta: Positive
    norm_eps: Positive
    init_std: Positive
    init_from: str | None
    init_layers: Literal["all", "phase1_layers"]

    @model_validator(mode="after")
    def _heads_fit(self) -> ModelParams:
        if self.dim % (2 * self.num_heads):
            raise ValueError(
                f"dim must be a multiple of 2 * num_heads = {2 * self.num_heads}, as rotary positions turn pairs; "
                f"got {self.dim}"
            )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_kv_heads must divide num_heads = {self.num_heads}, got {self.num_kv_heads}")
        return self


class TrainParams(Section):
    batch_size: Count
    grad_accumulation: Count
    tokens_per_epoch: Count
    optimizer: Literal["adamw", "muon"]
    adamw_lr_ratio: Positive
    schedule: Literal["cosine", "constant", "wsd"]
    warmup_steps: CountOrZero
    min_lr_ratio: Annotated[Number, within("[0, 1]")]
    decay_share: Annotated[Number, within("(0, 1]")]
    weight_decay: NonNegative
    beta1: Annotated[Number, within("[0, 1)")]
    beta2: Annotated[Number, within("[0, 1)")]
    grad_clip: NonNegative
    precision: Literal["fp32", "bf16"]
    compile: bool
    device: Literal["auto", "cpu", "cuda", "mps"]
    threads: Annotated[int, at_least(1, 4096)]


def pretrained_tokenizer(data: DataParams, init_from: str | None) -> tuple[str, str] | None:
    """Its name or folder and the key that says so, model.init_from by default; None = one is fitted to the text."""
    if data.tokenizer == "pretrained" and data.pretrained:
        return data.pretrained, "data.pretrained"
    return (init_from, "model.init_from") if init_from else None
