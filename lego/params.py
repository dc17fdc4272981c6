"""Typed, validated configuration: the one reader of params.yaml.

python -m lego.params            checks params.yaml and says what is wrong with it
"""

from __future__ import annotations

import difflib
import re
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

SCIENTIFIC = re.compile(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+")


class ParamsError(ValueError):
    """A parameter file that cannot be used; the message names file, key and remedy."""


def _from_scientific(value: object) -> object:
    """DVC writes 1e-05, which YAML 1.1 reads as a string; every other string stays one and is rejected."""
    return float(value) if isinstance(value, str) and SCIENTIFIC.fullmatch(value) else value


def _within(interval: str) -> AfterValidator:
    """Range check written as in mathematics: "(0, 1]" excludes 0 and includes 1."""
    low, high = (float(end) for end in interval[1:-1].split(","))

    def check(value: float) -> float:
        above = value > low if interval[0] == "(" else value >= low
        below = value < high if interval[-1] == ")" else value <= high
        if not (above and below):
            raise ValueError(f"must be in {interval}")
        return value

    return AfterValidator(check)


def _at_least(low: int, high: int = 10**12) -> AfterValidator:
    def check(value: int) -> int:
        if value < low:
            raise ValueError(f"must be at least {low}")
        if value > high:
            raise ValueError(f"must be at most {high:,}")
        return value

    return AfterValidator(check)


Number = Annotated[float, BeforeValidator(_from_scientific)]
Positive = Annotated[Number, _within("(0, inf)")]
NonNegative = Annotated[Number, _within("[0, inf)")]
Share = Annotated[Number, _within("(0, 1)")]
Count = Annotated[int, _at_least(1)]
CountOrZero = Annotated[int, _at_least(0)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class DataParams(Section):
    source: Literal["python-stdlib", "text", "hub"]
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
    vocab_size: Annotated[int, _at_least(257, 2**24)]  # 256 bytes and end-of-text
    max_tokenizer_bytes: Count
    max_ngram_tokens: Count
    max_train_tokens: Count
    max_validation_tokens: Count
    max_calibration_tokens: Count
    max_test_tokens: Count
    validation_share: Share
    calibration_share: Share
    test_share: Share

    @model_validator(mode="after")
    def _some_train_text(self) -> DataParams:
        held_out = self.validation_share + self.calibration_share + self.test_share
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
    seq_len: Annotated[int, _at_least(2, 2**20)]
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
    min_lr_ratio: Annotated[Number, _within("[0, 1]")]
    weight_decay: NonNegative
    beta1: Annotated[Number, _within("[0, 1)")]
    beta2: Annotated[Number, _within("[0, 1)")]
    grad_clip: NonNegative
    precision: Literal["fp32", "bf16"]
    compile: bool
    device: Literal["auto", "cpu", "cuda", "mps"]
    threads: Annotated[int, _at_least(1, 4096)]


class AshemParams(Section):
    phase1_layers: Count
    phase1_lr: Positive
    phase1_epochs: CountOrZero
    phase1_patience: Count
    hard_example_ratio: Share
    hard_split: Literal["train", "validation"]
    phase2_text: Literal["fresh", "same"]
    phase2_share: Annotated[Number, _within("[0, 1)")]
    phase2_layers: Count
    phase2_lr: Positive
    phase2_epochs: Count
    phase2_patience: Count
    phase2_context: Literal["token", "sequence", "historic"]
    init_new_layers: Literal["copy", "zero", "random"]
    head: Literal["shared", "own", "shared_trainable"]
    store_dtype: Literal["float32", "float16", "bfloat16"]
    shard_tokens: Count

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
    hard_ratio: Annotated[Number, _within("[0, 1]")] | None
    epsilon: Positive
    delta: Share
    risk_unit: Literal["block", "document"]
    risk_clip: Positive
    risk_candidates: Annotated[int, _at_least(1, 10_000)]
    otherwise: Literal["stop", "always_deep"]
    gain_width: Annotated[int, _at_least(0, 2**16)]
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
    sweep_points: Annotated[int, _at_least(2)]
    latency_repeats: Annotated[int, _at_least(0, 10_000)]


def pretrained_tokenizer(data: DataParams, init_from: str | None) -> tuple[str, str] | None:
    """Its name or folder and the key that says so, model.init_from by default; None = one is fitted to the text."""
    if data.tokenizer == "pretrained" and data.pretrained:
        return data.pretrained, "data.pretrained"
    return (init_from, "model.init_from") if init_from else None


class Params(Section):
    """The whole of params.yaml, one attribute per section."""

    seed: Annotated[int, Field(ge=0, lt=2**63)]
    data: DataParams
    model: ModelParams
    train: TrainParams
    ashem: AshemParams
    exits: ExitsParams
    yardstick: YardstickParams
    routing: RoutingParams
    evaluation: EvaluationParams

    @model_validator(mode="after")
    def _given_or_trained(self) -> Params:
        if self.data.tokenizer == "pretrained" and not pretrained_tokenizer(self.data, self.model.init_from):
            raise ValueError("data.pretrained must name a tokenizer or its folder when data.tokenizer is pretrained")
        if not self.ashem.phase1_epochs and not self.model.init_from:
            raise ValueError(
                "ashem.phase1_epochs must be at least 1 unless model.init_from names a trained model, got 0"
            )
        return self


def _known_keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    keys = []
    for name, field in model.model_fields.items():
        keys.append(prefix + name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            keys += _known_keys(field.annotation, f"{prefix}{name}.")
    return keys


def _sentence(error: Any) -> str:
    """One pydantic error as `key does what is wrong, got value`."""
    key, value = ".".join(str(part) for part in error["loc"]), error["input"]
    shown = "nothing" if value is None else repr(value)
    match error["type"]:
        case "missing":
            return f"{key} is missing"
        case "extra_forbidden":
            close = difflib.get_close_matches(key, _known_keys(Params), n=1)
            return f"{key} is not a known key" + (f"; did you mean {close[0]}?" if close else "")
        case "value_error" if isinstance(value, dict):  # a check across several keys names them itself
            return f"{key}.{error['ctx']['error']}".removeprefix(".")
        case "value_error":
            return f"{key} {error['ctx']['error']}, got {shown}"
        case "literal_error":
            return f"{key} must be one of {error['ctx']['expected']}, got {shown}"
        case "int_type":
            return f"{key} must be a whole number, got {shown}"
        case "float_type":
            return f"{key} must be a number, got {shown}"
        case "string_type":
            return f"{key} must be text, got {shown}"
        case "bool_type":
            return f"{key} must be true or false, got {shown}"
        case "model_type" | "dict_type" | "model_attributes_type":
            return f"{key} must be a section of keys, got {shown}"
        case _:
            return f"{key}: {error['msg']}, got {shown}"


class _RepeatedKeyError(ValueError):
    pass


class _Loader(yaml.SafeLoader):
    """YAML that refuses what it otherwise lets pass: a key that is given twice, of which the last one would win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for number, key in enumerate(keys):
            if key in keys[:number]:
                line = node.value[number][0].start_mark.line + 1
                raise _RepeatedKeyError(f"{key} is given twice, again at line {line}; remove one")
        return super().construct_mapping(node, deep)


def load_params(path: str | Path = "params.yaml") -> Params:
    """Reads and checks a parameter file.

    Args:
        path: a YAML file with every key of `Params`; `1e-05` is read as a number.

    Raises:
        ParamsError: unreadable file, unknown or missing key, wrong type or range; the message names file and key.
    """
    try:
        raw = yaml.load(Path(path).read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise ParamsError(f"{path}: cannot be read ({error.strerror}); run from the repository root") from None
    except _RepeatedKeyError as error:
        raise ParamsError(f"{path}: {error}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        where = getattr(error, "problem_mark", None)
        line = f" at line {where.line + 1}" if where else ""
        raise ParamsError(f"{path}: is not valid YAML{line}") from None
    if not isinstance(raw, dict):
        raise ParamsError(f"{path}: must hold the sections {', '.join(Params.model_fields)}")
    try:
        return Params.model_validate(raw)
    except ValidationError as error:
        raise ParamsError("; ".join(f"{path}: {_sentence(e)}" for e in error.errors())) from None


def main() -> int:
    try:
        print(load_params().model_dump_json(indent=2))
    except ParamsError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
