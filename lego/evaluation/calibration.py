"""From calibration text to a routing threshold: fitted criteria, quantiles, certificates of risk."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lego.base.ashem_sections import RoutingParams
from lego.base.harness import StageError
from lego.evaluation.risk import MIN_UNITS, Certificate, certify, unit_losses
from lego.evaluation.routed import TokenTable, token_table
from lego.mining.thresholds import quantile_threshold
from lego.model.exit_criteria import (
    STATE_CRITERIA,
    Criterion,
    Ridge,
    StateCriterion,
    entropy,
    fit_mlp,
    margin,
    max_prob,
)
from lego.model.gate import Gate
from lego.model.transformer import BaseTransformer
from lego.routing.decoder import ALWAYS_DEEP


def all_criteria(probe: StateCriterion, gain: StateCriterion) -> dict[str, Criterion]:
    return {"max_prob": max_prob, "margin": margin, "entropy": entropy, "probe": probe, "gain": gain}


def score_macs(criterion: str, dim: int, routing: RoutingParams) -> int | None:
    """What a score of a criterion costs in MACs at a width; None if it needs the exit head."""
    if criterion == "gain":
        return StateCriterion(dim, routing.gain_width, routing.gate == "fitted").macs
    return dim if criterion == "probe" else None


MOST_GAIN = 3.0  # nats that a token's realised gain counts for: more is the luck of its one next token


class GainFit:
    """Learns from exit states what block 2 will spare them; the score is high where that is little.

    Its log-odds are the negative gain in nats, so a threshold of 0.5 lets tokens leave that block 2 would not help.

    Args:
        dim: width of the exit states.
        width: of the hidden layer; 0 = linear, fitted in one pass without keeping states.
        reads_logits: the criterion is told the largest of the exit's logits beside the state.
    """

    def __init__(self, dim: int, width: int, reads_logits: bool = False) -> None:
        self.ridge, self.width, self.reads_logits = Ridge(dim, reads_logits), width, reads_logits
        self.kept: list[tuple[Tensor, Tensor, Tensor]] = []

    def add(self, states: Tensor, gain: Tensor, largest: Tensor) -> None:
        """Takes in exit states (n, D), what block 2 spared them (n,), and the largest of the exit's logits (n,)."""
        if self.width:
            self.kept.append((states.cpu(), -gain.cpu(), largest.cpu()))
        else:
            self.ridge.add(states, -gain, largest)

    def solve(self, l2: float, seed: int) -> StateCriterion:
        if not self.width:
            return self.ridge.solve(l2)
        states, targets, largest = (torch.cat(column) for column in zip(*self.kept, strict=True))
        return fit_mlp(states, targets, self.width, l2, seed, largest if self.reads_logits else None)


def fitted_gain(
    model: BaseTransformer,
    batches: Iterable[tuple[Tensor, Tensor]],
    gate: Gate | None,
    routing: RoutingParams,
    seed: int,
    device: str | torch.device,
) -> StateCriterion:
    """The criterion `gain` of a model with two exits, fitted on a text.

    A gate needs the exit's logits of every token, so the criterion reads them too, which costs next to nothing then.
    What the mixture expects to spare is learned; without a gate what full depth did spare, whose outliers are cut.

    Args:
        model: with two blocks.
        batches: (x, y) of token ids (B, T), of text that neither block was trained on.
        gate: mixes both exits in answers of the full depth.
        routing: its width and weight penalty.
        seed: of its initial weights.
        device: where the model runs, and the criterion then lies.
    """
    fit = GainFit(model.sizes["dim"], routing.gain_width, reads_logits=gate is not None)

    def add(states: Tensor, gain: Tensor, largest: Tensor) -> None:
        fit.add(states, gain if gate is not None else gain.clamp(-MOST_GAIN, MOST_GAIN), largest)

    token_table(model, batches, device, on_states=add, gate=gate)
    return fit.solve(routing.gain_l2, seed).to(device)


def share_threshold(scores: Tensor, ratio: float) -> float:
    """The score below which a share `ratio` of the tokens lies; of none and of all, whatever other scores come."""
    if ratio in (0, 1):
        return ALWAYS_DEEP if ratio else 0.0
    return quantile_threshold(scores, ratio)


