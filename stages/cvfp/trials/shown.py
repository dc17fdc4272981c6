"""The trials on the CVFP page: what was changed in `sound`, one key or a few at a time, and what came of it."""

from __future__ import annotations

import math
from typing import Any

from lego.cvfp.contest import trial_digest
from lego.cvfp.sections import PARAMS, CvfpParams, changed
from lego.cvfp.text import SPLITS
from lego.report.page import Page

BASE = "unchanged"
NOT_RUN = "Not run yet: `dvc repro stages/cvfp/trials/dvc.yaml`."


def current(params: CvfpParams, found: dict[str, dict[str, Any]], tokens: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Trials of this text and these parameters, the lowest validation loss first."""
    text = {split: tokens[f"{split}_sha256"] for split in SPLITS}
    fits = {
        name: found[name]
        for name, changes in params.contest.trials.items()
        if name in found
        and found[name]["made_of"] == trial_digest(changed(params, changes, f"{PARAMS}: contest.trials.{name}"), text)
    }
    return dict(sorted(fits.items(), key=lambda one: float(one[1].get("val_loss", math.inf))))


def by_seed(one: dict[str, Any], key: str) -> list[float]:
    return [one[f"{key}_{seed}"] for seed in range(len(one)) if f"{key}_{seed}" in one]


def rows(params: CvfpParams, trials: dict[str, dict[str, Any]]) -> list[list[str]]:
    """One row a trial; differences from `unchanged` seed by seed, as two seeds give no interval worth its name."""
    shown = []
    for name, one in trials.items():
        diverged = bool(one["diverged"])
        cells = ["diverged", "", "", ""] if diverged else [f"{one['val_loss']:.3f}", "", f"{one['ppl']:.2f}", ""]
        if name != BASE and BASE in trials and not diverged:
            for place, key, digits in ((1, "val_loss", 3), (3, "ppl", 2)):
                pairs = zip(by_seed(one, key), by_seed(trials[BASE], key), strict=True)
                cells[place] = ", ".join(f"{mine - base:+.{digits}f}" for mine, base in pairs)
        changes = ", ".join(f"{key}: {value}" for key, value in params.contest.trials[name].items())
        shown.append([f"**{name}**" if name == BASE else name, changes, *cells])
    return shown


def write(page: Page, params: CvfpParams, found: dict[str, dict[str, Any]], tokens: dict[str, Any]) -> None:
    """The section of the page."""
    page.heading("What was tried")
    trials = current(params, found, tokens)
    if not trials:
        page.text(NOT_RUN)
        return
    header = ["changed", "to", "validation loss, nats", "less unchanged, by seed", "held-out perplexity"]
    page.table(
        [*header, "less unchanged, by seed"],
        rows(params, trials),
        f"`sound` with one change each, {params.contest.trial_seeds} seeds at its default rate, by validation loss. "
        "What is lower than unchanged on both seeds is a candidate for the default. Trials before these stand in "
        "docs/results.md.",
    )
    if left_out := [name for name in params.contest.trials if name not in trials]:
        page.text(f"{NOT_RUN.partition(':')[0]}, or outdated: {', '.join(left_out)}.")
