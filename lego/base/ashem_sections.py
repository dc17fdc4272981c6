"""The sections of params.yaml that are ASHEM's alone: phases, exits, routing, evaluation, and its baselines."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, model_validator

from lego.base.parameter_files import ParamsError
from lego.base.sections import Count, CountOrZero, Number, Positive, Section, Share, at_least, within


def _some_factors(values: list[float]) -> list[float]:
    if not values or len(set(values)) < len(values):
        raise ValueError("must name at least one factor, each once")
    return values


RESERVED = {"ashem", "shallow_continued", "shallow"}  # what the pipeline itself is called beside its baselines


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
    branch_layer: int | None
    branch: Literal["full", "lora"]
    branch_rank: Annotated[int, at_least(1, 2**12)]
    phase2_lr: Positive
    phase2_epochs: Count
    phase2_patience: Count
    phase2_context: Literal["token", "sequence", "historic"]
    init_new_layers: Literal["copy", "zero", "random"]
    head: Literal["shared", "own", "shared_trainable"]
    replay_share: Annotated[Number, within("[0, 1)")]
    states: Literal["stored", "keys_values", "online"]
    store_dtype: Literal["float32", "float16", "bfloat16"]
    shard_tokens: Count

    @property
    def new_layers(self) -> int:
        """Layers that phase 2 puts on top of block 1."""
        return self.phase2_layers - self.phase1_layers

    def branch_of(self, depth: int) -> int | None:
        """Layer whose output block 2 begins at, of a block 1 of this depth, from 0; None = its last.

        Raises:
            ParamsError: block 1 has no such layer.
        """
        if self.branch_layer is None:
            return None
        if not -depth <= self.branch_layer <= depth:
            raise ParamsError(
                f"params.yaml: ashem.branch_layer must be in {-depth}..{depth} for block 1's {depth} layers, got "
                f"{self.branch_layer}; {depth} or null lets block 2 begin at the last"
            )
        return self.branch_layer % depth if self.branch_layer < depth else None

    def require_block2(self, depth: int) -> None:
        """Makes sure that block 2 has layers to train on a block 1 of this depth.

        Raises:
            ParamsError: it begins at the last layer, and has no new ones, or is to learn by low rank.
        """
        if self.branch_layer == depth and (not self.new_layers or self.branch == "lora"):
            lacks = "branch lora needs one" if self.new_layers else "phase2_layers adds none"
            raise ParamsError(f"params.yaml: ashem.branch_layer {depth} repeats no layer, and ashem.{lacks}; lower it")

    def rank_of(self, dim: int) -> int:
        """Rank of what branch layers learn beside matrices of a width; 0 = whole matrices.

        Raises:
            ParamsError: it is not below the width.
        """
        if self.branch == "lora" and self.branch_rank >= dim:
            raise ParamsError(
                f"params.yaml: ashem.branch_rank must be less than block 1's width {dim}, got {self.branch_rank}; "
                "ashem.branch full trains whole matrices"
            )
        return self.branch_rank if self.branch == "lora" else 0

    @property
    def stored_dtype(self) -> str | None:
        """Of the exit states in the store; None if it holds none."""
        return None if self.states == "online" else self.store_dtype

    @model_validator(mode="after")
    def _two_blocks(self) -> AshemParams:
        if self.phase2_layers < self.phase1_layers + (self.branch_layer is None):
            raise ValueError(
                f"phase2_layers is the total depth and must be greater than phase1_layers = {self.phase1_layers}, "
                f"got {self.phase2_layers}; with a branch_layer it may be equal"
            )
        if self.branch_layer is not None and self.phase2_context != "sequence":
            raise ValueError(f"branch_layer needs phase2_context sequence, got {self.phase2_context}")
        if self.branch == "lora" and self.branch_layer is None:
            raise ValueError("branch lora needs a branch_layer: it is the layers after that one that learn by low rank")
        if self.phase2_text == "fresh" and self.phase2_share == 0:
            raise ValueError("phase2_share must be in (0, 1) when phase2_text is fresh, got 0")
        if self.states == "keys_values" and self.branch_layer is None:
            raise ValueError("states keys_values needs a branch_layer: without one block 2 repeats no layer")
        if self.states == "online" and self.phase2_context != "sequence":
            raise ValueError(
                f"states online needs phase2_context sequence, got {self.phase2_context}: to make the states of lone "
                "tokens anew would cost their whole blocks"
            )
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
    gate: Literal["none", "fitted"]
    epsilon: Positive
    delta: Share
    risk_unit: Literal["block", "document"]
    risk_clip: Positive
    risk_candidates: Annotated[int, at_least(1, 10_000)]
    otherwise: Literal["stop", "always_deep"]
    gain_width: Annotated[int, at_least(0, 2**16)]
    gain_l2: Positive

    def deep_share(self, mined: float) -> float:
        """Share of tokens that quantiles send deep; by default that which mining calls hard."""
        return mined if self.hard_ratio is None else self.hard_ratio

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


class SearchParams(Section):
    lr_factors: Annotated[list[Positive], AfterValidator(_some_factors)]


class JointParams(Section):
    """A baseline whose layers are all trained on all tokens."""

    budget: Literal["total", "added"]
    start: Literal["scratch", "block1", "grown", "late"]
    depth: Literal["shallow", "middle", "full"]
    widened: bool
    exits: Literal["last", "both"]
    lr: Positive

    @model_validator(mode="after")
    def _possible(self) -> JointParams:
        given = self.start in ("block1", "grown")
        if given != (self.budget == "added"):
            raise ValueError(f"budget must be {'added' if given else 'total'} when start is {self.start}")
        if (self.start == "block1" and self.depth != "shallow") or (
            self.start in ("grown", "late") and self.depth == "shallow"
        ):
            raise ValueError(f"depth {self.depth} does not go with start {self.start}")
        if self.widened and self.start != "scratch":
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


class GrowthParams(Section):
    at: Share
    decay_share: Share


class BaselinesParams(Section):
    joint: dict[str, JointParams]
    block2: dict[str, Block2Params]
    selection: SelectionParams
    growth: GrowthParams

    @model_validator(mode="after")
    def _names(self) -> BaselinesParams:
        names = [*self.joint, *self.block2]
        for name in names:
            if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
                raise ValueError(f"names must be of letters a-z, digits and _, got {name!r}")
            if names.count(name) > 1 or name in RESERVED:
                raise ValueError(f"name {name} is taken; choose another")
        return self
