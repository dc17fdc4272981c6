"""Numbers over seeds as the pages of Satipatthana say them: intervals, who is ahead, what a part is worth."""

from __future__ import annotations

import math
from typing import Any

from lego.report.stats import Interval, mean_interval, verdict

Found = dict[str, dict[str, list[Any]]]
PARTS = {
    "all_features": "a head as the one in use",
    "without_log": "the three features that need no way: entropy, nearest prototype and reconstruction error",
    "latent": "the latent z alone",
    "recon_error": "no head: the reconstruction error",
    "without_vicara": "all features of a system without the loop, trained whole: states stay where they start",
}


def over_seeds(rows: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Each metric's values by seed."""
    return {key: [row[key] for row in rows] for key in rows[0]}


def interval(found: Found, model: str, key: str) -> Interval | None:
    values = [value for value in found[model].get(key, []) if value is not None]
    return mean_interval(values) if values else None


def by_seed(found: Found, model: str, key: str) -> str:
    return ", ".join("-" if value is None else f"{value:.3f}" for value in found[model][key])


def shown(value: Interval | None, digits: int = 4) -> str:
    if value is None:
        return ""
    half = (value.high - value.low) / 2
    return f"{value.mean:.{digits}f}" + (f" ± {half:.{digits}f}" if math.isfinite(half) else " (one seed)")


def ahead(found: Found, key: str, higher_is_better: bool) -> list[str]:
    """Peers whose number is better than the system's, with intervals over seeds that exclude no difference."""
    mine, names = found["satipatthana"][key], []
    for name in found:
        theirs = found[name].get(key)
        if name in ("satipatthana", "compat") or theirs is None:
            continue
        pairs = [(a, b) for a, b in zip(mine, theirs, strict=True) if a is not None and b is not None]
        if pairs and verdict(mean_interval([a - b if higher_is_better else b - a for a, b in pairs])) == "better":
            names.append(name)
    return names


def hardest_of(found: Found, kinds: list[str]) -> str:
    """The kind of strangers that trust tells worst."""
    return min(kinds, key=lambda kind: sum(found["satipatthana"][f"auroc_{kind}"]))


def apart(difference: Interval) -> str:
    """A difference in a number that should be high, with its interval and whether that excludes 0."""
    word = {"better": "lower", "worse": "higher"}.get(verdict(difference), verdict(difference))
    return f"{difference:+.4f} ({word})"


def answer(found: Found, kinds: list[str]) -> str:
    """The hardest strangers with the best of the compared scores, and every number in which a peer is ahead."""
    mine, hardest = found["satipatthana"], hardest_of(found, kinds)
    peers = [name for name in found if name not in ("satipatthana", "compat")]
    best = max(peers, key=lambda name: sum(found[name][f"auroc_{hardest}"]))
    pairs = zip(mine[f"auroc_{hardest}"], found[best][f"auroc_{hardest}"], strict=True)
    difference = mean_interval([a - b for a, b in pairs])
    word = {"better": "worse", "worse": "better"}.get(verdict(difference), verdict(difference))  # higher is better here
    mine_shown, theirs = (shown(interval(found, name, f"auroc_{hardest}")) for name in ("satipatthana", best))
    keys = ("accuracy", "auroc_correct", "aurc", "ece", *(f"auroc_{kind}" for kind in kinds))
    losses = {key: ahead(found, key, higher_is_better=key not in ("aurc", "ece")) for key in keys}
    lost = "; ".join(f"{key} ({', '.join(names)})" for key, names in losses.items() if names)
    return (
        f"Trust tells the hardest strangers ({hardest}) from test rows with an AUROC of **{mine_shown}**; the best of "
        f"the compared scores, {best}, with {theirs} ({difference:+.4f}: {word}). Peers that are ahead over the seeds: "
        f"{lost or 'none in any column'}."
    )


def worth(seeds: dict[str, list[dict[str, float]]], kinds: list[str]) -> str:
    """Which parts can be left out without a loss: mean AUROC over the kinds, with intervals over seeds."""
    mean = {
        name: [sum(one[f"auroc_{kind}"] for kind in kinds) / len(kinds) for one in rows] for name, rows in seeds.items()
    }
    said = []
    for name in PARTS:
        if name in mean and name != "all_features" and "all_features" in mean:
            difference = mean_interval([a - b for a, b in zip(mean[name], mean["all_features"], strict=True)])
            said.append(f"{name} {apart(difference)}")
    return f"Mean AUROC over the kinds, less that of all features: {'; '.join(said)}." if said else ""


def over_recon(found: Found, kind: str) -> str:
    """Trust's AUROC less that of the reconstruction error, with its interval over seeds and what that says."""
    mine = found["satipatthana"]
    difference = mean_interval([a - b for a, b in zip(mine[f"auroc_{kind}"], mine[f"auroc_{kind}_recon"], strict=True)])
    return apart(difference)


def more(found: Found, kinds: list[str]) -> tuple[list[str], list[list[str]], str]:
    """Numbers that the tables above leave out, on the hardest strangers."""
    hardest = hardest_of(found, kinds)
    keys = {"eaurc": "E-AURC", "augrc": "AUGRC", "nll": "NLL", "brier": "Brier"}
    keys |= {"nll_before_temperature": "NLL, temperature 1", "brier_before_temperature": "Brier, temperature 1"}
    keys |= {f"fpr95_{hardest}": "FPR95", f"aupr_{hardest}": "AUPR, known", f"aupr_out_{hardest}": "AUPR, strangers"}
    rows = [[name, *(shown(interval(found, name, key)) for key in keys)] for name in found]
    return ["model", *keys.values()], rows, f"The last three of {hardest}; peers have no temperature but their own."


def means_of(found: Found, model: str) -> dict[str, float]:
    """Mean over the seeds in which a number is defined."""
    return {key: one.mean for key in found[model] if (one := interval(found, model, key))}


def in_time(rows: int, took: dict[str, float]) -> str:
    """What answers to so many rows take in seconds, by model, in words."""
    mine = took["satipatthana"]
    what = "1 row takes" if rows == 1 else f"{rows:,} rows take"
    return (
        f"{what} {1000 * mine:.1f} ms, {mine / took['plain']:.1f} times the plain network and "
        f"{mine / took['ensemble']:.1f} times the ensemble"
    )
