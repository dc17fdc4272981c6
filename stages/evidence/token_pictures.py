"""Pictures of one run's tokens: how sure block 1 is, of what, and a stretch of text by depth."""

from __future__ import annotations

import keyword
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from matplotlib.patches import Rectangle

from lego.report.page import Figure
from lego.report.pictures import COLOURS, picture

SHALLOW, DEEP = "#cfe3f5", "#b3541e"
CLASSES: tuple[tuple[str, Callable[[str], bool]], ...] = (
    ("end of text", lambda token: token.startswith("<|")),
    ("newline and indentation", lambda token: not token.strip() and "\n" in token),
    ("space", lambda token: not token.strip()),
    ("number", lambda token: token.strip().isdigit()),
    ("keyword of Python", lambda token: keyword.iskeyword(token.strip())),
    ("punctuation", lambda token: not re.search(r"\w", token)),
    ("word or its beginning", lambda token: token.startswith(" ")),
    ("other letters", lambda token: True),
)


def confidences(folder: Path, confidence: np.ndarray, right: np.ndarray, threshold: float) -> Figure:
    """How sure block 1 is of test tokens, with the threshold of mining and routing."""
    with picture(folder, "confidence", height=4.0) as axes:
        parts, colours = [confidence[right], confidence[~right]], [COLOURS[2], COLOURS[4]]
        axes.hist(parts, np.linspace(0, 1, 41).tolist(), stacked=True, color=colours, label=["right", "wrong"])
        axes.axvline(threshold, color="#000000", linestyle="--", label=f"threshold {threshold:.3f}")
        axes.set_xlabel("block 1's confidence: its largest softmax probability")
        axes.set_ylabel("test tokens")
        axes.legend()
    share = (confidence < threshold).mean()
    caption = f"Confidence of block 1 on test text; {100 * share:.1f} % lie below the threshold (root pipeline)."
    return Figure(folder / "confidence.svg", "Histogram of confidences with the threshold", caption)


def class_of(token: str) -> str:
    """The first class that fits a token's text."""
    return next(name for name, fits in CLASSES if fits(token))


def hard_by_class(folder: Path, tokens: Sequence[str], hard: np.ndarray) -> Figure:
    """The share of each class's tokens that go deep."""
    kinds = np.array([class_of(token) for token in tokens])
    names = [name for name, _ in CLASSES if (kinds == name).any()]
    shares = [float(hard[kinds == name].mean()) for name in names]
    order = np.argsort(shares)
    with picture(folder, "classes", height=4.0) as axes:
        bars = axes.barh([names[i] for i in order], [shares[i] for i in order], color=COLOURS[0])
        labels = [f"{100 * shares[i]:.0f} % of {(kinds == names[i]).sum():,}" for i in order]
        axes.bar_label(bars, labels, padding=3, fontsize=9)
        axes.axvline(hard.mean(), color="#000000", linestyle="--", linewidth=1)
        axes.set_xlim(0, 1.15)
        axes.set_xlabel("share that is hard (dashed: of all tokens)")
        axes.grid(axis="y", visible=False)
    caption = "Which test tokens block 1 is unsure of, by what stands there (root pipeline)."
    return Figure(folder / "classes.svg", "Bars: hard share by class of token", caption)


def fullest(pieces: Sequence[tuple[str, bool]], columns: int, lines: int, stride: int = 200) -> int:
    """Where, in steps of `stride` tokens, a stretch begins that fills the most of so many lines."""

    def letters(begin: int) -> int:
        laid = laid_out(pieces[begin : begin + columns * lines], columns, lines)
        return sum(len(part.strip()) for _, _, part, _ in laid)

    return max(range(0, max(1, len(pieces) - stride), stride), key=letters)


def sample(folder: Path, pieces: Sequence[tuple[str, bool]], columns: int = 92, lines: int = 22) -> Figure:
    """The fullest stretch of test text, each token with the colour of the depth that predicted it."""
    begin = fullest(pieces, columns, lines)
    pieces = pieces[begin : begin + columns * lines]
    with picture(folder, "sample", width=9.2, height=0.24 * lines + 0.2) as axes:
        for row, column, part, deep in laid_out(pieces, columns, lines):
            axes.add_patch(Rectangle((column, row), len(part), 0.92, color=DEEP if deep else SHALLOW, linewidth=0))
            ink = "#ffffff" if deep else "#10263a"
            for place, letter in enumerate(part):
                x, y = column + place + 0.5, row + 0.5
                axes.text(x, y, letter, color=ink, family="monospace", fontsize=8.5, ha="center", va="center")
        axes.set_xlim(0, columns)
        axes.set_ylim(lines, 0)
        axes.axis("off")
    caption = "Test text by the depth that predicted each token: dark went through block 2, light left at block 1."
    return Figure(folder / "sample.svg", "A text sample coloured by depth", caption)


def laid_out(pieces: Sequence[tuple[str, bool]], columns: int, lines: int) -> Iterator[tuple[int, int, str, bool]]:
    """Row, column, text and depth of each piece of a line, until the lines are full."""
    row = column = 0
    for text, deep in pieces:
        for part in re.findall(r"\n|[^\n]+", text.replace("\t", "    ")):
            if part == "\n" or column + len(part) > columns:
                row, column = row + 1, 0
            if row >= lines:
                return
            if part != "\n":
                yield row, column, part, deep
                column += len(part)
