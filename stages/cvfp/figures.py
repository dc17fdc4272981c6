"""The pictures of the CVFP page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axis import Axis
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

from lego.cvfp.sections import CvfpParams
from lego.report.page import Figure
from lego.report.pictures import look, picture
from lego.report.stats import Interval

FORMS = ("sound", "seed", "untrained", "end_to_end")  # what names of forms of CVFP begin with
Column = dict[str, list[float]]


def plain_numbers(axis: Axis) -> None:
    """Ticks of a log axis as plain numbers, dense enough for less than a decade."""
    axis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axis.set_major_formatter(ScalarFormatter())
    axis.set_minor_formatter(NullFormatter())


def perplexities(folder: Path, found: dict[str, Interval], ngrams: dict[str, float]) -> Figure:
    """Held-out perplexity of each model with its interval over seeds; n-grams as lines."""
    names = sorted(found, key=lambda name: found[name].mean)
    with picture(folder, "perplexity", height=0.42 * len(names) + 1.4) as axes:
        for place, name in enumerate(names):
            one, (colour, marker) = found[name], look(0 if name.startswith(FORMS) else 1)
            axes.plot(one.mean, place, marker, color=colour)
            axes.plot([one.low, one.high], [place, place], color=colour)
        for number, (name, value) in enumerate(ngrams.items()):
            axes.axvline(value, color="#8c8c8c", linestyle=("--", "-.", ":")[number % 3], label=f"{name} {value:.1f}")
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        axes.set_xscale("log")
        plain_numbers(axes.xaxis)
        axes.set_xlabel("held-out perplexity (log scale); bars: 95 % interval over seeds")
        axes.legend()
    return Figure(
        folder / "perplexity.svg",
        "Held-out perplexity of each model as a point with a bar: " + ", ".join(f"{n} {found[n]:.1f}" for n in names),
        "Held-out perplexity with equal tokens and parameters; circles are forms of CVFP.",
    )


def scaling(folder: Path, curves: dict[str, list[tuple[float, Interval]]]) -> Figure:
    """Held-out perplexity by train tokens."""
    with picture(folder, "scaling", height=3.8) as axes:
        for number, (name, points) in enumerate(curves.items()):
            colour, marker = look(number)
            sizes, values = [size for size, _ in points], [one for _, one in points]
            errors = [[one.mean - one.low for one in values], [one.high - one.mean for one in values]]
            axes.errorbar(
                sizes, [one.mean for one in values], errors, marker=marker, color=colour, label=name, capsize=3
            )
        axes.set_xscale("log")
        axes.set_yscale("log")
        for axis in (axes.xaxis, axes.yaxis):
            plain_numbers(axis)
        axes.set_xlabel("train tokens (log scale)")
        axes.set_ylabel("held-out perplexity (log scale)")
        axes.legend()
    ends = ", ".join(f"{name} {points[0][1].mean:.1f} to {points[-1][1].mean:.1f}" for name, points in curves.items())
    return Figure(
        folder / "scaling.svg",
        f"Held-out perplexity from the least to the most train text: {ends}",
        "Held-out perplexity by train text; networks have equal parameters, as many passes and so fewer steps on less "
        "text; bars: 95 % interval over seeds, of which the whole text has more; the n-gram has none.",
    )


def memory(folder: Path, facts: dict[str, Any], params: CvfpParams) -> Figure:
    """What a context tells of the tokens before it."""
    lags = [lag for lag in range(params.checks.lags + 1) if f"r2_lag_{lag}" in facts]
    values = [facts[f"r2_lag_{lag}"] for lag in lags]
    with picture(folder, "memory", height=3.6) as axes:
        colour, marker = look(0)
        axes.plot(lags, values, marker=marker, color=colour)
        axes.axhline(0, color="#8c8c8c", linewidth=0.8)
        axes.set_xlabel("tokens back")
        axes.set_ylabel("R² of a ridge regression")
    text = ", ".join(f"{lag}: {value:.2f}" for lag, value in zip(lags, values, strict=True))
    return Figure(
        folder / "memory.svg", f"R² by lag: {text}", "How well a context tells the embedding of the token so far back."
    )


def settling(folder: Path, passes: Column, trials: Column, threshold: float) -> Figure:
    """How far frozen passes still move contexts."""
    with picture(folder, "settling", height=3.6) as axes:
        for number, (x, y, label) in enumerate(
            (
                (passes["pass"], passes["l2"], "train: mean L2 change"),
                (trials["trial"], trials["mse"], "validation: MSE between trials"),
            )
        ):
            colour, marker = look(number)
            axes.plot(x, [max(value, 1e-16) for value in y], marker=marker, color=colour, label=label)
        axes.axhline(threshold, color="#8c8c8c", linestyle="--", label=f"passes below {threshold:g} (L2)")
        axes.set_yscale("log")
        axes.set_xlabel("frozen pass, each from the last context of the one before")
        axes.legend()
    return Figure(
        folder / "settling.svg",
        f"Change of contexts by frozen pass: train {passes['l2'][-1]:.1e} at last, validation {trials['mse'][-1]:.1e}",
        "Change of the contexts from one frozen pass to the next. Under fixed weights and a network that forgets, only "
        "the first tokens of a pass can move.",
    )
