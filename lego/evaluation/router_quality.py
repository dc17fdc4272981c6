"""How well exit criteria route text that nothing was fitted on, and whether that pays."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
from sklearn.metrics import roc_auc_score

from lego.evaluation.risk import unit_losses
from lego.evaluation.routed import ATTAINABLE, Route, TokenTable, perplexity
from lego.model.cost import Ledger
from lego.model.exit_criteria import STATE_CRITERIA

PRINTED = ("threshold", "shallow_ratio", "ppl", "oracle_gap_nats", "gain_captured", "of_attainable", "flops_ratio")
SHARES = (0.3, 0.5, 0.7)  # of tokens that go deep, at which criteria are compared


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
        of_attainable: the same as a share of what `captured_of_attainable` says can be had;
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
        "of_attainable": captured_of_attainable(table, route.criterion, n_deep),
        "gain_auroc": None if one_class else float(roc_auc_score(helped, -table.score(route.criterion))),
        "flops_ratio": ledger.flops_ratio(ratio, route.macs),
        "break_even_shallow_ratio": ledger.break_even_shallow_ratio(route.macs),
    }


def captured_of_attainable(table: TokenTable, criterion: str, n_deep: int) -> float | None:
    """What a criterion's choice of so many deep tokens gains over a random one, as a share of what can be had.

    The oracle knows each token's loss, most of which is chance that no router can know. What can be had is what a
    router gains that is told both exits' answers: it sends deep where their mixture expects to spare most. null where
    there is no mixture, or nothing to be had.
    """
    if ATTAINABLE not in table.scores:
        return None

    def gained(name: str) -> float:
        deep = np.argsort(table.score(name), kind="stable")[:n_deep]
        return float(table.gain[deep].sum()) - n_deep * float(table.gain.mean())

    had = gained(ATTAINABLE)
    return gained(criterion) / had if had > 1e-9 * len(table.gain) else None


def captured_by_share(table: TokenTable, criteria: Iterable[str]) -> dict[str, dict[str, float | None]]:
    """`captured_of_attainable` of each criterion at each of SHARES."""
    n = len(table.gain)
    return {
        f"{share:g}": {name: captured_of_attainable(table, name, int(share * n)) for name in criteria}
        for share in SHARES
    }


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
    cheaper = {other: quality[other]["break_even_shallow_ratio"] for other in STATE_CRITERIA}
    others = [f"{other} pays from {100 * least:.1f} % on" for other, least in cheaper.items() if least < even]
    said = (
        f"routing by {name} cannot pay at this head and depth unless more than {100 * even:.1f} % leave early, "
        f"{100 * ratio:.1f} % do"
    )
    return "; ".join([said, " and ".join(others)]) if others else said
