"""Pictures that read in print and by the colour-blind, as PNG and SVG with the same bytes for the same numbers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#8c8c8c", "#7b5ea7", "#a6761d")
"""Okabe & Ito's palette for the colour-blind (2008), without its yellow, and three more."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">")
STYLE: dict[str, Any] = {
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "svg.hashsalt": "lego",  # else names inside the file are random
    "svg.fonttype": "path",
    "figure.dpi": 110,
}


@contextmanager
def picture(folder: str | Path, name: str, width: float = 8.0, height: float = 4.8) -> Iterator[Axes]:
    """Yields axes to draw on, and writes folder/name.png and folder/name.svg when the block ends.

    Args:
        folder: an existing folder.
        name: of the files, without suffix.
        width, height: in inches.
    """
    with matplotlib.rc_context(STYLE):
        figure: Figure
        figure, axes = pyplot.subplots(figsize=(width, height), layout="constrained")
        try:
            yield axes
            figure.savefig(Path(folder) / f"{name}.svg", metadata={"Date": None, "Creator": None})
            figure.savefig(Path(folder) / f"{name}.png", metadata={"Software": None})
        finally:
            pyplot.close(figure)


def look(number: int) -> tuple[str, str]:
    """Colour and marker of the n-th series; both differ, so that it reads without colour."""
    return COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
