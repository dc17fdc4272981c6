"""From the records of metrics/evidence to statements: means with intervals, paired differences, verdicts."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np

from lego.report.stats import Interval, bootstrap_ppl_difference, mean_interval, verdict
from stages.evidence.records import results

DEEP = ", always deep"


@dataclass(frozen=True)
class Suite:
    """The records of one suite: setting -> model -> seed -> record.

    A model with two exits has a second entry for its full depth on every token.
    """

    name: str
    records: dict[str, dict[str, dict[str, dict[str, Any]]]]

    @classmethod
    def load(cls, name: str) -> Suite:
        """A suite's file; empty if there is none."""
        return cls.of(name, results(name))

    @classmethod
    def of(cls, name: str, found: dict[str, Any]) -> Suite:
        """The records with the always-deep entries added."""
        records = {}
        for setting, models in found.items():
            records[setting] = {model: seeds for model, seeds in models.items() if seeds}
            for model, seeds in list(records[setting].items()):
                deep = {seed: _deep(record) for seed, record in seeds.items()}
                if any(record["metrics"]["threshold"] is not None for record in seeds.values()):
                    records[setting][model + DEEP] = deep
        return cls(name, records)

    def models(self, setting: str) -> list[str]:
        """Those with at least one seed."""
        return list(self.records.get(setting, {}))

    def values(self, setting: str, model: str, key: str) -> list[float]:
        """A metric of each seed, in their order."""
        seeds = self.records[setting][model]
        return [seeds[seed]["metrics"][key] for seed in sorted(seeds, key=int)]

    def interval(self, setting: str, model: str, key: str = "ppl") -> Interval | None:
        """Mean over seeds with its 95 % interval; None where the metric has no meaning."""
        values = [value for value in self.values(setting, model, key) if value is not None]
        return mean_interval(values) if values else None

    def by_perplexity(self, setting: str) -> list[str]:
        """Models, the lowest mean test perplexity first."""
        return sorted(self.models(setting), key=lambda name: fmean(self.values(setting, name, "ppl")))


def _deep(record: dict[str, Any]) -> dict[str, Any]:
    """A record of a model with two exits as if every token had gone deep."""
    deep = copy.deepcopy(record)
    answered = {"ppl": "deep_ppl", "flops_ratio": "deep_flops_ratio", "hard_ppl_after": "hard_ppl_deep"}
    deep["metrics"] |= {key: record["metrics"][full] for key, full in answered.items()} | {"shallow_ratio": 0.0}
    deep["documents"]["nll"] = record["documents"]["nll_deep"]
    return deep


@dataclass(frozen=True)
class Difference:
    """Test perplexity of one model less another's: over seeds, and over documents with the seeds as they are."""

    seeds: int
    over_seeds: Interval
    over_documents: Interval

    @property
    def verdict(self) -> str:
        return "one seed" if self.seeds == 1 else verdict(self.over_seeds, self.over_documents)


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
    return _paired(mine, theirs, column, shallow)


def between_settings(suite: Suite, setting: str, other: str, model: str = "ashem") -> Difference | None:
    """A model under one setting less itself under another, on the same test text; None where a seed or text differs."""
    mine, theirs = (suite.records.get(name, {}).get(model, {}) for name in (setting, other))
    same = all(
        mine[seed]["documents"]["tokens"] == theirs[seed]["documents"]["tokens"] for seed in mine.keys() & theirs.keys()
    )
    return _paired(mine, theirs, "nll", False) if same else None


def _paired(mine: dict[str, Any], theirs: dict[str, Any], column: str, shallow: bool) -> Difference | None:
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
    """How much text phase 1 saw, of an `ashem` record; NaN for a block 1 that was given."""
    return record["phase1"]["train_tokens"] / record["phase1"]["parameters"] or float("nan")


def shallow_gain(suite: Suite, setting: str) -> Difference | None:
    """ASHEM less its own block 1."""
    return difference(suite, setting, "ashem", "ashem", shallow=True)


def _first(suite: Suite, setting: str, model: str) -> dict[str, Any]:
    return next(iter(suite.records[setting][model].values()))["metrics"]


def budget_kind(suite: Suite, setting: str, model: str) -> str:
    """Which budget a model's training had."""
    return "total" if _first(suite, setting, model)["added_macs"] is None else "added"


def leaky(suite: Suite, setting: str, model: str) -> bool:
    return bool(_first(suite, setting, model)["leaky"])


def rivals(suite: Suite, setting: str, kind: str) -> list[str]:
    """What ASHEM is compared with at one budget, the lowest test perplexity first; nothing that leaks."""
    others = [model for model in suite.by_perplexity(setting) if not model.startswith("ashem")]
    fair = [model for model in others if not leaky(suite, setting, model)]
    return [model for model in fair if budget_kind(suite, setting, model) == kind]


def by_regime(suite: Suite) -> list[tuple[float, str]]:
    """Settings by how much text phase 1 saw, with tokens per parameter."""
    seen = [
        (tokens_per_parameter(next(iter(models["ashem"].values()))), name)
        for name, models in suite.records.items()
        if models.get("ashem")
    ]
    return sorted(seen)


def compared_in(suite: Suite) -> list[str]:
    """Models that any setting compares with ASHEM, in the order in which they first appear."""
    names = dict.fromkeys(model for setting in suite.records for model in suite.models(setting))
    return [model for model in names if not model.startswith("ashem")]
