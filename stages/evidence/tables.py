"""Tables of the report: models beside each other."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from stages.evidence.suites import rate_keys
from stages.evidence.summary import (
    DEEP,
    Difference,
    Suite,
    between_settings,
    budget_kind,
    by_regime,
    compared_in,
    difference,
    leaky,
)

OWN = ("ashem", "ashem" + DEEP)
Table = tuple[Sequence[str], list[list[str]], str]
"""Header, rows and caption."""


def cells_of(found: Difference | None) -> list[str]:
    """Difference over seeds, over documents, and the verdict."""
    return [f"{found.over_seeds:+.2f}", f"{found.over_documents:+.2f}", found.verdict] if found else ["", "", ""]


def at_end(suite: Suite, setting: str, model: str) -> str:
    """A mark if the learning rate that was taken is an end of what the first seed of the record tried."""
    seeds = suite.records[setting][model]
    first = seeds[min(seeds, key=int)]
    factors, params, rate = first["params"]["search.lr_factors"], first["params"], first["metrics"]["lr"]
    base = next(params[key] for key in rate_keys(model.removesuffix(DEEP)) if key in params)
    ends = [base * factor for factor in (min(factors), max(factors))]
    return " (end)" if len(factors) > 1 and any(abs(rate - end) < 1e-9 * rate for end in ends) else ""


def searched(suite: Suite) -> str:
    """Of which learning rates the models of a suite took theirs."""
    records = [one for models in suite.records.values() for seeds in models.values() for one in seeds.values()]
    if all(len(one["params"]["search.lr_factors"]) == 1 for one in records):
        return "each at the one learning rate of params.yaml."
    return "(end): the rate is an end of those tried."


def main_table(suite: Suite, setting: str) -> Table:
    """All models of the core suite, the best first."""
    header = (
        "model",
        "budget",
        "seeds",
        "test ppl",
        "ASHEM less it: seeds",
        "documents",
        "ASHEM is",
        "always deep less it: seeds",
        "it is",
        "hard ppl",
        "inference MACs",
        "training MACs",
        "off budget, %",
        "rate",
    )
    rows = []
    for model in suite.by_perplexity(setting):
        off = max(abs(value) for value in suite.values(setting, model, "distance_from_budget"))
        hard = suite.interval(setting, model, "hard_ppl_after")
        shown = f"**{model}**" if model == "ashem" else f"{model} (leaky)" if leaky(suite, setting, model) else model
        rows.append(
            [
                shown,
                "its own" if model in OWN else budget_kind(suite, setting, model),
                str(len(suite.records[setting][model])),
                f"{suite.interval(setting, model):.2f}",
                *cells_of(difference(suite, setting, "ashem", model) if model not in OWN else None),
                *cells_of(difference(suite, setting, OWN[1], model) if model not in OWN else None)[::2],
                f"{hard.mean:.1f}" if hard else "",
                f"{fmean(suite.values(setting, model, 'flops_ratio')):.3f}",
                f"{fmean(suite.values(setting, model, 'train_macs')):.3e}",
                f"{100 * off:.2f}",
                f"{suite.values(setting, model, 'lr')[0]:g}{at_end(suite, setting, model)}",
            ]
        )
    return header, rows, "Test perplexity; inference MACs as a share of the full model's; (end): of the rates tried."


def rates_table(suite: Suite, setting: str) -> Table:
    """The validation perplexity of every rate that the first seed tried, of the records that have it."""
    rows = []
    for model, seeds in suite.records[setting].items():
        if DEEP not in model and (tried := seeds.get("0", {}).get("tried")):
            rates = sorted(tried, key=float)
            said = {rate: "diverged" if tried[rate] is None else f"{tried[rate]:.2f}" for rate in rates}
            rows.append([model, *(f"{rate}: {one}" for rate, one in said.items())])
    width = max((len(row) for row in rows), default=1)
    header = ("model", *("rate: validation ppl" for _ in range(width - 1)))
    return header, [row + [""] * (width - len(row)) for row in rows], "What the search of the learning rate found."


def short_table(suite: Suite, setting: str) -> Table:
    """ASHEM, routed and always deep, beside every model that does not leak, the best first, as the README shows it."""
    header = (
        "model",
        "budget",
        "test perplexity",
        "ASHEM less it",
        "is",
        "always deep less it",
        "is",
        "inference MACs",
    )
    rows = []
    for model in suite.by_perplexity(setting):
        if leaky(suite, setting, model):
            continue
        own = model in OWN
        found = [None if own else difference(suite, setting, mine, model) for mine in OWN]
        name = f"**{model.replace('ashem', 'ASHEM')}**" if own else model
        rows.append(
            [
                name,
                "its own" if own else budget_kind(suite, setting, model),
                f"{suite.interval(setting, model):.2f}",
                *(cell for one in found for cell in cells_of(one)[::2]),
                f"{fmean(suite.values(setting, model, 'flops_ratio')):.2f}",
            ]
        )
    return header, rows, "Means of seeds with 95 % intervals; inference as a share of the full model's."


def difference_table(suite: Suite, setting: str) -> Table:
    """ASHEM against the other selections."""
    header = (
        "model",
        "test ppl",
        "ASHEM less it: seeds",
        "documents",
        "ASHEM is",
        "on hard tokens",
        "selected, %",
        "shallow ratio",
    )
    rows = []
    for model in suite.by_perplexity(setting):
        hard = difference(suite, setting, "ashem", model, "nll_hard") if DEEP not in model else None
        share, ratio = suite.interval(setting, model, "hard_share"), suite.interval(setting, model, "shallow_ratio")
        rows.append(
            [
                f"**{model}**" if model == "ashem" else model,
                f"{suite.interval(setting, model):.2f}{at_end(suite, setting, model)}",
                *cells_of(difference(suite, setting, "ashem", model) if model != "ashem" else None),
                f"{hard.over_seeds:+.2f}" if hard and model != "ashem" else "",
                f"{100 * share.mean:.1f}" if share else "",
                f"{ratio.mean:.3f}" if ratio else "",
            ]
        )
    caption = f"Block 2 on other tokens, at equal added MACs; {searched(suite)}"
    return header, rows, caption


def regime_table(suite: Suite, mine: str = "ashem") -> Table:
    """One row a setting; differences are of `mine`, ASHEM or its always-deep form."""
    others = compared_in(suite)
    own_columns = ("always shallow", "ASHEM", "always deep")
    header = ("tokens per parameter", "setting", "seeds", *own_columns, *(f"less {o}" for o in others))
    rows = []
    for seen, name in by_regime(suite):
        cells = []
        for other in others:
            found = difference(suite, name, mine, other)
            mark = at_end(suite, name, other) if found else ""
            cells.append(f"{found.over_seeds:+.2f} {found.verdict}{mark}" if found else "")
        shallow, own, deep = (suite.interval(name, "ashem", key) for key in ("shallow_ppl", "ppl", "deep_ppl"))
        seeds, mark = len(suite.records[name]["ashem"]), at_end(suite, name, "ashem")
        rows.append([f"{seen:.1f}", name, str(seeds), f"{shallow:.2f}", f"{own:.2f}{mark}", f"{deep:.2f}", *cells])
    caption = (
        f"Test perplexity as phase 1 sees more text; {mine.replace('ashem', 'ASHEM')}: less the others over seeds, and "
        "what it is by seeds and documents; "
        "(end): the rate of the model is an end of those tried."
    )
    return header, rows, caption


def ratios_table(suite: Suite) -> Table:
    """Hard against random tokens at every share, routed alike and with the random ones at full depth."""
    header = (
        "hard_example_ratio",
        "ASHEM",
        "random",
        "less random",
        "ASHEM is",
        "less random, always deep",
        "ASHEM is",
    )
    rows = []
    for setting in suite.records:
        names = ("ashem", "random")
        found = [difference(suite, setting, "ashem", other) for other in ("random", "random" + DEEP)]
        if all(name in suite.models(setting) for name in names):
            means = (f"{suite.interval(setting, n):.2f}{at_end(suite, setting, n)}" for n in names)
            cells = [cell for one in found for cell in cells_of(one)[::2]]
            rows.append([f"0.{setting.removeprefix('ratio_')}", *means, *cells])
    caption = (
        "Block 2 trained on hard tokens against as many random ones, by the share that it is trained on; both route "
        f"the same share, or go always deep; {searched(suite)}"
    )
    return header, rows, caption


def options_table(suite: Suite, base: str) -> Table:
    """ASHEM with one parameter changed at a time, the best first."""
    header = (
        "changed",
        "seeds",
        "test ppl",
        "less unchanged: seeds",
        "documents",
        "it is",
        "added MACs",
        "inference MACs",
    )
    rows = []
    ran = [setting for setting in suite.records if "ashem" in suite.models(setting)]
    for setting in sorted(ran, key=lambda name: fmean(suite.values(name, "ashem", "ppl"))):
        cells = cells_of(between_settings(suite, setting, base) if setting != base else None)
        rows.append(
            [
                "**nothing**" if setting == base else setting,
                str(len(suite.records[setting]["ashem"])),
                f"{suite.interval(setting, 'ashem'):.2f}",
                *cells,
                f"{fmean(suite.values(setting, 'ashem', 'added_macs')):.3e}",
                f"{fmean(suite.values(setting, 'ashem', 'flops_ratio')):.3f}",
            ]
        )
    caption = (
        "ASHEM's test perplexity, one parameter changed at a time, at the one learning rate that suits the defaults "
        "unchanged; some changes also change what phase 2 costs."
    )
    return header, rows, caption
