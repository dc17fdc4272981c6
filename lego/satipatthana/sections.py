"""The sections of stages/satipatthana/params.yaml, typed and with their ranges, and the profiles that change them.

python -m lego.satipatthana.sections            checks the file and says what is wrong with it
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationError, model_validator

from lego.params import ParamsError, read_params
from lego.sections import Count, CountOrZero, NonNegative, Number, Positive, Section, Share, at_least, within

WRITTEN = "stages/satipatthana/params.yaml stages/satipatthana/dvc.lock metrics/satipatthana"
PARAMS, PROFILES = Path("stages/satipatthana/params.yaml"), Path("stages/satipatthana/profiles.yaml")
Unit = Annotated[Number, within("[0, 1]")]
Cosine = Annotated[Number, within("[-1, 1]")]
Attention = Literal["soft", "hard"]
PATHS = ("clean", "augmented", "drunk", "mismatch", "void")
VOID_KINDS = ("gaussian", "uniform", "filtered_uniform", "mixup", "cut_paste", "patch_permutation", "feature_shuffle")
VoidKind = Literal[
    "gaussian", "uniform", "filtered_uniform", "mixup", "cut_paste", "patch_permutation", "feature_shuffle"
]
TEST_KINDS = ("near", "gauss_matched", "uniform", "pixel_perm", "inverted", "noisy_0.5")


class TaskParams(Section):
    """Which data are learned."""

    name: Literal["digits", "breast_cancer", "wine", "sensors", "table"]
    file: str | None
    label: str | None
    test_share: Share
    validation_share: Share

    @model_validator(mode="after")
    def _has_a_file(self) -> TaskParams:
        if self.name == "table" and not (self.file and self.label):
            raise ValueError("file and label must name a CSV or Parquet file and its column when task.name is table")
        return self


class SystemParams(Section):
    """Size, and what the system is asked for."""

    dim: Annotated[int, at_least(2, 4096)]
    guided: bool
    job: Literal["classification", "regression", "anomaly"]


class AdapterParams(Section):
    """What turns an input into a latent vector (specification, 3.1)."""

    kind: Literal["mlp", "cnn", "lstm", "transformer", "identity"]
    hidden: Count
    layers: Count
    heads: Count
    dropout: Annotated[Number, within("[0, 1)")]


class AugmenterParams(Section):
    """Noise of a known severity (3.2)."""

    kind: Literal["identity", "gaussian"]
    max_noise_std: NonNegative
    per_sample: bool


class VitakkaParams(Section):
    """Probes that give the state a start (3.3)."""

    n_probes: Annotated[int, at_least(2, 4096)]
    probe_trainable: bool
    mix_alpha: Unit
    softmax_temp: Positive
    training_gate_threshold: Cosine
    inference_gate_threshold: Cosine
    closed_gate: Literal["zeroes", "is_told"]
    attention_training: Attention
    attention_inference: Attention
    init: Literal["random", "k_means"]
    normalize_on_read: bool


class VicaraParams(Section):
    """The update map (3.4)."""

    inertia: Annotated[Number, within("[0, 1)")]
    inject: bool
    rho: Annotated[Number, within("(0, 1)")]
    kind: Literal["standard", "probe_mixed", "probe_picked"]


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
    hidden: Count
    context_dim: Count
    gru_hidden: Count
    metric_proj: Count
    weight_trust: NonNegative
    weight_conformity: NonNegative
    weight_confidence: NonNegative


class HeadsParams(Section):
    """Decoder, reconstruction and guidance (3.8)."""

    decoder_hidden: Count
    recon_hidden: Count
    aux_hidden: Count
    output_activation: Literal["none", "tanh"]


class StageParams(Section):
    """How one stage of the curriculum trains (5)."""

    epochs: Count
    lr: Positive
    batch_size: Annotated[int, at_least(2, 10**6)]
    grad_clip: Positive


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
    correctness_share: Unit


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
        if abs(total - 1) > 1e-6:
            raise ValueError(f"the shares of {', '.join(PATHS)} must sum to 1, got {total:g}")
        return self

    def shares(self) -> dict[str, float]:
        """Those above 0, in their order."""
        return {path: getattr(self, path) for path in PATHS if getattr(self, path)}


class VoidParams(Section):
    """What counts as outside of the data, while training (6.4)."""

    kinds: Annotated[list[VoidKind], Field(min_length=1)]
    min_distance: NonNegative
    reference_rows: Count
    max_attempts: Count


class TestParams(Section):
    """Out-of-distribution kinds that are held back for the test; none may be used in training."""

    kinds: Annotated[list[str], Field(min_length=1)]
    ood_seed: CountOrZero


class RejectParams(Section):
    """How the threshold of trust is chosen on validation data."""

    rule: Literal["coverage", "risk", "conformal"]
    wanted: Share
    calibration: Literal["none", "temperature", "isotonic"]


class PeersParams(Section):
    """What the trust score is compared with."""

    names: dict[str, Section]


class SatipatthanaParams(Section):
    """The whole of stages/satipatthana/params.yaml."""

    seed: Annotated[int, at_least(0, 2**63 - 1)]
    seeds: Count
    threads: Annotated[int, at_least(1, 4096)]
    task: TaskParams
    system: SystemParams
    adapter: AdapterParams
    augmenter: AugmenterParams
    vitakka: VitakkaParams
    vicara: VicaraParams
    sati: SatiParams
    samatha: SamathaParams
    vipassana: VipassanaParams
    heads: HeadsParams
    stage0: StageParams
    stage1: Stage1Params
    stage2: Stage2Params
    stage3: StageParams
    paths: PathsParams
    void: VoidParams
    test: TestParams
    reject: RejectParams

    @model_validator(mode="after")
    def _fits_together(self) -> SatipatthanaParams:
        if self.paths.augmented and self.augmenter.kind == "identity":
            raise ValueError("augmenter.kind must not be identity when paths.augmented is above 0: its rows are clean")
        if both := sorted(set(self.void.kinds) & set(self.test.kinds)):
            raise ValueError(f"void.kinds must not name what test.kinds holds back, both name {', '.join(both)}")
        if self.stage2.batch_size < len(self.paths.shares()):
            raise ValueError(
                f"stage2.batch_size must be at least the number of paths, {len(self.paths.shares())}, "
                f"got {self.stage2.batch_size}"
            )
        if self.system.job == "anomaly" and self.system.guided:
            raise ValueError("system.guided must be false when system.job is anomaly, which has no labels")
        return self


def load(path: str | Path = PARAMS) -> SatipatthanaParams:
    """The parameters of the Satipatthana pipeline.

    Raises:
        ParamsError: unreadable file, unknown or missing key, wrong type or range; the message names file and key.
    """
    return read_params(path, SatipatthanaParams)
