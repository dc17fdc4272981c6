"""Numbers of models that answer every token at one depth, in the keys of routed ones; and losses by document."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from lego.blocks import bits_per_byte
from lego.cost import Ledger
from lego.evaluation import TokenTable, perplexity


def hard_after(block1: TokenTable, model: TokenTable, threshold: float) -> tuple[float, float]:
    """Perplexity of block 1, and of another model's full depth, on the tokens that block 1 is unsure of.

    Args:
        block1, model: token tables of the same text.
        threshold: confidence of block 1 below which a token is hard.
    """
    paired = TokenTable(block1.nll_shallow, model.nll_deep, block1.right_shallow, model.right_deep, block1.confidence)
    return paired.hard_perplexities(threshold)


def single_exit_metrics(
    test: TokenTable,
    validation: TokenTable,
    block1_test: TokenTable,
    block1_validation: TokenTable,
    threshold: float,
    ledger: Ledger,
    own: Ledger,
    test_facts: dict[str, Any],
) -> dict[str, float | None]:
    """The keys of MODEL_KEYS that follow from what such a model said of validation and test text.

    Its hard tokens are those of the routed model it is compared with: the ones block 1, as phase 1 left it, is unsure
    of. So hard_ppl_before and hard_ppl_after speak of the same tokens in both files.

    Args:
        test, validation: token tables of this model.
        block1_test, block1_validation: token tables of block 1 after phase 1.
        threshold: of the routed model.
        ledger: costs of the routed model, to which flops_ratio and compute_cost refer.
        own: costs of this model.
        test_facts: what `corpus_facts` says of the test split.
    """
    before, after = hard_after(block1_test, test, threshold)
    val_before, val_after = hard_after(block1_validation, validation, threshold)
    ppl, val_ppl = perplexity(test.nll_deep), perplexity(validation.nll_deep)
    metrics = {
        "acc": float(test.right_deep.mean()),
        "ppl": ppl,
        "bits_per_byte": bits_per_byte(ppl, test_facts),
        "shallow_ppl": ppl,
        "deep_ppl": ppl,
        "hard_ppl_before": before,
        "hard_ppl_after": after,
        "val_ppl": val_ppl,
        "val_shallow_ppl": val_ppl,
        "val_hard_ppl_before": val_before,
        "val_hard_ppl_after": val_after,
        "shallow_ratio": float(own.num_layers <= ledger.exit_layer),
        "compute_cost": own.num_layers * own.layer / (ledger.num_layers * ledger.layer),
        "flops_ratio": own.full / ledger.full,
        "oracle_ppl": ppl,  # it has one exit to choose from
    }
    missing = {"break_even_shallow_ratio": None, "threshold": None}  # it does not route
    return {key: None if math.isnan(value) else value for key, value in metrics.items()} | missing


def document_rows(
    nll: np.ndarray, nll_deep: np.ndarray, hard: np.ndarray, documents: np.ndarray
) -> list[dict[str, Any]]:
    """One row a document, for paired comparisons of models: summed losses in nats, of all tokens and of hard ones.

    Args:
        nll: loss of each token (n,) as the model answers it.
        nll_deep: at its full depth (n,).
        hard: whether block 1 is unsure of the token (n,).
        documents: number of each token's document (n,), ascending.
    """
    rows = []
    for number in np.unique(documents):
        mine = documents == number
        rows.append(
            {
                "document": int(number),
                "tokens": int(mine.sum()),
                "nll": float(nll[mine].sum()),
                "nll_deep": float(nll_deep[mine].sum()),
                "hard_tokens": int((mine & hard).sum()),
                "nll_hard": float(nll[mine & hard].sum()),
            }
        )
    return rows
