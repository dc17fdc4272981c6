"""Tables of the report on routing: exit criteria, and what a token costs."""

from __future__ import annotations

from typing import Any

from lego.model.cost import Ledger
from lego.report.stats import mean_interval
from stages.evidence.summary import Suite, by_regime
from stages.evidence.tables import Table

ATTAINED = ("gain", "max_prob")  # the criterion that routes, and that of mining


def criteria_table(suite: Suite) -> Table:
    """What each exit criterion makes of the same model at every point of the regime map."""
    points = [(seen, name, list(suite.records[name]["ashem"].values())) for seen, name in by_regime(suite)]
    names = sorted({criterion for _, _, records in points for one in records for criterion in one["criteria"]["test"]})
    rows = []
    for criterion in names:
        cells = []
        for _, _, records in points:
            found = [one["criteria"]["test"][criterion] for one in records if criterion in one["criteria"]["test"]]
            ppl, auroc, macs = (
                mean_interval([row[key] for row in found if row[key] is not None] or [float("nan")])
                for key in ("ppl", "gain_auroc", "flops_ratio")
            )
            cells.append(f"{ppl:.2f}; {auroc.mean:.3f}; {macs.mean:.2f}")
        rows.append([criterion, *cells])
    header = ("criterion", *(f"{seen:.1f} tokens a parameter" for seen, _, _ in points))
    caption = (
        "ASHEM routed by each criterion: test perplexity with its interval over seeds; AUROC of `deep beats shallow on "
        "this token`; inference MACs. probe, and gain without a gate, read the hidden state and need no logits."
    )
    return header, rows, caption


def attainable_table(suite: Suite) -> Table:
    """What criteria capture at each share of deep tokens, at every point of the regime map with a gate."""
    points = [(seen, list(suite.records[name]["ashem"].values())) for seen, name in by_regime(suite)]
    told = [(seen, [one["of_attainable"] for one in records if one.get("of_attainable")]) for seen, records in points]
    told = [(seen, found) for seen, found in told if found]
    shares = dict.fromkeys(share for _, found in told for one in found for share in one)
    rows = []
    for name in ATTAINED:
        for share in shares:
            columns = ([one[share][name] for one in found if one[share][name] is not None] for _, found in told)
            rows.append([name, share, *(f"{mean_interval(column):.2f}" if column else "" for column in columns)])
    caption = (
        "Share of the attainable gain that a criterion's choice of deep tokens captures on test text, with its "
        "interval over seeds: 0 is a random choice, 1 that of a router which is told both exits' answers."
    )
    return ("criterion", "deep share", *(f"{seen:.1f} tokens a parameter" for seen, _ in told)), rows, caption


def router_table(rows: list[dict[str, Any]]) -> Table:
    """How the exit criteria route."""
    header = (
        "criterion",
        "AUROC",
        "test ppl",
        "to the oracle, nats",
        "ppl over cost",
        "left: promised",
        "realised",
        "calibration error",
        "with temperature",
    )
    cells = [
        [
            row["criterion"],
            "" if row["gain_auroc"] is None else f"{row['gain_auroc']:.3f}",
            f"{row['ppl']:.2f}",
            f"{row['oracle_gap_nats']:.3f}",
            f"{row['mean_ppl_over_cost']:.2f}",
            "" if row["promised_shallow_ratio"] is None else f"{row['promised_shallow_ratio']:.3f}",
            f"{row['shallow_ratio']:.3f}",
            f"{row['ece']:.3f}",
            f"{row['ece_after']:.3f} (T = {row['temperature']:.2f})",
        ]
        for row in rows
    ]
    return header, cells, "Exit criteria of the root pipeline's model on test text."


def ledger_table(ledger: Ledger) -> Table:
    """What a token costs."""
    parts = {
        "block 1": ledger.block1,
        "block 2": ledger.block2,
        "keys and values of an exited token in block 2": ledger.kv_fill(),
        "one output head": ledger.head,
        "always shallow": ledger.shallow(),
        "full model": ledger.full,
    }
    rows = [[name, f"{macs:,}", f"{macs / ledger.full:.3f}"] for name, macs in parts.items()]
    return ("part", "MACs per token", "share of the full model"), rows, "What a token costs at inference."
