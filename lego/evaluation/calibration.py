"""From calibration text to a routing threshold, and how well each exit criterion routes on other text."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sklearn.metrics import roc_auc_score

from lego.base.ashem_sections import RoutingParams
from lego.base.harness import StageError
from lego.evaluation.risk import MIN_UNITS, Certificate, certify, unit_losses
from lego.evaluation.routed import Route, TokenTable, perplexity
from lego.mining.thresholds import quantile_threshold
from lego.model.cost import Ledger
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
from lego.routing.decoder import ALWAYS_DEEP

PRINTED = ("threshold", "shallow_ratio", "ppl", "oracle_gap_nats", "gain_captured", "gain_auroc", "flops_ratio")


def all_criteria(probe: StateCriterion, gain: StateCriterion) -> dict[str, Criterion]:
    return {"max_prob": max_prob, "margin": margin, "entropy": entropy, "probe": probe, "gain": gain}


def macs_of(criterion: Criterion) -> int | None:
    """What a score costs in MACs; None if it needs the exit head."""
    return criterion.macs if isinstance(criterion, StateCriterion) else None


class GainFit:
    """Learns from exit states what block 2 will spare them; the score is high where that is little.

    Its log-odds are the negative gain in nats, so a threshold of 0.5 lets tokens leave that block 2 would not help.

    Args:
        dim: width of the exit states.
        width: of the hidden layer; 0 = linear, fitted in one pass without keeping states.
    """

    def __init__(self, dim: int, width: int) -> None:
        self.ridge, self.width = Ridge(dim), width
        self.states: list[torch.Tensor] = []
        self.targets: list[torch.Tensor] = []

    def add(self, states: torch.Tensor, gain: torch.Tensor) -> None:
        """Takes in exit states (n, D) and what block 2 spared them (n,)."""
        if self.width:
            self.states.append(states.cpu())
            self.targets.append(-gain.cpu())
        else:
            self.ridge.add(states, -gain)

    def solve(self, l2: float, seed: int) -> StateCriterion:
        if self.width:
            return fit_mlp(torch.cat(self.states), torch.cat(self.targets), self.width, l2, seed)
        return self.ridge.solve(l2)


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
        ratio = self.params.hard_ratio
        if name == "max_prob" and ratio is None:
            return self.mining_threshold
        if ratio in (0, 1):  # none and all, whatever the scores
            return ALWAYS_DEEP if ratio else 0.0
        # a fitted criterion's threshold comes from text that it was not fitted on
        score = self.table.score(name)[self.fit_tokens if name in STATE_CRITERIA else 0 :]
        return quantile_threshold(torch.from_numpy(score), self.hard_example_ratio if ratio is None else ratio)

    def units_of_rest(self) -> np.ndarray:
        """Units (n,) of the text after `fit_tokens`, from 0; one that began before belongs to none."""
        rest = self.units[self.fit_tokens :]
        begun = self.units[self.fit_tokens - 1]
        return np.where(rest > begun, rest - begun - 1, -1)

    def certificate(self, name: str) -> tuple[float, Certificate]:
        """The threshold that routes most among those whose risk is certified, and what is promised of it.

        Candidates come from the text that criteria were fitted on, the certificate from the rest.

        Raises:
            StageError: too few units, or no candidate can be certified and the user did not say what then.
        """
        params = self.params
        share = np.arange(1, params.risk_candidates + 1) / params.risk_candidates
        thresholds = [*np.quantile(self.table.score(name)[: self.fit_tokens], 1 - share[:-1]).tolist(), 0.0]
        rest, units = self.table.part(self.fit_tokens), self.units_of_rest()
        count = int(units.max()) + 1
        if count < MIN_UNITS:
            raise StageError(
                f"params.yaml: routing.calibration risk needs {MIN_UNITS} {params.risk_unit}s of calibration text "
                f"after exits.fit_share, got {count}; raise data.max_calibration_tokens or lower exits.fit_share"
            )
        columns = [
            unit_losses(rest.routed_nll(threshold, name), rest.nll_deep, units, params.risk_clip)
            for threshold in thresholds
        ]
        found = certify(np.stack(columns, axis=1), params.epsilon, params.delta, params.risk_clip)
        if found.chosen is not None:
            return thresholds[found.chosen], found
        if params.otherwise == "always_deep":
            return ALWAYS_DEEP, found
        raise StageError(
            f"params.yaml: routing.epsilon {params.epsilon:g} cannot be certified with {name} on {count} units at "
            f"routing.delta {params.delta:g}, the smallest here is {found.smallest_epsilon:.4f}; raise it, or set "
            "routing.otherwise to always_deep"
        )


def realised_risk(test: TokenTable, route: Route, units: np.ndarray, clip: float) -> dict[str, float]:
    """What came of a promise on other text: risk as promised, and the plain increase of the mean loss, in nats."""
    routed = test.routed_nll(route.threshold, route.criterion)
    return {
        "realised_risk": float(unit_losses(routed, test.nll_deep, units, clip).mean()),
        "realised_increase_nats": float((routed - test.nll_deep).mean()),
        "shallow_ratio": float(test.easy(route.threshold, route.criterion).mean()),
    }


def router_quality(table: TokenTable, route: Route, ledger: Ledger) -> dict[str, float | None]:
    """How well a criterion routes, beside the oracle that knows both losses of every token.

    Args:
        table: of text that nothing was fitted on, with the criterion's scores.
        route: criterion and threshold.
        ledger: costs of the model.

    Returns:
        threshold, shallow_ratio, ppl, flops_ratio, break_even_shallow_ratio, and
        oracle_ppl, oracle_gap_nats: each token at its better depth, and what is missing to it;
        oracle_at_ratio_ppl: the best choice of as many deep tokens;
        gain_captured: what the choice gains over a random one of as many tokens, as a share of what is possible;
        gain_auroc: chance that of two tokens the one that block 2 helps has the lower score; null if all or none are.
    """
    easy, gain = table.easy(route.threshold, route.criterion), table.gain
    ratio, routed = float(easy.mean()), table.routed_nll(route.threshold, route.criterion).mean()
    n_deep = int((~easy).sum())
    best = float(table.nll_shallow.mean() - np.sort(gain)[::-1][:n_deep].sum() / len(gain))
    random = float(ratio * table.nll_shallow.mean() + (1 - ratio) * table.nll_deep.mean())
    helped = gain > 0
    oracle = np.minimum(table.nll_shallow, table.nll_deep)
    one_class = helped.all() or not helped.any()
    return {
        "threshold": route.threshold,
        "shallow_ratio": ratio,
        "ppl": perplexity(routed),
        "oracle_ppl": perplexity(oracle),
        "oracle_gap_nats": float(routed - oracle.mean()),
        "oracle_at_ratio_ppl": math.exp(best),
        "gain_captured": (random - float(routed)) / (random - best) if random - best > 1e-12 else None,
        "gain_auroc": None if one_class else float(roc_auc_score(helped, -table.score(route.criterion))),
        "flops_ratio": ledger.flops_ratio(ratio, route.macs),
        "break_even_shallow_ratio": ledger.break_even_shallow_ratio(route.macs),
    }


def certificate_line(name: str, found: Certificate, params: RoutingParams) -> str:
    """What is promised, on what, and what could be promised at best."""
    kept = "" if found.chosen is not None else "; it cannot be kept: always deep"
    return (
        f"risk by {name}: at most {found.epsilon:g} nats, clipped at {params.risk_clip:g}, with probability "
        f"{1 - found.delta:g}, for {params.risk_unit}s drawn like these {found.units}; the smallest promise on them is "
        f"{found.smallest_epsilon:.4f}, on any so many {found.best_epsilon:.4f}{kept}"
    )


def quality_lines(quality: dict[str, dict[str, Any]]) -> list[str]:
    """One line a criterion, as the pipeline prints them."""
    lines = [f"{'criterion':>10} " + " ".join(f"{key:>15}" for key in PRINTED)]
    for name, row in quality.items():
        cells = ("-" if row[key] is None else f"{row[key]:.4f}" for key in PRINTED)
        lines.append(f"{name:>10} " + " ".join(f"{cell:>15}" for cell in cells))
    return lines


def payment_sentence(name: str, quality: dict[str, dict[str, Any]]) -> str:
    """Whether routing spares multiply-accumulates at this head and depth, and what would."""
    even, ratio = quality[name]["break_even_shallow_ratio"], quality[name]["shallow_ratio"]
    if ratio > even:
        return f"routing by {name} pays: {100 * ratio:.1f} % leave early, {100 * even:.1f} % are needed"
    others = [
        f"{other} from {100 * quality[other]['break_even_shallow_ratio']:.1f} %"
        for other in STATE_CRITERIA
        if other != name
    ]
    return (
        f"routing by {name} cannot pay at this head and depth unless more than {100 * even:.1f} % leave early, "
        f"{100 * ratio:.1f} % do; without the exit's head {' and '.join(others)} on"
    )
