"""How well each exit criterion routes, beyond what evaluate_routing says: area, calibration, promises."""

from __future__ import annotations

from typing import Any

import numpy as np

from lego.evaluation.routed import TokenTable, threshold_sweep
from lego.model.cost import Ledger
from lego.report.stats import calibration_error, fit_temperature, with_temperature

POINTS = 101


def mean_ppl_over_cost(table: TokenTable, ledger: Ledger, criterion: str, macs: int | None) -> float:
    """Area under the lowest perplexity that routing reaches at a cost, between always-shallow and the full model.

    Divided by the width, so that it is a mean perplexity; a budget may also be spent on either extreme without
    routing, which costs no criterion.
    """
    rows = threshold_sweep(table, ledger, POINTS, criterion, macs)
    shallow, deep = rows[-1]["ppl"], rows[0]["ppl"]
    ends = [(ledger.shallow() / ledger.full, shallow), (ledger.always_deep / ledger.full, deep)]
    known = [*ends, *((r["flops_ratio"], r["ppl"]) for r in rows)]
    costs = np.linspace(ends[0][0], 1.0, 201)
    best = [min(ppl for cost, ppl in known if cost <= at + 1e-12) for at in costs]
    return float(np.mean(best))


def reaches(name: str, table: TokenTable) -> np.ndarray:
    """What a criterion's score is read as the probability of: that the exit is right; for gain, that it is enough."""
    return table.nll_deep >= table.nll_shallow if name == "gain" else table.right_shallow.astype(bool)


def calibration(name: str, fitted_on: TokenTable, test: TokenTable) -> dict[str, float]:
    """Expected calibration error on test text before and after one temperature, fitted on other text."""
    temperature = fit_temperature(fitted_on.score(name), reaches(name, fitted_on))
    scores, happened = test.score(name), reaches(name, test)
    return {
        "ece": calibration_error(scores, happened),
        "temperature": temperature,
        "ece_after": calibration_error(with_temperature(scores, temperature), happened),
    }


def criterion_rows(
    criteria: dict[str, Any],
    validation: TokenTable,
    test: TokenTable,
    ledger: Ledger,
    promised: float | None,
    macs: dict[str, int | None],
) -> list[dict[str, Any]]:
    """One row a criterion, on test text.

    Args:
        criteria: metrics/details/criteria.json.
        validation, test: token tables; temperatures are fitted on the first.
        ledger: costs of the routed model.
        promised: share that was to leave early; None if no share was promised.
        macs: what a score of a fitted criterion costs, by name.
    """
    rows = []
    for name, quality in criteria["test"].items():
        rows.append(
            {
                "criterion": name,
                "promised_shallow_ratio": promised,
                "mean_ppl_over_cost": mean_ppl_over_cost(test, ledger, name, macs.get(name)),
                **{key: quality[key] for key in ("shallow_ratio", "ppl", "oracle_gap_nats", "gain_auroc")},
                **calibration(name, validation, test),
            }
        )
    return rows
