"""The sections of stages/cvfp/params.yaml, typed and with their ranges, and the profiles that change them.

Its section `data` is that of the root's params.yaml but for the keys that the file has itself.

python -m lego.cvfp.sections            checks the file and says what is wrong with it
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import ConfigDict, Field, model_validator

from lego.base.parameter_files import read_params
from lego.base.profiles import Sibling
from lego.base.sections import (
    Count,
    CountOrZero,
    DataParams,
    NonNegative,
    Number,
    Positive,
    Section,
    Share,
    Unit,
    at_least,
    within,
)
from lego.cvfp.contest_sections import ContestParams, PeersParams

PARAMS, PROFILES = Path("stages/cvfp/params.yaml"), Path("stages/cvfp/profiles.yaml")
ROOT_PARAMS = Path("params.yaml")
OWN = (  # keys of `data` that the file must have itself; path, as DVC looks for it there
    "path",
    "stdlib_tests",
    "max_train_tokens",
    "max_validation_tokens",
    "max_calibration_tokens",
    "max_test_tokens",
    "calibration_share",
)
Diversity = Literal[
    "none",
    "dist_batch",
    "centroid_batch",
    "centroid_ema",
    "ema_buffer",
    "ema_target",
    "ema_live",
    "vicreg",
    "oacd",
]


class TextParams(Section):
    """How the tokens of data/cvfp/tokens become train, validation and test ids (specification, section 6)."""

    validation: Literal["heldout_in_vocab", "val_from_train"]
    val_share: Share
    unseen: Literal["filter", "unk"]
    block_length: Annotated[int, at_least(2, 2**16)]
    overlap_length: Annotated[int, at_least(2, 1000)]


class ModelParams(Section):
    """Sizes and form of the network (specification, section 2)."""

    context_dim: Count
    embed_dim: Count
    hidden_dim: Count
    layer_structure: Annotated[list[Count], Field(min_length=1)]
    token_structure: list[Count]
    layernorm_mix: Unit
    update: Literal["relu", "gated"]
    head: Literal["context_then_token", "context", "token"]
    embedding: Literal["gpt2", "pretrained", "random_frozen"]
    embedding_from: str | None
    train_embedding: bool
    init_weight_std: Positive
    init_bias_std: NonNegative
    init_embedding_std: Positive

    @model_validator(mode="after")
    def _sizes_fit(self) -> ModelParams:
        if self.hidden_dim != self.context_dim + self.embed_dim:
            raise ValueError(
                f"hidden_dim must be context_dim + embed_dim = {self.context_dim + self.embed_dim}, "
                f"got {self.hidden_dim}"
            )
        if self.embedding == "pretrained" and not self.embedding_from:
            raise ValueError("embedding_from must name a folder when model.embedding is pretrained, got nothing")
        return self


class Phase1Params(Section):
    """How contexts are trained (specification, section 3; `predict`: section 12, better design)."""

    objective: Literal["fixed_point", "predict"]
    mode: Literal["parallel", "sequential_batch", "sequential_online"]
    cvfp_target: Literal["previous_iteration", "iteration0_fixed", "two_view"]
    diversity: Diversity
    dist_reg_weight: Unit
    normalize: Literal["none", "per_token"]
    ema_momentum: Annotated[Number, within("[0, 1)")]
    allow_zero_gradient_loss: bool
    lr: Positive
    lr_schedule: Literal["constant", "steps"]
    lr_steps: Annotated[list[Count], Field(min_length=1)]
    lr_step_factors: Annotated[list[Positive], Field(min_length=1)]
    max_iterations: Annotated[int, at_least(2, 100_000)]
    min_updates: CountOrZero
    early_stop: bool
    stop_when_worse: bool
    worse_margin: NonNegative
    convergence_threshold: Annotated[Number, within("[0, inf)")]
    min_converged_ratio: Annotated[Number, within("(0, 1]")]
    start_context: Literal["carry", "zero"]
    two_view_noise: NonNegative
    bptt_len: Count
    chunk_tokens: Count
    recompute_contexts: bool
    grad_clip: Positive

    @model_validator(mode="after")
    def _possible(self) -> Phase1Params:
        if len(self.lr_step_factors) != len(self.lr_steps) + 1 or self.lr_steps != sorted(set(self.lr_steps)):
            raise ValueError(
                "lr_step_factors must have one factor more than lr_steps, which must rise; "
                f"got {self.lr_step_factors} and {self.lr_steps}"
            )
        if self.cvfp_target == "two_view" and not self.two_view_noise:
            raise ValueError("two_view_noise must be above 0 when cvfp_target is two_view: equal views differ by 0")
        return self


class PredictParams(Section):
    """Contexts trained to predict the next token: objective `predict` (specification, section 12)."""

    loss: Literal["ce", "infonce"]
    keep_reader: bool
    epochs: Count
    streams: Count
    bptt_len: Annotated[int, at_least(16, 4096)]
    lr: Positive
    warmup_steps: CountOrZero
    weight_decay: NonNegative
    regularizer_weight: NonNegative
    contraction_gamma: Annotated[Number, within("(0, 1)")]


class ContextsParams(Section):
    """How C* is solved for."""

    segments: Count
    tolerance: NonNegative
    max_train_sweeps: CountOrZero


class Phase2Params(Section):
    """How the head learns from fixed contexts (specification, section 4)."""

    mode: Literal["v2", "v1_mse", "propagate"]
    freeze_context: bool
    lr: Positive
    lr_schedule: Literal["constant", "cosine"]
    weight_decay: NonNegative
    epochs: Count
    patience: Count
    batch_tokens: CountOrZero
    chunk_tokens: Count
    grad_clip: Positive


class ChecksParams(Section):
    """What the critical checks take as passed (specification, section 5)."""

    passes: Annotated[int, at_least(2, 1000)]
    num_trials: Annotated[int, at_least(2, 1000)]
    final_diff: Positive
    final_diff_bands: Annotated[list[Positive], Field(min_length=1)]
    identity_cosine: Unit
    identity_norm: Positive
    identity_pairs: Count
    blind_cosine: Unit
    attractor_distance: Positive
    attractor_cosine: Unit
    slope: Positive
    loss_std: Positive
    level_share: Share
    forgetting: Positive
    lags: Annotated[int, at_least(1, 100)]
    ridge: Positive
    rank_tokens: Annotated[int, at_least(200)]
    rank_bands: Annotated[list[Share], Field(min_length=1)]


class ProgressParams(Section):
    progress_every: Count
    warn_above: Count


class RootParams(Section):
    """What CVFP reads of the root's params.yaml."""

    model_config = ConfigDict(extra="ignore")

    data: DataParams


