"""The sections `contest` and `peers` of stages/cvfp/params.yaml: what CVFP is compared with."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from lego.base.sections import Count, CountOrZero, NonNegative, Positive, Section, Share, Unit, at_least

Form = Literal["sound", "sound_reservoir", "untrained", "untrained_longer", "seed", "seed_untrained"]
Peer = Literal["end_to_end", "mlp_1", "mlp_2", "mlp_4", "gru", "lstm", "transformer", "ssm"]


class ScalingParams(Section):
    """The curve over train text: which models, on which parts of it, how often."""

    models: dict[Form | Peer, Count]
    shares: Annotated[list[Share], Field(min_length=1)]


class ContestParams(Section):
    """Which models are compared over seeds, and the rates their search begins from (specification, section 12)."""

    seeds: Count
    seed_sweeps: CountOrZero
    workers: Count
    lr_factors: Annotated[list[Positive], Field(min_length=1)]
    own: dict[Form, Positive]
    peers: dict[Peer, Positive]
    scaling: ScalingParams
    trial_seeds: Count
    trials: dict[str, dict[str, bool | int | float | str | list[int]]]

    @model_validator(mode="after")
    def _scaled_models_are_of_the_contest(self) -> ContestParams:
        if len({f"{share:g}" for share in self.scaling.shares}) < len(self.scaling.shares):
            raise ValueError(f"scaling.shares must differ, got {self.scaling.shares}")
        for name in self.scaling.models:
            if name not in self.lr:
                raise ValueError(f"scaling.models must be of contest.own or contest.peers, got {name}")
        return self

    @property
    def lr(self) -> dict[str, float]:
        """The rate by model, CVFP's own forms first."""
        return dict(self.own.items()) | dict(self.peers.items())


class EndToEndParams(Section):
    """What the peer that is the network of `sound` in one phase has of its own."""

    window: Annotated[int, at_least(8, 4096)]
    layernorm_mix: Unit


class PeersParams(Section):
    """How the other models train."""

    streams: Count
    window: Annotated[int, at_least(8, 4096)]
    warmup_steps: CountOrZero
    weight_decay: NonNegative
    grad_clip: Positive
    end_to_end: EndToEndParams
