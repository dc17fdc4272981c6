"""The sections of stages/satipatthana/params.yaml that one system is made by: data, parts, stages, when it abstains.

`lego.satipatthana.sections` has the whole file.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field, PlainValidator, model_validator

from lego.base.sections import (
    SCIENTIFIC,
    Count,
    CountOrZero,
    NonNegative,
    Number,
    Positive,
    Section,
    Share,
    Unit,
    at_least,
    within,
)

Cosine = Annotated[Number, within("[-1, 1]")]
Attention = Literal["soft", "hard"]
PATHS = ("clean", "augmented", "drunk", "mismatch", "void")
Job = Literal["classification", "regression", "anomaly"]
VoidKind = Literal[
    "gaussian",
    "uniform",
    "filtered_uniform",
    "mixup",
    "cut_paste",
    "patch_permutation",
    "feature_shuffle",
    "time_warp",
    "anomalies",
    "file",
]


class TaskParams(Section):
    """Which data are learned."""

    name: Literal["digits", "breast_cancer", "wine", "diabetes", "sensors", "table"]
    job: Job
    anomalies: list[str]
    known: list[str]
    unlabelled: bool
    strangers: str | None
    file: str | None
    label: str | None
    test_share: Share
    validation_share: Share

    @model_validator(mode="after")
    def _has_a_file(self) -> TaskParams:
        if self.name == "table" and not (self.file and self.label):
            raise ValueError("file and label must name a CSV or Parquet file and its column when task.name is table")
        return self

    @model_validator(mode="after")
    def _suits_the_job(self) -> TaskParams:
        if (self.name == "diabetes") != (self.job == "regression") and self.name != "table":
            raise ValueError(f"job must not be {self.job} when task.name is {self.name}")
        if self.job != "anomaly" and (self.anomalies or self.known or self.unlabelled):
            raise ValueError("anomalies, known and unlabelled must be empty or false unless task.job is anomaly")
        if strange := [name for name in self.known if name not in self.anomalies]:
            raise ValueError(f"known must be among task.anomalies, which {', '.join(strange)} is not")
        if self.unlabelled and self.known:
            raise ValueError("known must be empty when task.unlabelled is true: rows without labels are not known")
        return self


class SystemParams(Section):
    """Size, and what the system is asked for."""

    dim: Annotated[int, at_least(2, 4096)]
    guided: bool


class AdapterParams(Section):
    """What turns an input into a latent vector (specification, 3.1)."""

    kind: Literal["mlp", "cnn", "lstm", "transformer", "identity"]
    hidden: Count
    layers: Count
    heads: Count
    dropout: Annotated[Number, within("[0, 1)")]

    @model_validator(mode="after")
    def _heads_fit(self) -> AdapterParams:
        if self.kind == "transformer" and self.hidden % self.heads:
            raise ValueError(
                f"hidden must be a multiple of heads for the kind transformer, got {self.hidden} and {self.heads}"
            )
        return self


class AugmenterParams(Section):
    """Noise of a known severity (3.2)."""

    kind: Literal["identity", "gaussian"]
    max_noise_std: NonNegative
    per_sample: bool


def _gate(value: object) -> object:
    """A cosine, or `learned`; in one validator, as a message of a union would name its branches."""
    if isinstance(value, str) and SCIENTIFIC.fullmatch(value):
        value = float(value)
    number = float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
    if value != "learned" and not -1 <= number <= 1:
        raise ValueError("must be learned, or in [-1, 1]")
    return value if value == "learned" else number


class VitakkaParams(Section):
    """Probes that give the state a start (3.3)."""

    n_probes: Annotated[int, at_least(2, 4096)]
    probe_trainable: bool
    mix_alpha: Unit
    softmax_temp: Positive
    training_gate_threshold: Cosine
    inference_gate_threshold: Annotated[float | Literal["learned"], PlainValidator(_gate)]
    known_share: Share
    closed_gate: Literal["zeroes", "is_told"]
    attention_training: Attention
    attention_inference: Attention
    frozen_as: Literal["inference", "training"]
    init: Literal["random", "k_means"]
    normalize_on_read: bool


class VicaraParams(Section):
    """The update map (3.4)."""

    inertia: Annotated[Number, within("[0, 1)")]
    inject: bool
    rho: Annotated[Number, within("(0, 1)")]
    kind: Literal["standard", "probe_mixed", "probe_picked", "none"]


class SatiParams(Section):
    """When a state has settled (3.5)."""

    kind: Literal["fixed", "threshold"]
    per_sample: bool
    eps_abs: NonNegative
    eps_rel: NonNegative
    min_steps: Count


class SamathaParams(Section):
    """The loop, and how it is damaged on purpose (6.2)."""

    max_steps: Annotated[int, at_least(2, 10_000)]
    drunk_skip_prob: Unit
    drunk_perturbation_std: NonNegative
    drunk_s0_std: NonNegative
    drunk_dropout_min: Annotated[Number, within("[0, 1)")]
    drunk_per_sample: bool


class VipassanaParams(Section):
    """What looks at the way the state took (3.7)."""

    trust_features: Literal["dynamics2", "grounded8"]
    velocity: Literal["last_step", "whole_way"]
    hidden: Count
    context_dim: Count
    context_hidden: Count
    gru_hidden: Count
    metric_proj: Count
    prototypes: CountOrZero
    trust_limit: Positive
    weight_trust: NonNegative
    weight_conformity: NonNegative
    weight_confidence: NonNegative


class HeadsParams(Section):
    """Decoder, reconstruction and guidance (3.8)."""

    decoder_hidden: Count
    recon_hidden: Count
    aux_hidden: Count
    output_activation: Literal["none", "tanh"]
    bounded_context: bool


class StageParams(Section):
    """How one stage of the curriculum trains (5)."""

    epochs: Count
    lr: Positive
    batch_size: Annotated[int, at_least(2, 10**6)]
    grad_clip: Positive
    patience: CountOrZero


class Stage1Params(StageParams):
    noise_level: Unit
    weight_stability: NonNegative
    weight_recon: NonNegative
    weight_guidance: NonNegative
    weight_diversity: NonNegative
    weight_usage: NonNegative
    squared_diversity: bool


class Stage2Params(StageParams):
    noise_level: Unit
    void_target: Annotated[Number, within("[0, 1)")]
    mismatch: Literal["derangement", "permutation"]
    correctness: bool


class PathsParams(Section):
    """Shares of the rows of a batch in stage 2 (6.1)."""

    clean: Share
    augmented: Annotated[Number, within("[0, 1)")]
    drunk: Annotated[Number, within("[0, 1)")]
    mismatch: Annotated[Number, within("[0, 1)")]
    void: Annotated[Number, within("[0, 1)")]

    @model_validator(mode="after")
    def _sum_to_one(self) -> PathsParams:
        total = sum(getattr(self, path) for path in PATHS)
        if abs(total - 1) > 1e-6 and (self.void or total > 1):
            raise ValueError(f"{', '.join(PATHS)} must sum to 1, got {total:g}")
        return self

    def shares(self) -> dict[str, float]:
        """Those above 0, in their order; where void is 0, clean and augmented rows inherit its share (section 7)."""
        found = {path: getattr(self, path) for path in PATHS if getattr(self, path)}
        left, heirs = 1 - sum(found.values()), [path for path in ("clean", "augmented") if path in found]
        return found | {path: found[path] + left / len(heirs) for path in heirs}


class VoidParams(Section):
    """What counts as outside of the data, while training (6.4)."""

    kinds: Annotated[list[VoidKind], Field(min_length=1)]
    min_distance: NonNegative
    reference_rows: Count
    max_attempts: Count


class TestParams(Section):
    """Out-of-distribution kinds that are held back for the test; none may be used in training."""

    kinds: list[str]
    ood_seed: CountOrZero


class RejectParams(Section):
    """How the threshold of trust is chosen on validation data."""

    rule: Literal["coverage", "risk", "conformal"]
    wanted: Share
    tolerance: Positive
    calibration: Literal["none", "temperature", "isotonic"]
