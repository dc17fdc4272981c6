"""The pictures of the report, drawn from records and from one run's token tables."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as PlotFigure
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter, SymmetricalLogLocator

from lego.report.page import Figure
from lego.report.pictures import COLOURS, look, picture
from lego.report.stats import Interval
from stages.evidence.summary import DEEP, Suite, by_regime, compared_in, difference, leaky


def points(
    axes: Axes,
    x: Sequence[float],
    y: Sequence[Interval],
    number: int,
    label: str,
    line: str = "-",
    hollow: bool = False,
) -> None:
    """Points with their intervals; one value has none."""
    spread = [float(np.nan_to_num(one.high - one.mean)) for one in y]
    colour, marker = look(number)
    axes.errorbar(
        x,
        [one.mean for one in y],
        spread,
        color=colour,
        marker=marker,
        markerfacecolor="#ffffff" if hollow else colour,
        markersize=7,
        label=label,
        linestyle=line,
        capsize=3,
    )


def legend_below(axes: Axes) -> None:
    figure = axes.figure
    assert isinstance(figure, PlotFigure)
    figure.legend(*axes.get_legend_handles_labels(), fontsize=9, ncols=3, loc="outside lower center")


def routed_against_cost(folder: Path, suite: Suite, setting: str) -> Figure:
    """Every model's test perplexity against what a token costs at inference, ASHEM's thresholds as a line."""
    records = suite.records[setting]["ashem"]
    sweeps = [records[seed]["sweep"] for seed in sorted(records, key=int)]
    with picture(folder, "cost", height=5.4) as axes:
        x, y = (np.mean([sweep[key] for sweep in sweeps], axis=0) for key in ("flops_ratio", "ppl"))
        axes.plot(x, y, color=COLOURS[0], linewidth=1.5, label="ASHEM, all thresholds")
        oracle = suite.interval(setting, "ashem", "oracle_ppl")
        assert oracle
        axes.axhline(oracle.mean, color="#555555", linestyle="--", linewidth=1, label="oracle of both exits")
        shown = [model for model in suite.models(setting) if not leaky(suite, setting, model)]
        for number, model in enumerate(sorted(name for name in shown if DEEP not in name)):
            for name in (model, model + DEEP):
                if name in shown:
                    ppl, cost = suite.interval(setting, name), suite.interval(setting, name, "flops_ratio")
                    assert ppl
                    assert cost
                    label = model if name == model else "_hollow"
                    points(axes, [cost.mean], [ppl], number, label, line="", hollow=name != model)
        axes.set_xlabel("inference cost of a token, as a share of the full model's MACs")
        axes.set_ylabel("test perplexity")
        legend_below(axes)
    caption = (
        f"Routed test perplexity against inference cost, mean of {len(sweeps)} seeds with 95 % intervals over seeds. "
        "The line is ASHEM at every threshold; the dashed one is the oracle that knows both losses of every token. "
        "Hollow: the same model with every token at its full depth. What leaks is left out."
    )
    return Figure(folder / "cost.svg", "Scatter of test perplexity against inference cost of all models", caption)


def training_curves(folder: Path, suite: Suite, setting: str) -> Figure:
    """Validation perplexity of the first seed against training MACs."""
    with picture(folder, "curves", height=5.4) as axes:
        first = next(iter(suite.records[setting]["ashem"].values()))["phase1_curve"]
        axes.plot(first["macs"], first["val_ppl"], color="#555555", linewidth=1.5, linestyle=":", label="phase 1")
        shown = [name for name in suite.models(setting) if DEEP not in name and not leaky(suite, setting, name)]
        for number, model in enumerate(shown):  # the curve of what leaks is of text that it trained on
            curve = suite.records[setting][model].get("0", {}).get("curve")
            if curve:
                colour, marker = look(number)
                axes.plot(curve["macs"], curve["val_ppl"], color=colour, marker=marker, markersize=4, label=model)
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(ScalarFormatter())
        axes.yaxis.set_minor_formatter(ScalarFormatter())
        axes.set_xlabel("training MACs, those of a given block 1 included")
        axes.set_ylabel("validation perplexity")
        legend_below(axes)
    caption = "Validation perplexity against training MACs, seed 0, of the learning rate that was taken."
    return Figure(folder / "curves.svg", "Training curves of all models against training cost", caption)


def regime_map(folder: Path, suite: Suite) -> Figure:
    """ASHEM less each other model, against how much text phase 1 had seen; settings of another width stand alone."""
    with picture(folder, "regime", height=5.8) as axes:
        for number, other in enumerate(compared_in(suite)):
            found = [(seen, name, difference(suite, name, "ashem", other)) for seen, name in by_regime(suite)]
            for same in (True, False):
                known = [(seen, one.over_seeds) for seen, name, one in found if one and ("dim" in name) != same]
                if known:
                    apart = [seen * 1.04 ** (number - 3) for seen, _ in known]
                    label, line = (f"against {other}", "-") if same else (f"_{other}", "")
                    points(axes, apart, [one for _, one in known], number, label, line, hollow=DEEP in other)
        axes.axhline(0, color="#000000", linewidth=1)
        axes.set_xscale("log")
        axes.set_yscale("symlog", linthresh=1)
        axes.yaxis.set_major_formatter(ScalarFormatter())
        axes.yaxis.set_major_locator(SymmetricalLogLocator(base=10, linthresh=1, subs=(1, 2, 5)))
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))  # all ten would run into each other
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("tokens of phase 1 per parameter of block 1")
        axes.set_ylabel("ASHEM less the other, test perplexity\n(below 0: ASHEM is better)")
        legend_below(axes)
    caption = (
        "Difference in test perplexity with 95 % intervals over seeds. Below 0 ASHEM is better. All have the same "
        "added MACs. Points off the lines: another width."
    )
    return Figure(folder / "regime.svg", "Differences of ASHEM to other models as phase 1 sees more text", caption)


def hard_against_random(folder: Path, suite: Suite) -> Figure:
    """ASHEM less random selection at each ratio."""
    shares = [re.fullmatch(r"ratio_([1-9][0-9])", setting) for setting in suite.records]
    ratios = [int(share[1]) for share in shares if share and difference(suite, share[0], "ashem", "random")]
    with picture(folder, "ratios", height=4.0) as axes:
        for column, label, number in (("nll", "routed", 0), ("nll_hard", "hard tokens", 1)):
            found_all = [(ratio, difference(suite, f"ratio_{ratio}", "ashem", "random", column)) for ratio in ratios]
            known = [(ratio + number, d.over_seeds) for ratio, d in found_all if d]
            points(axes, [r for r, _ in known], [one for _, one in known], number, label)
        axes.axhline(0, color="#000000", linewidth=1)
        axes.set_yscale("symlog", linthresh=1)  # routed differences are below 1, those on hard tokens far beyond
        axes.set_xlabel("hard_example_ratio, %")
        axes.set_ylabel("ASHEM less random selection,\ntest perplexity")
        axes.legend()
    caption = "Mining hard tokens against as many random ones, with 95 % intervals over seeds. Below 0 hard is better."
    return Figure(folder / "ratios.svg", "Difference between hard and random selection by ratio", caption)
