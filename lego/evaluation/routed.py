"""Numbers of routed models: one pass gives every token's two losses, from which every threshold's result follows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lego.base.artifacts import read_tensors, write_tensors
from lego.model.cost import Ledger
from lego.model.exit_criteria import Criterion
from lego.model.gate import Gate
from lego.model.transformer import BaseTransformer, compute_cost
from lego.routing.decoder import RoutedDecoder

ATTAINABLE = "attainable"
"""Score of a criterion that is told both exits' answers: how little the mixture of them expects to spare a token."""


@dataclass(frozen=True)
class TokenTable:
    """What both exits said of each token, arrays (n,): losses in nats, correctness, confidence at the exit.

    `scores` are those of exit criteria by name; that of `max_prob` is the confidence.
    """

    nll_shallow: np.ndarray
    nll_deep: np.ndarray
    right_shallow: np.ndarray
    right_deep: np.ndarray
    confidence: np.ndarray
    scores: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def gain(self) -> np.ndarray:
        """What block 2 spares each token (n,), in nats."""
        return self.nll_shallow - self.nll_deep

    def score(self, criterion: str) -> np.ndarray:
        return self.confidence if criterion == "max_prob" else self.scores[criterion]

    def part(self, start: int) -> TokenTable:
        """Of the tokens from `start` on."""
        columns = {key: value[start:] for key, value in vars(self).items() if key != "scores"}
        return TokenTable(**columns, scores={name: score[start:] for name, score in self.scores.items()})

    def easy(self, threshold: float, criterion: str = "max_prob") -> np.ndarray:
        return self.score(criterion) >= threshold

    def routed_nll(self, threshold: float, criterion: str = "max_prob") -> np.ndarray:
        """Loss (n,) of each token at the depth its score sends it to."""
        return np.where(self.easy(threshold, criterion), self.nll_shallow, self.nll_deep)

    def routed_right(self, threshold: float, criterion: str = "max_prob") -> np.ndarray:
        return np.where(self.easy(threshold, criterion), self.right_shallow, self.right_deep)


@dataclass(frozen=True)
class Route:
    """How tokens are routed: the criterion's name, the score from which one leaves, MACs of a score (None: a head)."""

    criterion: str
    threshold: float
    macs: int | None = None


def perplexity(nll: np.ndarray) -> float:
    """exp of the mean loss in nats, capped at exp(700)."""
    return math.exp(min(float(nll.mean()), 700.0))


@torch.no_grad()
def token_table(
    model: BaseTransformer,
    batches: Iterable[tuple[Tensor, Tensor]],
    device: str | torch.device,
    criteria: Mapping[str, Criterion] | None = None,
    on_states: Callable[[Tensor, Tensor, Tensor], None] = lambda states, spared, largest: None,
    gate: Gate | None = None,
) -> TokenTable:
    """Runs both exits over all batches with the routed decoder; a model without block 2 has two equal columns.

    Args:
        model: read at its exit layer and at its last.
        batches: (x, y) of token ids (B, T).
        device: where the model runs.
        criteria: exit criteria by name, whose scores are wanted.
        on_states: called with each batch's exit states (n, D), what block 2 spares them (n,) in nats, and the largest
            of the exit's logits (n,). With a gate that is what the mixture expects to spare: the mean, without noise.
        gate: mixes both exits in the answers of the full depth; the table then has the score ATTAINABLE.
    """
    model.to(device)
    names = list(criteria or {}) + ([] if gate is None else [ATTAINABLE])
    wanted: list[Criterion] = [*(criteria or {}).values(), lambda _, logits: logits.amax(dim=-1)]
    columns: list[tuple[Tensor, ...]] = []
    for x, y in batches:
        y = y.to(device).flatten()  # (n,)
        decoder = RoutedDecoder(model, None, len(x))
        read = decoder.shallow(x.to(device))
        last = read.states
        if model.exit_layer < model.num_layers:
            last = decoder.deep_states(read, torch.ones_like(y, dtype=torch.bool))
        if gate is None:
            shallow = model.read_at(read.states, model.exit_layer, y, wanted)
            deep = model.read_at(last, model.num_layers, y) if last is not read.states else shallow
            on_states(read.states, shallow[0] - deep[0], shallow[-1])
            shallow = shallow[:-1]
        else:
            shallow, deep = model.read_mixed(read.states, last, y, gate.to(device).mixed, wanted)
            on_states(read.states, deep[2], shallow[-1])
            shallow = (*shallow[:-1], (-deep[2]).sigmoid())
        columns.append((shallow[0], deep[0], shallow[1], deep[1], *shallow[2:]))
    arrays = [torch.cat(column).cpu().numpy() for column in zip(*columns, strict=True)]
    nll_shallow, nll_deep = (losses.astype(np.float64) for losses in arrays[:2])
    scores = dict(zip(names, arrays[5:], strict=True))
    return TokenTable(nll_shallow, nll_deep, arrays[2], arrays[3], arrays[4], scores)


