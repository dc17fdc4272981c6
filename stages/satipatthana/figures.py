"""The pictures of the Satipatthana page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lego.report.page import Figure
from lego.report.pictures import COLOURS, look, picture
from lego.report.stats import mean_interval
from stages.satipatthana.wording import Found

CLOSEST = 1e-4  # to a perfect AUROC that the picture tells apart


def drawn_as(number: int) -> dict[str, Any]:
    """Colour and marker of the n-th model, hollow once colours begin again; the same in every picture."""
    colour, marker = look(number)
    return {"color": colour, "marker": marker, "markerfacecolor": colour if number < len(COLOURS) else "none"}


def strangers(folder: Path, found: Found) -> Figure:
    """AUROC of each model on each kind of stranger."""
    kinds = [key.removeprefix("fpr95_") for key in found["satipatthana"] if key.startswith("fpr95_")]
    names = list(found)
    with picture(folder, "strangers", height=5.2) as axes:
        for number, name in enumerate(names):
            values = [max(CLOSEST, 1 - mean_interval(found[name][f"auroc_{kind}"]).mean) for kind in kinds]
            places = np.arange(len(kinds)) + 0.06 * (number - (len(names) - 1) / 2)  # side by side
            axes.plot(places, values, label=name, linestyle="none", markersize=6, **drawn_as(number))
        axes.set_xticks(range(len(kinds)), kinds)
        axes.set_yscale("log")
        axes.set_ylabel(f"1 - AUROC (log scale, from {CLOSEST:g}): lower is better")
        axes.figure.legend(loc="outside lower center", ncols=4, fontsize="small")
    said = "; ".join(f"{kind} {np.mean(found['satipatthana'][f'auroc_{kind}']):.3f}" for kind in kinds)
    return Figure(folder / "strangers.svg", f"AUROC of trust by kind: {said}", "Each model on each kind of stranger.")


def settling(folder: Path, found: Found, sweep: Sequence[int]) -> Figure:
    """Accuracy of the guide on the state, by steps."""
    models = [name for name in ("satipatthana", "compat") if f"aux_accuracy_{sweep[0]}T" in found[name]]
    with picture(folder, "settling", height=3.6) as axes:
        for number, name in enumerate(models):
            colour, marker = look(number)
            values = [mean_interval(found[name][f"aux_accuracy_{factor}T"]) for factor in sweep]
            axes.plot(sweep, [one.mean for one in values], marker=marker, color=colour, label=name)
            axes.fill_between(sweep, [o.low for o in values], [o.high for o in values], color=colour, alpha=0.2)
        axes.set_xscale("log")
        axes.set_xticks(list(sweep), [f"{factor} T" for factor in sweep])
        axes.set_ylabel("accuracy of the guide on the state")
        axes.set_xlabel("steps with the stop rule off, in multiples of those it was trained with")
        axes.legend()
    said = "; ".join(
        f"{name}: {np.mean(found[name][f'aux_accuracy_{sweep[0]}T']):.3f} at T, "
        f"{np.mean(found[name][f'aux_accuracy_{sweep[-1]}T']):.3f} at {sweep[-1]} T"
        for name in models
    )
    return Figure(
        folder / "settling.svg",
        f"Accuracy of the guide by steps. {said}",
        "What the settled state tells of the input, after more steps than in training.",
    )


def abstaining(folder: Path, found: Found) -> Figure:
    """Error rate of the most trusted share of test rows."""
    shares = sorted(int(key.removeprefix("risk_at_")) for key in found["satipatthana"] if key.startswith("risk_at_"))
    with picture(folder, "abstaining", height=4.6) as axes:
        for number, name in enumerate(found):
            if name != "compat":  # whose errors are of another order
                values = [100 * mean_interval(found[name][f"risk_at_{share}"]).mean for share in shares]
                axes.plot(shares, values, label=name, **drawn_as(number))
        axes.set_xlabel("coverage: most trusted share of test rows, %")
        axes.set_ylabel("errors among them, %")
        axes.figure.legend(loc="outside lower center", ncols=4, fontsize="small")
    said = ", ".join(f"{share} %: {100 * np.mean(found['satipatthana'][f'risk_at_{share}']):.2f} %" for share in shares)
    return Figure(
        folder / "abstaining.svg", f"Errors by coverage: {said}", "Errors among what is answered, by coverage."
    )


def trust_by_path(folder: Path, found: Found) -> Figure:
    """Mean trust of test rows by path."""
    paths = ("clean", "augmented", "mismatch", "drunk")
    with picture(folder, "paths", height=3.4) as axes:
        for number, name in enumerate(("satipatthana", "compat")):
            colour, marker = look(number)
            values = [mean_interval(found[name][f"trust_{path}"]) for path in paths]
            axes.plot(
                range(len(paths)), [one.mean for one in values], marker, color=colour, label=name, linestyle="none"
            )
        axes.set_xticks(range(len(paths)), paths)
        axes.set_ylabel("mean trust")
        axes.set_ylim(0, 1)
        axes.legend()
    said = "; ".join(f"{path} {np.mean(found['satipatthana'][f'trust_{path}']):.2f}" for path in paths)
    return Figure(folder / "paths.svg", f"Mean trust by path: {said}", "Mean trust of test rows on each path.")
