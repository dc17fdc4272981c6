"""Numbers of the models that ASHEM is compared with, in the keys of its own; and losses by document."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from lego.evaluation.risk import document_units
from lego.evaluation.routed import (
    MODEL_KEYS,
    Route,
    TokenTable,
    hard_keys,
    perplexity,
    routed_metrics,
    token_table,
)
from lego.model.cost import Ledger
from lego.model.exit_criteria import Criterion
from lego.model.gate import Gate
from lego.model.transformer import BaseTransformer
from lego.tokens.batches import EvaluationBatches, split_batches
from lego.tokens.blocks import PackedBlocks, bits_per_byte, corpus_facts


def hard_of(
    tables: Mapping[str, tuple[TokenTable, TokenTable]], threshold: float, answers: Mapping[str, np.ndarray]
) -> dict[str, float | None]:
    """The keys on tokens that block 1 is unsure of, by the prefix of their split, of which validation has no `deep`.

    Args:
        tables: of block 1 after phase 1 and of a model, by prefix.
        threshold: confidence of block 1 below which a token is hard.
        answers: losses (n,) of the model as it answers, by prefix.
    """
    found = {
        prefix + key: value
        for prefix, (block1, model) in tables.items()
        for key, value in hard_keys(
            ~block1.easy(threshold), block1.nll_shallow, answers[prefix], model.nll_deep
        ).items()
    }
    return {key: value for key, value in found.items() if key in MODEL_KEYS}


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
    tables = {"": (block1_test, test), "val_": (block1_validation, validation)}
    hard = hard_of(tables, threshold, {prefix: model.nll_deep for prefix, (_, model) in tables.items()})
    ppl, val_ppl = perplexity(test.nll_deep), perplexity(validation.nll_deep)
    return {
        "acc": float(test.right_deep.mean()),
        "ppl": ppl,
        "bits_per_byte": bits_per_byte(ppl, test_facts),
        "shallow_ppl": ppl,
        "deep_ppl": ppl,
        **hard,
        "val_ppl": val_ppl,
        "val_shallow_ppl": val_ppl,
        "shallow_ratio": float(own.num_layers <= ledger.exit_layer),
        "compute_cost": own.num_layers * own.layer / (ledger.num_layers * ledger.layer),
        "flops_ratio": own.full / ledger.full,
        "deep_flops_ratio": own.full / ledger.full,
        "oracle_ppl": ppl,  # it has one exit to choose from
        "break_even_shallow_ratio": None,  # it does not route
        "threshold": None,
    }


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


@dataclass(frozen=True)
class Leaving:
    """How tokens leave a model: by which criterion and score, and the gate that mixes the answers of the others."""

    route: Route
    criterion: Criterion
    gate: Gate | None = None


@dataclass(frozen=True)
class Comparison:
    """What every other model is held against: the same text, the same hard tokens, the routed model's costs.

    Args:
        texts: evaluation batches of the splits `test` and `validation`.
        documents: number of each test token's document (n,), ascending.
        test_facts: what `corpus_facts` says of the test split.
        block1: the model of phase 1.
        threshold: confidence of block 1 below which a token is hard.
        ledger: costs of the routed model.
        device: where models run.
    """

    texts: Mapping[str, EvaluationBatches]
    documents: np.ndarray
    test_facts: dict[str, Any]
    block1: BaseTransformer
    threshold: float
    ledger: Ledger
    device: torch.device

    @classmethod
    def on(
        cls,
        folder: str,
        batch_size: int,
        block1: BaseTransformer,
        threshold: float,
        ledger: Ledger,
        device: torch.device,
    ) -> Comparison:
        """The comparison on the text of a folder that tokenize wrote; see Comparison."""
        facts = corpus_facts(folder)
        documents = document_units(PackedBlocks(folder, "test").targets(), facts["end_of_text"])
        texts = {split: split_batches(folder, split, batch_size) for split in ("test", "validation")}
        return cls(texts, documents, facts["splits"]["test"], block1, threshold, ledger, device)

    def judge(
        self, model: BaseTransformer, leaving: Leaving | None = None
    ) -> tuple[dict[str, float | None], list[dict[str, Any]]]:
        """The keys of MODEL_KEYS that follow from what a model says of the text, and its losses by document.

        Args:
            model: answers every token at its last layer, or routes.
            leaving: how tokens leave at the model's exit; None = it has but one.
        """
        block1 = {split: token_table(self.block1, text, self.device) for split, text in self.texts.items()}
        route, gate = (leaving.route, leaving.gate) if leaving else (None, None)
        scored = {leaving.route.criterion: leaving.criterion} if leaving else {}
        mine = {split: token_table(model, text, self.device, scored, gate=gate) for split, text in self.texts.items()}
        test, validation = mine["test"], mine["validation"]
        own = replace(Ledger.of(model, self.ledger.seq_len), gated=gate is not None)
        hard = ~block1["test"].easy(self.threshold)
        if route is None:
            metrics = single_exit_metrics(
                test,
                validation,
                block1["test"],
                block1["validation"],
                self.threshold,
                self.ledger,
                own,
                self.test_facts,
            )
            return metrics, document_rows(test.nll_deep, test.nll_deep, hard, self.documents)
        metrics = routed_metrics(test, validation, self.threshold, own, self.test_facts, route)
        for key in ("flops_ratio", "deep_flops_ratio"):  # as shares of what they are of the model it is compared with
            metrics[key] = float(metrics[key] or 0.0) * own.full / self.ledger.full
        tables = {"": (block1["test"], test), "val_": (block1["validation"], validation)}
        answers = {prefix: model.routed_nll(route.threshold, route.criterion) for prefix, (_, model) in tables.items()}
        metrics |= hard_of(tables, self.threshold, answers)  # its own confidences are not those of block 1
        return metrics, document_rows(
            test.routed_nll(route.threshold, route.criterion), test.nll_deep, hard, self.documents
        )