def evaluate_at_share(
    model: BaseTransformer, batches: Iterable[tuple[Tensor, Tensor]], hard_ratio: float, device: str | torch.device
) -> dict[str, float]:
    """`ppl` and `acc` of a model whose least confident tokens go deep, this share of them: for choosing among states.

    The threshold is taken from the same text, as that of a model still in training moves.
    """
    table = token_table(model, batches, device)
    threshold = float(np.quantile(table.confidence, hard_ratio))
    return {
        "ppl": perplexity(table.routed_nll(threshold)),
        "acc": float(table.routed_right(threshold).mean()),
        "shallow_ratio": float(table.easy(threshold).mean()),
    }


def save_tables(folder: str | Path, **tables: TokenTable) -> None:
    """Writes one safetensors file per table into an existing folder: what each exit said of each token, in order.

    From these follow paired comparisons of models and the results of any threshold, without running the model again.
    """
    for name, table in tables.items():
        arrays = {key: value for key, value in vars(table).items() if key != "scores"}
        arrays |= {f"score_{criterion}": score for criterion, score in table.scores.items()}
        tensors = {key: torch.from_numpy(array) for key, array in arrays.items()}
        small = {key: t.float() if t.is_floating_point() else t for key, t in tensors.items()}
        write_tensors(Path(folder) / f"{name}.safetensors", small)


def load_table(file: str | Path) -> TokenTable:
    """A table that `save_tables` wrote.

    Raises:
        ArtifactError: see `read_tensors`.
    """
    arrays = {key: tensor.numpy() for key, tensor in read_tensors(file).items()}
    scores = {key.removeprefix("score_"): arrays.pop(key) for key in list(arrays) if key.startswith("score_")}
    return TokenTable(**arrays, scores=scores)


def threshold_sweep(
    table: TokenTable, ledger: Ledger, points: int, criterion: str = "max_prob", criterion_macs: int | None = None
) -> list[dict[str, float]]:
    """Routed results at thresholds that let about 0, 1/(points-1), ..., all tokens leave early.

    The first threshold lies above every score (always deep), the last one lets every token leave (always shallow).
    """
    score = table.score(criterion)
    ranks = np.linspace(1, 0, points)[1:]
    above_all = float(np.nextafter(score.max(), np.float32(np.inf)))
    thresholds = [above_all, *np.quantile(score, ranks).tolist()]
    rows = []
    for threshold in thresholds:
        ratio = float(table.easy(threshold, criterion).mean())
        rows.append(
            {
                "threshold": threshold,
                "shallow_ratio": ratio,
                "ppl": perplexity(table.routed_nll(threshold, criterion)),
                "acc": float(table.routed_right(threshold, criterion).mean()),
                "compute_cost": compute_cost(ratio, ledger.exit_layer, ledger.num_layers),
                "flops_ratio": ledger.flops_ratio(ratio, criterion_macs),
            }
        )
    return rows
