"""Routed numbers from one pass: equal to the Trainer's, to brute force, and to each other at the ends of the sweep."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from lego import Ledger, StageConfig, Trainer, TrainingConfig
from lego.evaluation.metrics import HardTokens, routed_metrics
from lego.evaluation.routed import Route, TokenTable, evaluate_at_share, perplexity, threshold_sweep, token_table
from lego.tokens.blocks import bits_per_byte
from tests.conftest import VOCAB
from tests.evaluation.conftest import FACTS, TEST


def measured(table: TokenTable, mining: float, model, routing: float | None = None) -> dict[str, float | None]:
    """Of a table that stands for both splits, routed by max_prob at a threshold, by default that of mining."""
    tables = {"test": table, "validation": table}
    hard = {split: HardTokens.of(table, mining) for split in tables}
    route = Route("max_prob", mining if routing is None else routing)
    return routed_metrics(tables, hard, Ledger.of(model, 12), FACTS, route)


def test_the_table_gives_what_the_trainer_measures_at_any_threshold(model):
    table = token_table(model, TEST, "cpu")
    for ratio in (0.1, 0.5, 0.9):
        threshold = float(np.quantile(table.confidence, ratio))
        stats = Trainer(TrainingConfig([StageConfig((4, 4))], threshold, 2), VOCAB).evaluate(model, TEST)
        metrics = measured(table, threshold, model)
        for key, value in stats.items():
            assert metrics[key] == pytest.approx(value, rel=1e-4)
    with torch.no_grad():
        y = torch.cat([y.flatten() for _, y in TEST])
        for key, layer in (("shallow_ppl", 1), ("deep_ppl", 3)):
            logits = torch.cat([model.forward_all_layers(x)[layer].flatten(0, 1) for x, _ in TEST])
            assert metrics[key] == pytest.approx(torch.nn.functional.cross_entropy(logits, y).exp().item(), rel=1e-4)


def test_a_share_of_hard_tokens_gives_the_numbers_of_its_threshold(model):
    table = token_table(model, TEST, "cpu")
    for ratio in (0.25, 0.6):
        found = evaluate_at_share(model, TEST, ratio, "cpu")
        asked = sorted(table.confidence)[int(ratio * len(table.confidence))]
        assert found["shallow_ratio"] == pytest.approx(1 - ratio, abs=0.01)
        assert found["ppl"] == pytest.approx(perplexity(table.routed_nll(asked)), rel=0.01)
    assert evaluate_at_share(model, TEST, 0.0, "cpu")["ppl"] == perplexity(table.nll_shallow)


def test_hard_perplexities_and_oracle_by_brute_force(model):
    table = token_table(model, TEST, "cpu")
    threshold = float(np.median(table.confidence))
    metrics = measured(table, threshold, model)
    hard = [i for i, c in enumerate(table.confidence) if c < threshold]
    assert metrics["hard_ppl_before"] == pytest.approx(math.exp(np.mean([table.nll_shallow[i] for i in hard])))
    assert metrics["hard_ppl_after"] == pytest.approx(math.exp(np.mean([table.nll_deep[i] for i in hard])))
    assert metrics["hard_ppl_deep"] == metrics["hard_ppl_after"]  # all that are hard go deep
    low = float(np.quantile(table.confidence, 0.2))
    routed = measured(table, threshold, model, low)
    answers = [table.nll_deep[i] if table.confidence[i] < low else table.nll_shallow[i] for i in hard]
    assert routed["hard_ppl_after"] == pytest.approx(math.exp(np.mean(answers)))
    assert routed["val_hard_ppl_after"] == routed["hard_ppl_after"]
    assert (routed["hard_ppl_before"], routed["hard_ppl_deep"]) == (
        metrics["hard_ppl_before"],
        metrics["hard_ppl_deep"],
    )
    best = [min(a, b) for a, b in zip(table.nll_shallow, table.nll_deep, strict=True)]
    assert metrics["oracle_ppl"] == pytest.approx(math.exp(np.mean(best)))
    assert metrics["oracle_ppl"] <= min(metrics["ppl"], metrics["deep_ppl"], metrics["shallow_ppl"])


def test_bits_per_byte(model):
    assert bits_per_byte(2.0, {"tokens": 10, "bytes": 5}) == pytest.approx(2.0)
    table = token_table(model, TEST, "cpu")
    metrics = measured(table, 0.0, model)
    assert metrics["bits_per_byte"] == pytest.approx(table.nll_shallow.sum() / math.log(2) / 1000)


def test_the_sweep_runs_from_always_deep_to_always_shallow(model):
    table, ledger = token_table(model, TEST, "cpu"), Ledger.of(model, 12)
    rows = threshold_sweep(table, ledger, 21)
    assert len(rows) == 21
    assert rows[0]["shallow_ratio"] == 0.0
    assert rows[0]["ppl"] == pytest.approx(perplexity(table.nll_deep))
    assert rows[-1]["shallow_ratio"] == 1.0
    assert rows[-1]["ppl"] == pytest.approx(perplexity(table.nll_shallow))
    ratios = [row["shallow_ratio"] for row in rows]
    assert ratios == pytest.approx(np.linspace(0, 1, 21), abs=0.01)
    assert [row["compute_cost"] for row in rows] == pytest.approx([1 - r / 2 for r in ratios])
    for row in rows:
        assert row["ppl"] == pytest.approx(perplexity(table.routed_nll(row["threshold"])))


def test_no_hard_token_leaves_null_and_not_nan(model):
    table = token_table(model, TEST, "cpu")
    metrics = measured(table, 0.0, model)
    assert metrics["hard_ppl_before"] is None
    assert metrics["shallow_ratio"] == 1.0
