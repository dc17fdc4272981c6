"""The sections of params.yaml, typed and with their ranges; lego.params reads the file."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, model_validator

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


def _some_factors(values: list[float]) -> list[float]:
    if not values or len(set(values)) < len(values):
        raise ValueError("must name at least one factor, each once")
    return values


RESERVED = {"ashem", "shallow_continued", "shallow"}  # what the pipeline itself is called beside its baselines


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
            re.compile(self.split_on or "")
        except (re.error, OverflowError, RecursionError) as error:
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
    schedule: Literal["cosine", "constant"]
    warmup_steps: CountOrZero
    min_lr_ratio: Annotated[Number, within("[0, 1]")]
    weight_decay: NonNegative
    beta1: Annotated[Number, within("[0, 1)")]
    beta2: Annotated[Number, within("[0, 1)")]
    grad_clip: NonNegative
    precision: Literal["fp32", "bf16"]
    compile: bool
    device: Literal["auto", "cpu", "cuda", "mps"]
    threads: Annotated[int, at_least(1, 4096)]


class AshemParams(Section):
    phase1_layers: Count
    phase1_lr: Positive
    phase1_epochs: CountOrZero
    phase1_patience: Count
    hard_example_ratio: Share
    hard_split: Literal["train", "validation"]
    phase2_text: Literal["fresh", "same"]
    phase2_share: Annotated[Number, within("[0, 1)")]
    phase2_split: Literal["blocks", "documents"]
    phase2_layers: Count
    phase2_lr: Positive
    phase2_epochs: Count
    phase2_patience: Count
    phase2_context: Literal["token", "sequence", "historic"]
    init_new_layers: Literal["copy", "zero", "random"]
    head: Literal["shared", "own", "shared_trainable"]
    replay_share: Annotated[Number, within("[0, 1)")]
    store_dtype: Literal["float32", "float16", "bfloat16"]
    shard_tokens: Count

    @property
    def new_layers(self) -> int:
        """Layers that phase 2 puts on top of block 1."""
        return self.phase2_layers - self.phase1_layers

    @model_validator(mode="after")
    def _two_blocks(self) -> AshemParams:
        if self.phase2_layers <= self.phase1_layers:
            raise ValueError(
                f"phase2_layers is the total depth and must be greater than phase1_layers = {self.phase1_layers}, "
                f"got {self.phase2_layers}"
            )
        if self.phase2_text == "fresh" and self.phase2_share == 0:
            raise ValueError("phase2_share must be in (0, 1) when phase2_text is fresh, got 0")
        return self


class YardstickParams(Section):
    lr: Positive


class ExitsParams(Section):
    fit_share: Share
    probe_l2: Positive


class RoutingParams(Section):
    criterion: Literal["max_prob", "margin", "entropy", "probe", "gain"]
    calibration: Literal["quantile", "risk"]
    hard_ratio: Annotated[Number, within("[0, 1]")] | None
    epsilon: Positive
    delta: Share
    risk_unit: Literal["block", "document"]
    risk_clip: Positive
    risk_candidates: Annotated[int, at_least(1, 10_000)]
    otherwise: Literal["stop", "always_deep"]
    gain_width: Annotated[int, at_least(0, 2**16)]
    gain_l2: Positive

    @model_validator(mode="after")
    def _risk_can_exceed_epsilon(self) -> RoutingParams:
        if self.epsilon >= self.risk_clip:
            raise ValueError(
                f"epsilon must be below risk_clip = {self.risk_clip:g}, which no loss exceeds, got {self.epsilon:g}"
            )
        return self


class EvaluationParams(Section):
    batch_size: Count
    sweep_points: Annotated[int, at_least(2)]
    latency_repeats: Annotated[int, at_least(0, 10_000)]


def pretrained_tokenizer(data: DataParams, init_from: str | None) -> tuple[str, str] | None:
    """Its name or folder and the key that says so, model.init_from by default; None = one is fitted to the text."""
    if data.tokenizer == "pretrained" and data.pretrained:
        return data.pretrained, "data.pretrained"
    return (init_from, "model.init_from") if init_from else None


class SearchParams(Section):
    lr_factors: Annotated[list[Positive], AfterValidator(_some_factors)]


class JointParams(Section):
    """A baseline whose layers are all trained on all tokens."""

    budget: Literal["total", "added"]
    start: Literal["scratch", "block1", "grown"]
    depth: Literal["shallow", "middle", "full"]
    widened: bool
    exits: Literal["last", "both"]
    lr: Positive

    @model_validator(mode="after")
    def _possible(self) -> JointParams:
        given = self.start != "scratch"
        if given != (self.budget == "added"):
            raise ValueError(f"budget must be {'added' if given else 'total'} when start is {self.start}")
        if (self.start == "block1" and self.depth != "shallow") or (self.start == "grown" and self.depth == "shallow"):
            raise ValueError(f"depth {self.depth} does not go with start {self.start}")
        if self.widened and given:
            raise ValueError(f"widened must be false when start is {self.start}")
        if self.exits == "both" and self.depth == "shallow":
            raise ValueError("exits must be last when depth is shallow")
        return self


class Block2Params(Section):
    """A baseline that is phase 2 on other tokens, or by the historical protocol."""

    select: Literal["hard", "all", "random", "easy", "high_loss", "reducible_loss", "expected_gain", "sequence_level"]
    protocol: Literal["ashem", "historic", "unfreeze"]
    lr: Positive

    @model_validator(mode="after")
    def _possible(self) -> Block2Params:
        if self.protocol != "ashem" and self.select != "hard":
            raise ValueError(f"select must be hard when protocol is {self.protocol}, got {self.select}")
        return self


class SelectionParams(Section):
    reference_dim: Count
    reference_layers: Count
    reference_share: Share
    first_round: Share
    unfrozen_end: Share


class BaselinesParams(Section):
    joint: dict[str, JointParams]
    block2: dict[str, Block2Params]
    selection: SelectionParams

    @model_validator(mode="after")
    def _names(self) -> BaselinesParams:
        names = [*self.joint, *self.block2]
        for name in names:
            if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
                raise ValueError(f"names must be of letters a-z, digits and _, got {name!r}")
            if names.count(name) > 1 or name in RESERVED:
                raise ValueError(f"name {name} is taken; choose another")
        return self
