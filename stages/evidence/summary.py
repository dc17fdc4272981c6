"""From the records of metrics/evidence to statements: means with intervals, paired differences, verdicts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lego.artifacts import read_json
from lego.stats import Interval, bootstrap_ppl_difference, mean_interval, verdict

RESULTS = Path("metrics/evidence")


@dataclass(frozen=True)
class Suite:
    """The records of one suite: setting -> model -> seed -> record."""

    name: str
    records: dict[str, dict[str, dict[str, dict[str, Any]]]]

    @classmethod
    def load(cls, name: str) -> Suite:
        file = RESULTS / f"{name}.json"
        return cls(name, read_json(file) if file.exists() else {})

    def models(self, setting: str) -> list[str]:
        """Those with at least one seed."""
        return [model for model, seeds in self.records.get(setting, {}).items() if seeds]

    def values(self, setting: str, model: str, key: str) -> list[float]:
        """A metric of each seed, in their order."""
        seeds = self.records[setting][model]
        return [seeds[seed]["metrics"][key] for seed in sorted(seeds, key=int)]

    def interval(self, setting: str, model: str, key: str = "ppl") -> Interval | None:
        """Mean over seeds with its 95 % interval; None where the metric has no meaning."""
        values = [value for value in self.values(setting, model, key) if value is not None]
        return mean_interval(values) if values else None


@dataclass(frozen=True)
class Difference:
    """Test perplexity of one model less another's: over seeds, and over documents with the seeds as they are."""

    seeds: int
    over_seeds: Interval
    over_documents: Interval

    @property
    def verdict(self) -> str:
        return verdict(self.over_seeds, self.over_documents)


def difference(
    suite: Suite, setting: str, model: str, other: str, column: str = "nll", shallow: bool = False
) -> Difference | None:
    """Model less other on the seeds that both have; None if there is none.

    Args:
        suite, setting: where.
        model, other: names.
        column: of the documents: nll (as the model answers), nll_deep or nll_hard.
        shallow: compare with `other`'s block 1 before phase 2 instead.
    """
    mine, theirs = (suite.records.get(setting, {}).get(name, {}) for name in (model, other))
    seeds = sorted(mine.keys() & theirs.keys(), key=int)
    if not seeds:
        return None
    kind = "shallow_documents" if shallow else "documents"
    a = np.array([mine[seed]["documents"][column] for seed in seeds])
    b = np.array([theirs[seed][kind][column] for seed in seeds])
    count = "hard_tokens" if column == "nll_hard" else "tokens"
    counts = np.array([mine[seed]["documents"][count] for seed in seeds])  # (S, N); hard ones differ by seed
    ppl = [np.exp(values.sum(axis=1) / counts.sum(axis=1)) for values in (a, b)]
    return Difference(len(seeds), mean_interval(ppl[0] - ppl[1]), bootstrap_ppl_difference(a, b, counts))


def tokens_per_parameter(record: dict[str, Any]) -> float:
    """How much text phase 1 saw, of an `ashem` record."""
    return record["phase1"]["train_tokens"] / record["phase1"]["parameters"]


def shallow_gain(suite: Suite, setting: str) -> Difference | None:
    """ASHEM less its own block 1."""
    return difference(suite, setting, "ashem", "ashem", shallow=True)


def budget_kind(suite: Suite, setting: str, model: str) -> str:
    """Which budget a model's training had."""
    metrics = next(iter(suite.records[setting][model].values()))["metrics"]
    return "total" if metrics["added_macs"] is None else "added"


def leaky(suite: Suite, setting: str, model: str) -> bool:
    return bool(next(iter(suite.records[setting][model].values()))["metrics"]["leaky"])


def by_regime(suite: Suite) -> list[tuple[float, str]]:
    """Settings by how much text phase 1 saw, with tokens per parameter."""
    seen = [
        (tokens_per_parameter(next(iter(models["ashem"].values()))), name)
        for name, models in suite.records.items()
        if models.get("ashem")
    ]
    return sorted(seen)
