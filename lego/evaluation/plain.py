"""Numbers of the models that ASHEM is compared with, in the keys of its own; and losses by document."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lego.evaluation.metrics import HardTokens, routed_metrics, single_exit_metrics
from lego.evaluation.risk import document_units
from lego.evaluation.routed import Route, token_table
from lego.model.cost import Ledger
from lego.model.exit_criteria import Criterion
from lego.model.gate import Gate
from lego.model.transformer import BaseTransformer
from lego.tokens.batches import EvaluationBatches, split_batches
from lego.tokens.blocks import PackedBlocks, corpus_facts


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
        route, gate = (leaving.route, leaving.gate) if leaving else (None, None)
        scored = {leaving.route.criterion: leaving.criterion} if leaving else {}
        tables = {split: token_table(model, text, self.device, scored, gate=gate) for split, text in self.texts.items()}
        hard = {
            split: HardTokens.of(token_table(self.block1, text, self.device), self.threshold)
            for split, text in self.texts.items()
        }
        own, test = Ledger.of(model, self.ledger.seq_len, gated=gate is not None), tables["test"]
        if route is None:
            nll, metrics = test.nll_deep, single_exit_metrics(tables, hard, own, self.test_facts, self.ledger)
        else:
            nll = test.routed_nll(route.threshold, route.criterion)
            metrics = routed_metrics(tables, hard, own, self.test_facts, route, self.ledger)
        return metrics, document_rows(nll, test.nll_deep, hard["test"].which, self.documents)