@dataclass(frozen=True)
class Calibration:
    """What calibration text says of every criterion.

    Args:
        table: of the whole calibration text, with the scores of all criteria.
        fit_tokens: its first tokens, on which criteria were fitted.
        units: number of each token's unit of risk (n,), see `unit_losses`.
        mining_threshold: of max_prob.
        hard_example_ratio: share of tokens that are hard in mining.
        params: section `routing`.
    """

    table: TokenTable
    fit_tokens: int
    units: np.ndarray
    mining_threshold: float
    hard_example_ratio: float
    params: RoutingParams

    def quantile(self, name: str) -> float:
        """The score below which a share routing.hard_ratio of the tokens lies."""
        if name == "max_prob" and self.params.hard_ratio is None:
            return self.mining_threshold
        # a fitted criterion's threshold comes from text that it was not fitted on
        score = self.table.score(name)[self.fit_tokens if name in STATE_CRITERIA else 0 :]
        return share_threshold(torch.from_numpy(score), self.params.deep_share(self.hard_example_ratio))

    def units_of_rest(self) -> np.ndarray:
        """Units (n,) of the text after `fit_tokens`."""
        return units_after(self.units, self.fit_tokens)

    def certificate(self, name: str) -> tuple[float, Certificate]:
        """The threshold that routes most among those whose risk is certified, and what is promised of it.

        Candidates come from the text that criteria were fitted on, the certificate from the rest.

        Raises:
            StageError: too few units, or no candidate can be certified and the user did not say what then.
        """
        params = self.params
        share = np.arange(1, params.risk_candidates + 1) / params.risk_candidates
        thresholds = [*np.quantile(self.table.score(name)[: self.fit_tokens], 1 - share[:-1]).tolist(), 0.0]
        rest = self.table.part(self.fit_tokens)
        routed = [rest.routed_nll(threshold, name) for threshold in thresholds]
        found = certificate_of(routed, rest.nll_deep, self.units_of_rest(), params, name)
        return ALWAYS_DEEP if found.chosen is None else thresholds[found.chosen], found


def units_after(units: np.ndarray, start: int) -> np.ndarray:
    """Units (n,) of the text after its first `start` tokens, from 0; one that began before belongs to none."""
    rest, begun = units[start:], units[start - 1]
    return np.where(rest > begun, rest - begun - 1, -1)


def certificate_of(
    routed: Sequence[np.ndarray], full: np.ndarray, units: np.ndarray, params: RoutingParams, name: str
) -> Certificate:
    """What can be promised of one of several ways to route.

    Args:
        routed: losses (n,) of each way, the one that routes least first.
        full: losses (n,) of the full depth.
        units: of risk (n,), see `unit_losses`.
        params: section `routing`.
        name: of what decides where a token leaves.

    Raises:
        StageError: too few units, or none can be certified and the user did not say what then.
    """
    count = int(units.max()) + 1
    if count < MIN_UNITS:
        raise StageError(
            f"params.yaml: routing.calibration risk needs {MIN_UNITS} {params.risk_unit}s of calibration text "
            f"after exits.fit_share, got {count}; raise data.max_calibration_tokens or lower exits.fit_share"
        )
    columns = [unit_losses(nll, full, units, params.risk_clip) for nll in routed]
    found = certify(np.stack(columns, axis=1), params.epsilon, params.delta, params.risk_clip)
    if found.chosen is None and params.otherwise != "always_deep":
        raise StageError(
            f"params.yaml: routing.epsilon {params.epsilon:g} cannot be certified with {name} on {count} units at "
            f"routing.delta {params.delta:g}, the smallest here is {found.smallest_epsilon:.4f}; raise it, or set "
            "routing.otherwise to always_deep"
        )
    return found


def certificate_line(name: str, found: Certificate, params: RoutingParams) -> str:
    """What is promised, on what, and what could be promised at best."""
    kept = "" if found.chosen is not None else "; it cannot be kept: always deep"
    return (
        f"risk by {name}: at most {found.epsilon:g} nats, clipped at {params.risk_clip:g}, with probability "
        f"{1 - found.delta:g}, for {params.risk_unit}s drawn like these {found.units}; the smallest promise on them is "
        f"{found.smallest_epsilon:.4f}, on any so many {found.best_epsilon:.4f}{kept}"
    )
