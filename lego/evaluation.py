"""Numbers of routed models: one pass gives every token's two losses, from which every threshold's result follows."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lego.artifacts import write_tensors
from lego.blocks import bits_per_byte
from lego.cost import Ledger
from lego.transformer import BaseTransformer, compute_cost

MODEL_KEYS = (
    "acc",
    "ppl",
    "bits_per_byte",
    "shallow_ppl",
    "deep_ppl",
    "hard_ppl_before",
    "hard_ppl_after",
    "val_hard_ppl_before",
    "val_hard_ppl_after",
    "shallow_ratio",
    "compute_cost",
    "flops_ratio",
    "break_even_shallow_ratio",
    "train_macs",
    "n_hard",
    "hard_share",
    "threshold",
    "oracle_ppl",
    "leaky",
)
"""Keys of every model's metrics file, so that `dvc metrics diff` and tables line up; null where one has no meaning."""


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
class TokenTable:
    """What both exits said of each token, arrays (n,): losses in nats, correctness, confidence at the exit."""

    nll_shallow: np.ndarray
    nll_deep: np.ndarray
    right_shallow: np.ndarray
    right_deep: np.ndarray
    confidence: np.ndarray

    def easy(self, threshold: float) -> np.ndarray:
        return self.confidence >= threshold

    def routed_nll(self, threshold: float) -> np.ndarray:
        """Loss (n,) of each token at the depth its confidence sends it to."""
        return np.where(self.easy(threshold), self.nll_shallow, self.nll_deep)

    def routed_right(self, threshold: float) -> np.ndarray:
        return np.where(self.easy(threshold), self.right_shallow, self.right_deep)

    def hard_perplexities(self, threshold: float) -> tuple[float, float]:
        """Perplexity of block 1 and of the full depth on the hard tokens; NaN where none is hard."""
        hard = ~self.easy(threshold)
        if not hard.any():
            return math.nan, math.nan
        return perplexity(self.nll_shallow[hard]), perplexity(self.nll_deep[hard])


def perplexity(nll: np.ndarray) -> float:
    """exp of the mean loss in nats, capped at exp(700)."""
    return math.exp(min(float(nll.mean()), 700.0))


@torch.no_grad()
def token_table(
    model: BaseTransformer, batches: Iterable[tuple[Tensor, Tensor]], device: str | torch.device
) -> TokenTable:
    """Runs both exits over all batches; a model whose exit is its last layer has two equal columns.

    Args:
        model: read at its exit layer and at its last.
        batches: (x, y) of token ids (B, T).
        device: where the model runs.
    """
    model.to(device).eval()
    columns: list[tuple[Tensor, ...]] = []
    for x, y in batches:
        x, y = x.to(device), y.to(device)
        h = model.forward_to_hidden(x)
        shallow = model.read_at(h, model.exit_layer, y)
        deep = shallow
        if model.exit_layer < model.num_layers:
            deep = model.read_at(model.run_layers(h, model.exit_layer + 1, model.num_layers), model.num_layers, y)
        columns.append((shallow[0], deep[0], shallow[1], deep[1], shallow[2]))
    nll_shallow, nll_deep, *rest = (torch.cat(column).cpu().numpy() for column in zip(*columns, strict=True))
    return TokenTable(nll_shallow.astype(np.float64), nll_deep.astype(np.float64), *rest)


def save_tables(folder: str | Path, **tables: TokenTable) -> None:
    """Writes one safetensors file per table into an existing folder: what each exit said of each token, in order.

    From these follow paired comparisons of models and the results of any threshold, without running the model again.
    """
    for name, table in tables.items():
        tensors = {field.name: torch.from_numpy(getattr(table, field.name)) for field in fields(table)}
        small = {key: t.float() if t.is_floating_point() else t for key, t in tensors.items()}
        write_tensors(Path(folder) / f"{name}.safetensors", small)


def threshold_sweep(table: TokenTable, ledger: Ledger, points: int) -> list[dict[str, float]]:
    """Routed results at thresholds that let about 0, 1/(points-1), ..., all tokens leave early.

    The first threshold lies above every confidence (always deep), the last one lets every token leave (always shallow).
    """
    ranks = np.linspace(1, 0, points)[1:]
    above_all = float(np.nextafter(table.confidence.max(), np.float32(np.inf)))
    thresholds = [above_all, *np.quantile(table.confidence, ranks).tolist()]
    rows = []
    for threshold in thresholds:
        ratio = float(table.easy(threshold).mean())
        rows.append(
            {
                "threshold": threshold,
                "shallow_ratio": ratio,
                "ppl": perplexity(table.routed_nll(threshold)),
                "acc": float(table.routed_right(threshold).mean()),
                "compute_cost": compute_cost(ratio, ledger.exit_layer, ledger.num_layers),
                "flops_ratio": ledger.flops_ratio(ratio),
            }
        )
    return rows


