"""Tables of the report."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from lego.cost import Ledger
from stages.evidence.summary import Suite, budget_kind, by_regime, difference, leaky

Table = tuple[Sequence[str], list[list[str]], str]
"""Header, rows and caption."""


def main_table(suite: Suite, setting: str) -> Table:
    """All models of the core suite, the best first."""
    header = (
        "model",
        "budget",
        "test ppl",
        "ASHEM less it: seeds",
        "documents",
        "verdict on ASHEM",
        "hard ppl",
        "inference MACs",
        "training MACs",
        "off budget, %",
    )
    rows = []
    for model in sorted(suite.models(setting), key=lambda name: fmean(suite.values(setting, name, "ppl"))):
        found = difference(suite, setting, "ashem", model) if model != "ashem" else None
        off = max(abs(value) for value in suite.values(setting, model, "distance_from_budget"))
        macs = suite.interval(setting, model, "train_macs")
        flops, hard = suite.interval(setting, model, "flops_ratio"), suite.interval(setting, model, "hard_ppl_after")
        assert macs
        assert flops
        rows.append(
            [
                f"**{model}**" if model == "ashem" else f"{model} (leaky)" if leaky(suite, setting, model) else model,
                "its own" if model == "ashem" else budget_kind(suite, setting, model),
                f"{suite.interval(setting, model):.2f}",
                f"{found.over_seeds:+.2f}" if found else "",
                f"{found.over_documents:+.2f}" if found else "",
                found.verdict if found else "",
                f"{hard.mean:.1f}" if hard else "",
                f"{flops.mean:.3f}",
                f"{macs.mean:.3e}",
                f"{100 * off:.2f}",
            ]
        )
    seeds = len(suite.records[setting]["ashem"])
    return header, rows, f"Test perplexity over {seeds} seeds; inference MACs as a share of the full model's."


def short_table(suite: Suite, setting: str) -> Table:
    """ASHEM beside every model that does not leak, the best first, as the README shows it."""
    header = ("model", "budget", "test perplexity", "ASHEM less it", "ASHEM is", "inference MACs")
    rows = []
    for model in sorted(suite.models(setting), key=lambda name: fmean(suite.values(setting, name, "ppl"))):
        if leaky(suite, setting, model):
            continue
        found = difference(suite, setting, "ashem", model) if model != "ashem" else None
        cost = fmean(suite.values(setting, model, "flops_ratio"))
        name, budget = (f"`{model}`", budget_kind(suite, setting, model)) if found else ("**ASHEM**", "its own")
        differs, said = (f"{found.over_seeds:+.2f}", found.verdict) if found else ("", "")
        rows.append([name, budget, f"{suite.interval(setting, model):.2f}", differs, said, f"{cost:.2f}"])
    return header, rows, "Means of seeds with 95 % intervals; inference as a share of the full model's."


def difference_table(suite: Suite, setting: str) -> Table:
    """ASHEM against the other selections."""
    header = (
        "model",
        "test ppl",
        "ASHEM less it: seeds",
        "documents",
        "verdict on ASHEM",
        "on hard tokens",
        "selected, %",
        "shallow ratio",
    )
    rows = []
    for model in suite.models(setting):
        found = difference(suite, setting, "ashem", model) if model != "ashem" else None
        hard = difference(suite, setting, "ashem", model, "nll_hard") if model != "ashem" else None
        share, ratio = suite.interval(setting, model, "hard_share"), suite.interval(setting, model, "shallow_ratio")
        rows.append(
            [
                f"**{model}**" if model == "ashem" else model,
                f"{suite.interval(setting, model):.2f}",
                f"{found.over_seeds:+.2f}" if found else "",
                f"{found.over_documents:+.2f}" if found else "",
                found.verdict if found else "",
                f"{hard.over_seeds:+.2f}" if hard else "",
                f"{100 * share.mean:.1f}" if share else "",
                f"{ratio.mean:.3f}" if ratio else "",
            ]
        )
    return (
        header,
        rows,
        "Block 2 on other tokens, at equal added MACs; shallow_wide has equal inference and total MACs.",
    )


def regime_table(suite: Suite) -> Table:
    """One row a setting."""
    settings = by_regime(suite)
    others = [model for model in suite.models(settings[0][1]) if model != "ashem"]
    header = (
        "tokens per parameter",
        "setting",
        "seeds",
        "always shallow",
        "ASHEM",
        *(f"less {other}" for other in others),
    )
    rows = []
    for seen, name in settings:
        cells = []
        for other in others:
            found = difference(suite, name, "ashem", other)
            cells.append(f"{found.over_seeds:+.2f} {found.verdict}" if found else "")
        shallow, own = suite.interval(name, "ashem", "shallow_ppl"), suite.interval(name, "ashem")
        seeds = len(suite.records[name]["ashem"])
        rows.append([f"{seen:.1f}", name, str(seeds), f"{shallow:.2f}", f"{own:.2f}", *cells])
    return (
        header,
        rows,
        "Routed test perplexity as phase 1 sees more text; differences over seeds, and the verdict on ASHEM.",
    )


def router_table(rows: list[dict[str, Any]]) -> Table:
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
            f"{row['promised_shallow_ratio']:.3f}",
            f"{row['shallow_ratio']:.3f}",
            f"{row['ece']:.3f}",
            f"{row['ece_after']:.3f} (T = {row['temperature']:.2f})",
        ]
        for row in rows
    ]
    return header, cells, "Exit criteria of the root pipeline's model on test text."


def ledger_table(ledger: Ledger) -> Table:
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
