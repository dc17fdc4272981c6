"""The mandatory numbers of a run, train and validation, and the check that a report holds them and no adjective.

Section 7 of the specification: numbers with their base, nothing interpreted.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from lego.base.artifacts import ArtifactError

BANNED = re.compile(
    r"\b(good|excellent|great|moderate|improved?|better|worse|bad|poor|strong|weak|perfect|acceptable|healthy|"
    r"significant(ly)?|successful(ly)?|high|low|very|well|nice|stable|unstable)\b",
    re.IGNORECASE,
)
NUMBER = r"-?\d+(?:\.\d+)?(?:e-?\d+)?"
COUNTED = rf"convergence {NUMBER}% \(\d+/\d+ tokens\)"
RANK = rf"ER {NUMBER}/\d+ \({NUMBER}%\)"
TRAIN = re.compile(
    rf"Train: {COUNTED}, iterations \d+/\d+, weight updates \d+ \| {RANK}, untrained ER {NUMBER}/\d+ \| "
    rf"CVFP loss {NUMBER}"
)
VALIDATION = re.compile(
    rf"Val:   {COUNTED}, passes \d+/\d+ \| {RANK} \| CVFP check final_diff = {NUMBER} \(threshold < {NUMBER}\)"
)


class ReportError(ArtifactError):
    """A report that lacks a number or passes judgement; the message says where."""


@dataclass(frozen=True)
class TrainFacts:
    """Of phase 1 on train text: tokens that moved less than the threshold in the last pass, passes, steps, ranks."""

    converged: int
    tokens: int
    iterations: int
    max_iterations: int
    updates: int
    rank: float
    untrained_rank: float
    dims: int
    cvfp: float

    def line(self) -> str:
        return (
            f"Train: convergence {100 * self.converged / self.tokens:.1f}% ({self.converged}/{self.tokens} tokens), "
            f"iterations {self.iterations}/{self.max_iterations}, weight updates {self.updates} | "
            f"ER {self.rank:.2f}/{self.dims} ({100 * self.rank / self.dims:.1f}%), "
            f"untrained ER {self.untrained_rank:.2f}/{self.dims} | CVFP loss {self.cvfp:.6f}"
        )


@dataclass(frozen=True)
class ValidationFacts:
    """Of frozen passes over validation text."""

    converged: int
    tokens: int
    passes: int
    max_passes: int
    rank: float
    dims: int
    final_diff: float
    threshold: float

    def line(self) -> str:
        return (
            f"Val:   convergence {100 * self.converged / self.tokens:.1f}% ({self.converged}/{self.tokens} tokens), "
            f"passes {self.passes}/{self.max_passes} | ER {self.rank:.2f}/{self.dims} "
            f"({100 * self.rank / self.dims:.1f}%) | CVFP check final_diff = {self.final_diff:.6f} "
            f"(threshold < {self.threshold:g})"
        )


def _require_shares(line: str) -> None:
    """Shares follow from their counts, and no count is above its whole."""
    for share, part, whole in re.findall(rf"({NUMBER})% \((\d+)/(\d+) tokens\)", line):
        if int(part) > int(whole) or abs(float(share) - 100 * int(part) / max(1, int(whole))) > 0.051:
            raise ReportError(f"{share}% is not {part}/{whole}")
    for part, whole, share in re.findall(rf"ER ({NUMBER})/(\d+) \(({NUMBER})%\)", line):
        if abs(float(share) - 100 * float(part) / int(whole)) > 0.051 + 1 / int(whole):  # the rank is rounded too
            raise ReportError(f"{share}% is not {part}/{whole}")
    for part, whole in re.findall(rf"({NUMBER})/(\d+)", line):
        if float(part) > int(whole):
            raise ReportError(f"{part} is above {whole}, of which it is a part")


def report(train: TrainFacts, validation: ValidationFacts) -> str:
    """Both lines, checked."""
    text = f"{train.line()}\n{validation.line()}"
    validate(text)
    return text


def validate(text: str) -> None:
    """Checks a report.

    Raises:
        ReportError: a mandatory line is missing or not in its form, a share does not follow from its counts, or a word
            judges.
    """
    for name, pattern in (("Train", TRAIN), ("Val", VALIDATION)):
        lines = [line for line in text.splitlines() if line.startswith(f"{name}:")]
        if len(lines) != 1:
            raise ReportError(f"a report has one line that begins with {name}:, this one has {len(lines)}")
        if not pattern.fullmatch(lines[0]):
            raise ReportError(f"the line {lines[0]!r} is not of the form that section 7 of the specification gives")
        _require_shares(lines[0])
    if judged := BANNED.search(text):
        raise ReportError(f"a report states numbers and judges nothing; take out {judged.group()!r}")
