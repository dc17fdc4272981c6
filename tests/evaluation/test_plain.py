"""Models that ASHEM is compared with: the same keys, the same hard tokens, null where there is none."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lego import Ledger, StandardTransformer
from lego.evaluation.metrics import MODEL_KEYS, HardTokens, comparison_lines, routed_metrics, single_exit_metrics
from lego.evaluation.plain import Comparison, Leaving
from lego.evaluation.routed import Route, perplexity, token_table
from lego.model.exit_criteria import max_prob
from tests.conftest import VOCAB
from tests.evaluation.conftest import FACTS, TEST, VALIDATION

TEXTS = {"test": TEST, "validation": VALIDATION}


def test_both_kinds_of_model_report_the_same_keys(model):
    """The stages add train_macs, n_hard, hard_share and leaky to both."""
    added = {"train_macs", "n_hard", "hard_share", "leaky", "lr", "added_macs", "budget_macs", "distance_from_budget"}
    table, validation = token_table(model, TEST, "cpu"), token_table(model, VALIDATION, "cpu")
    ledger = Ledger.of(model, 12)
    threshold, tables = float(np.median(table.confidence)), {"test": table, "validation": validation}
    asked = {split: HardTokens.of(one, threshold) for split, one in tables.items()}
    routed = routed_metrics(tables, asked, ledger, FACTS, Route("max_prob", 0.5))
    shallow_model = StandardTransformer(VOCAB, 32, 2, 4)
    own = {split: token_table(shallow_model, text, "cpu") for split, text in TEXTS.items()}
    continued = own["test"]
    shallow = single_exit_metrics(own, asked, Ledger.of(shallow_model, 12), FACTS, ledger)
    assert routed.keys() | added == shallow.keys() | added == set(MODEL_KEYS)
    assert not (routed.keys() | shallow.keys()) & added
    hard = table.confidence < threshold  # the same tokens as the routed model's
    assert shallow["hard_ppl_before"] == pytest.approx(perplexity(table.nll_shallow[hard]))
    assert shallow["hard_ppl_after"] == pytest.approx(perplexity(continued.nll_deep[hard]))
    one_exit = {shallow[key] for key in ("ppl", "shallow_ppl", "deep_ppl", "oracle_ppl")}
    assert list(one_exit) == [pytest.approx(perplexity(continued.nll_shallow))]
    assert (shallow["shallow_ratio"], shallow["compute_cost"]) == (1.0, 0.5)
    assert shallow["flops_ratio"] == (ledger.block1 + ledger.head) / (ledger.block1 + ledger.block2 + ledger.head)
    assert any("hard_ppl_after" in line for line in comparison_lines(routed, shallow))


@pytest.mark.parametrize("leaves", [None, 0.5])
def test_a_comparison_without_hard_tokens_leaves_null_too(model, leaves):
    tokens = len(token_table(model, TEST, "cpu").nll_deep)
    ledger, cpu = Ledger.of(model, 12), torch.device("cpu")
    comparison = Comparison(TEXTS, np.zeros(tokens, dtype=int), FACTS, model, 0.0, ledger, cpu)
    leaving = None if leaves is None else Leaving(Route("max_prob", leaves), max_prob)
    metrics, rows = comparison.judge(model, leaving)
    assert {metrics[f"{split}hard_ppl_{when}"] for split in ("", "val_") for when in ("before", "after")} == {None}
    assert metrics["hard_ppl_deep"] is None
    assert [row["hard_tokens"] for row in rows] == [0]