def routed_metrics(
    test: TokenTable, validation: TokenTable, threshold: float, ledger: Ledger, test_facts: dict[str, Any]
) -> dict[str, float | None]:
    """The keys of MODEL_KEYS that follow from what the model said of validation and test text.

    Args:
        test, validation: token tables of the routed model.
        threshold: of routing, from calibration text.
        ledger: costs of the model.
        test_facts: what `corpus_facts` says of the test split.
    """
    nll = test.routed_nll(threshold)
    ratio = float(test.easy(threshold).mean())
    before, after = test.hard_perplexities(threshold)
    val_before, val_after = validation.hard_perplexities(threshold)
    metrics = {
        "acc": float(test.routed_right(threshold).mean()),
        "ppl": perplexity(nll),
        "bits_per_byte": bits_per_byte(perplexity(nll), test_facts),
        "shallow_ppl": perplexity(test.nll_shallow),
        "deep_ppl": perplexity(test.nll_deep),
        "hard_ppl_before": before,
        "hard_ppl_after": after,
        "val_hard_ppl_before": val_before,
        "val_hard_ppl_after": val_after,
        "shallow_ratio": ratio,
        "compute_cost": compute_cost(ratio, ledger.exit_layer, ledger.num_layers),
        "flops_ratio": ledger.flops_ratio(ratio),
        "break_even_shallow_ratio": ledger.break_even_shallow_ratio(),
        "threshold": threshold,
        "oracle_ppl": perplexity(np.minimum(test.nll_shallow, test.nll_deep)),
    }
    return {key: None if math.isnan(value) else value for key, value in metrics.items()}


def shallow_metrics(
    test: TokenTable,
    validation: TokenTable,
    block1_test: TokenTable,
    block1_validation: TokenTable,
    threshold: float,
    ledger: Ledger,
    test_facts: dict[str, Any],
) -> dict[str, float | None]:
    """The same keys for a model of block 1's depth that answers every token.

    Its hard tokens are those of the routed model it is compared with: the ones block 1, as phase 1 left it, is unsure
    of. So hard_ppl_before and hard_ppl_after speak of the same tokens in both files.

    Args:
        test, validation: token tables of this model.
        block1_test, block1_validation: token tables of block 1 after phase 1.
        threshold: of the routed model.
        ledger: costs of the routed model, to which flops_ratio and compute_cost refer.
        test_facts: what `corpus_facts` says of the test split.
    """

    def paired(block1: TokenTable, model: TokenTable) -> TokenTable:
        return TokenTable(block1.nll_shallow, model.nll_deep, block1.right_shallow, model.right_deep, block1.confidence)

    before, after = paired(block1_test, test).hard_perplexities(threshold)
    val_before, val_after = paired(block1_validation, validation).hard_perplexities(threshold)
    ppl = perplexity(test.nll_deep)
    metrics = {
        "acc": float(test.right_deep.mean()),
        "ppl": ppl,
        "bits_per_byte": bits_per_byte(ppl, test_facts),
        "shallow_ppl": ppl,
        "deep_ppl": ppl,
        "hard_ppl_before": before,
        "hard_ppl_after": after,
        "val_hard_ppl_before": val_before,
        "val_hard_ppl_after": val_after,
        "shallow_ratio": 1.0,
        "compute_cost": compute_cost(1.0, ledger.exit_layer, ledger.num_layers),
        "flops_ratio": ledger.shallow() / ledger.full,
        "oracle_ppl": ppl,  # it has one exit to choose from
    }
    missing = {"break_even_shallow_ratio": None, "threshold": None}  # it does not route
    return {key: None if math.isnan(value) else value for key, value in metrics.items()} | missing


def comparison_lines(ashem: dict[str, float], yardstick: dict[str, float]) -> list[str]:
    """The two models side by side, as the pipeline prints them last."""
    lines = [f"{'test':>26} {'ASHEM':>12} {'shallow_continued':>18}"]
    for key in PRINTED_KEYS:
        left, right = (f"{value:.4f}" if value is not None else "-" for value in (ashem.get(key), yardstick.get(key)))
        lines.append(f"{key:>26} {left:>12} {right:>18}")
    return lines
