"""The keys of every model's metrics file, and what people are shown of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from lego.evaluation.routed import Route, TokenTable, perplexity
from lego.model.cost import Ledger
from lego.model.transformer import compute_cost
from lego.tokens.blocks import bits_per_byte

MODEL_KEYS = (
    "acc",
    "ppl",
    "bits_per_byte",
    "shallow_ppl",
    "deep_ppl",
    "hard_ppl_before",
    "hard_ppl_after",
    "hard_ppl_deep",
    "val_ppl",
    "val_shallow_ppl",
    "val_hard_ppl_before",
    "val_hard_ppl_after",
    "shallow_ratio",
    "compute_cost",
    "flops_ratio",
    "deep_flops_ratio",
    "break_even_shallow_ratio",
    "lr",
    "train_macs",
    "added_macs",
    "budget_macs",
    "distance_from_budget",
    "n_hard",
    "hard_share",
    "threshold",
    "oracle_ppl",
    "leaky",
)
"""Keys of every model's metrics file, so that comparisons and tables line up; null where one has no meaning."""

SUMMARY_KEYS = ("acc", "bits_per_byte", "deep_ppl", "flops_ratio", "ppl", "shallow_ppl", "shallow_ratio")
"""Those that people compare day by day; `dvc metrics` shows them and no other."""

PRINTED_KEYS = (
    "ppl",
    "shallow_ppl",
    "deep_ppl",
    "oracle_ppl",
    "bits_per_byte",
    "acc",
    "hard_ppl_before",
    "hard_ppl_after",
    "shallow_ratio",
    "flops_ratio",
)


@dataclass(frozen=True)
class HardTokens:
    """The tokens of a text that mining calls hard, whether they go deep or not: which (n,), and block 1's losses (n,).

    Every model is asked about the same ones: those that block 1, as phase 1 left it, is unsure of.
    """

    which: np.ndarray
    before: np.ndarray

    @classmethod
    def of(cls, block1: TokenTable, threshold: float) -> HardTokens:
        """Those whose confidence in block 1's table lies below the threshold."""
        return cls(~block1.easy(threshold), block1.nll_shallow)

    def keys(self, after: np.ndarray, deep: np.ndarray) -> dict[str, float | None]:
        """Perplexities on them, None where there is none, from losses (n,) as a model answers and of its full depth."""
        losses = {"hard_ppl_before": self.before, "hard_ppl_after": after, "hard_ppl_deep": deep}
        return {key: perplexity(nll[self.which]) if self.which.any() else None for key, nll in losses.items()}

    def validation_keys(self, after: np.ndarray) -> dict[str, float | None]:
        """Those keys of validation text that MODEL_KEYS has."""
        found = self.keys(after, after)
        return {f"val_{key}": found[key] for key in ("hard_ppl_before", "hard_ppl_after")}


def routed_metrics(
    tables: Mapping[str, TokenTable],
    hard: Mapping[str, HardTokens],
    ledger: Ledger,
    test_facts: dict[str, Any],
    route: Route,
    reference: Ledger | None = None,
) -> dict[str, float | None]:
    """The keys of MODEL_KEYS that follow from what the model said of validation and test text.

    Args:
        tables: token tables of the routed model, by split.
        hard: the hard tokens of each split.
        ledger: costs of the model.
        test_facts: what `corpus_facts` says of the test split.
        route: how tokens are routed.
        reference: costs of the model to which flops_ratio refers; default its own.
    """
    test, validation = tables["test"], tables["validation"]
    nll = test.routed_nll(route.threshold, route.criterion)
    val_nll = validation.routed_nll(route.threshold, route.criterion)
    ratio = float(test.easy(route.threshold, route.criterion).mean())
    full = (reference or ledger).full
    return {
        "acc": float(test.routed_right(route.threshold, route.criterion).mean()),
        "ppl": perplexity(nll),
        "bits_per_byte": bits_per_byte(perplexity(nll), test_facts),
        "shallow_ppl": perplexity(test.nll_shallow),
        "deep_ppl": perplexity(test.nll_deep),
        **hard["test"].keys(nll, test.nll_deep),
        "val_ppl": perplexity(val_nll),
        "val_shallow_ppl": perplexity(validation.nll_shallow),
        **hard["validation"].validation_keys(val_nll),
        "shallow_ratio": ratio,
        "compute_cost": compute_cost(ratio, ledger.exit_layer, ledger.num_layers),
        "flops_ratio": ledger.routed(ratio, route.macs) / full,
        "deep_flops_ratio": ledger.always_deep / full,
        "break_even_shallow_ratio": ledger.break_even_shallow_ratio(route.macs),
        "threshold": route.threshold,
        "oracle_ppl": perplexity(np.minimum(test.nll_shallow, test.nll_deep)),
    }


def single_exit_metrics(
    tables: Mapping[str, TokenTable],
    hard: Mapping[str, HardTokens],
    ledger: Ledger,
    test_facts: dict[str, Any],
    reference: Ledger,
) -> dict[str, float | None]:
    """The keys of MODEL_KEYS that follow from what such a model said of validation and test text.

    Args:
        tables: token tables of this model, by split.
        hard: the hard tokens of each split, those of the routed model it is compared with.
        ledger: costs of this model.
        test_facts: what `corpus_facts` says of the test split.
        reference: costs of the routed model, to which flops_ratio and compute_cost refer.
    """
    nll, val_nll = tables["test"].nll_deep, tables["validation"].nll_deep
    ppl, val_ppl = perplexity(nll), perplexity(val_nll)
    return {
        "acc": float(tables["test"].right_deep.mean()),
        "ppl": ppl,
        "bits_per_byte": bits_per_byte(ppl, test_facts),
        "shallow_ppl": ppl,
        "deep_ppl": ppl,
        **hard["test"].keys(nll, nll),
        "val_ppl": val_ppl,
        "val_shallow_ppl": val_ppl,
        **hard["validation"].validation_keys(val_nll),
        "shallow_ratio": float(ledger.num_layers <= reference.exit_layer),
        "compute_cost": ledger.num_layers * ledger.layer / (reference.num_layers * reference.layer),
        "flops_ratio": ledger.full / reference.full,
        "deep_flops_ratio": ledger.full / reference.full,
        "oracle_ppl": ppl,  # it has one exit to choose from
        "break_even_shallow_ratio": None,  # it does not route
        "threshold": None,
    }


def summary(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The few keys of a model's metrics that `dvc metrics` shows, and `leaky` where that must be said."""
    leaky = {"leaky": True} if metrics["leaky"] else {}
    return {key: metrics[key] for key in SUMMARY_KEYS} | leaky


def comparison_lines(ashem: Mapping[str, float | None], yardstick: Mapping[str, float | None]) -> list[str]:
    """The two models side by side, as the pipeline prints them last, in as many digits as any processor agrees on."""
    lines = [f"{'test':>26} {'ASHEM':>12} {'shallow_continued':>18}"]
    for key in PRINTED_KEYS:
        left, right = (f"{value:.4g}" if value is not None else "-" for value in (ashem.get(key), yardstick.get(key)))
        lines.append(f"{key:>26} {left:>12} {right:>18}")
    return lines