class CvfpParams(Section):
    """The whole of stages/cvfp/params.yaml, with what it leaves out of `data`."""

    seed: Annotated[int, at_least(0, 2**63 - 1)]
    threads: Annotated[int, at_least(1, 4096)]
    data: DataParams
    text: TextParams
    model: ModelParams
    phase1: Phase1Params
    predict: PredictParams
    contexts: ContextsParams
    phase2: Phase2Params
    checks: ChecksParams
    contest: ContestParams
    peers: PeersParams
    progress: ProgressParams

    @model_validator(mode="after")
    def _ids_are_those_of_the_embedding(self) -> CvfpParams:
        if self.model.embedding != "random_frozen" and self.data.tokenizer != "pretrained":
            raise ValueError(
                f"data.tokenizer in {ROOT_PARAMS} must be pretrained, of that model, when model.embedding is "
                f"{self.model.embedding}; its rows are of other ids; got {self.data.tokenizer}"
            )
        if self.data.tokenizer == "pretrained" and not self.data.pretrained:
            raise ValueError(
                f"data.pretrained in {ROOT_PARAMS} must name a tokenizer or its folder when data.tokenizer is "
                "pretrained"
            )
        wanted = self.model.embedding_from or "gpt2"
        if self.model.embedding == "gpt2" and self.data.pretrained != wanted:
            raise ValueError(
                f"data.pretrained in {ROOT_PARAMS} must be {wanted}, whose ids the rows of model.embedding gpt2 are, "
                f"got {self.data.pretrained}"
            )
        return self

    @model_validator(mode="after")
    def _reader_fits(self) -> CvfpParams:
        if self.predict.keep_reader and self.predict.loss != "ce":
            raise ValueError(f"predict.keep_reader must be false when predict.loss is {self.predict.loss}, got true")
        if self.predict.keep_reader and self.phase1.objective == "predict" and self.model.head == "token":
            raise ValueError(
                "predict.keep_reader must be false when model.head is token, which reads no context; got true"
            )
        return self

    @model_validator(mode="after")
    def _separate_where_it_predicts(self) -> CvfpParams:
        if self.phase1.objective == "predict" and not self.model.token_structure:
            raise ValueError(
                "model.token_structure must name at least one block when phase1.objective is predict: phase 2 trains "
                "token parameters of its own, so that the contexts stay those of phase 1; got none"
            )
        if self.phase2.mode != "v2" and self.model.token_structure:
            raise ValueError(f"phase2.mode must be v2 when model.token_structure is given, got {self.phase2.mode}")
        if self.phase2.mode == "propagate" and self.model.head == "context":
            raise ValueError(
                "model.head must be context_then_token when phase2.mode is propagate, which predicts from the token "
                "vector alone; got context"
            )
        if self.model.train_embedding and self.phase1.objective != "predict":
            raise ValueError("model.train_embedding must be false when phase1.objective is fixed_point, got true")
        return self


def root_data(root: str | Path = ROOT_PARAMS) -> DataParams:
    """The section `data` of the root's file; it raises as `load` does."""
    return read_params(root, RootParams).data


def load(path: str | Path = PARAMS, root: str | Path = ROOT_PARAMS) -> CvfpParams:
    """The parameters of the CVFP pipeline.

    Args:
        path: its file.
        root: the file that has the rest of `data`.

    Raises:
        ParamsError: unreadable file, unknown or missing key, wrong type or range; the message names file and key.
    """
    return read_params(path, CvfpParams, {"data": root_data(root).model_dump(exclude=set(OWN))})


SIBLING = Sibling(load, PARAMS, PROFILES)
profiles, with_profile, changed, main = SIBLING.profiles, SIBLING.with_profile, SIBLING.changed, SIBLING.main


if __name__ == "__main__":
    raise SystemExit(main())
