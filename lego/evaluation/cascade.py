"""Numbers of models with any number of exits: one pass says what each says of every token, whatever the thresholds.

Shapes: n tokens, M exits.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lego.base.ashem_sections import RoutingParams
from lego.evaluation.calibration import certificate_of
from lego.evaluation.gating import fit_gate
from lego.evaluation.risk import Certificate
from lego.evaluation.routed import perplexity
from lego.model.climb import Climb, last_of
from lego.model.gate import Gate
from lego.model.losses import read_exits
from lego.model.transformer import BaseTransformer
from lego.routing.decoder import ALWAYS_DEEP


@dataclass(frozen=True)
class ExitTable:
    """What each exit answers to each token: losses in nats, right or not, largest probability (M, n)."""

    nll: np.ndarray
    right: np.ndarray
    confidence: np.ndarray

    def exits(self, thresholds: Sequence[float]) -> np.ndarray:
        """The exit where each token leaves (n,), from 0: the first whose confidence is not below its threshold."""
        sure = self.confidence[:-1] >= np.asarray(thresholds)[:, None]
        return np.vstack([sure, np.ones_like(sure[:1])]).argmax(axis=0)

    def part(self, start: int, stop: int | None = None) -> ExitTable:
        """Of the tokens from `start` to `stop`."""
        return ExitTable(*(column[:, start:stop] for column in (self.nll, self.right, self.confidence)))

    def routed_nll(self, thresholds: Sequence[float]) -> np.ndarray:
        """Loss (n,) of each token at the exit where it leaves."""
        return self.nll[self.exits(thresholds), np.arange(self.nll.shape[1])]

    def routed(self, thresholds: Sequence[float]) -> dict[str, float]:
        """Perplexity and accuracy of routed tokens, and the share that goes through each block above the first."""
        exits = self.exits(thresholds)
        nll, right = (column[exits, np.arange(len(exits))] for column in (self.nll, self.right))
        shares = {f"share_{block + 1}": float((exits >= block).mean()) for block in range(1, len(self.nll))}
        return {"ppl": perplexity(nll), "acc": float(right.mean())} | shares

    def thresholds(self, shares: Sequence[float]) -> list[float]:
        """The confidence at each exit but the last below which a share of the tokens lies that come there."""
        here, found = np.ones(self.nll.shape[1], dtype=bool), list[float]()
        for confidence, share in zip(self.confidence[:-1], shares, strict=True):
            found.append(float(np.quantile(confidence[here], share)) if here.any() else 0.0)
            here &= confidence < found[-1]
        return found


@torch.no_grad()
def exit_table(
    model: BaseTransformer,
    batches: Iterable[tuple[Tensor, Tensor]],
    device: str | torch.device,
    gates: Sequence[Gate | None] | None = None,
) -> ExitTable:
    """Runs every token through every block.

    Args:
        model: with two blocks or more, in `sequence` context.
        batches: (x, y) of token ids (B, T).
        device: where the model runs.
        gates: of each exit but the first, as for CascadeDecoder.
    """
    model.to(device).eval()
    gates = [None if gate is None else gate.to(device) for gate in gates or [None] * len(model.blocks)]
    columns = []
    for x, y in batches:
        reached = model.reach(model.trunk(x.to(device)))
        climb = Climb(model.layer, model.blocks, reached, torch.ones_like(x, dtype=torch.bool, device=device))
        states = [reached.states[-1].flatten(0, 1)]  # (n, D)
        states += [last_of(climb.through(block), climb.states[0]) for block in model.blocks]
        read = [
            (model.layer(at).exit_norm(h), model.head_at(at).weight) for at, h in zip(model.exits, states, strict=True)
        ]
        columns.append([part.cpu() for part in read_exits(read, gates, y.to(device).flatten())])
    nll, right, confidence = (torch.cat(parts, dim=1).numpy() for parts in zip(*columns, strict=True))
    return ExitTable(nll.astype(np.float64), right, confidence)


def gates_for(
    model: BaseTransformer, batches: Iterable[tuple[Tensor, Tensor]], device: str | torch.device
) -> list[Gate]:
    """The gate of each exit but the first, one after another, each with those below it in place.

    Args:
        model: with two blocks or more.
        batches: (x, y) of token ids (B, T), of text that no block was trained on; read anew for each gate.
        device: where the model runs.
    """
    gates: list[Gate | None] = [None] * len(model.blocks)
    for place in range(len(gates)):
        table = exit_table(model, batches, device, gates)
        gates[place] = fit_gate(table.confidence[place], table.nll[place], table.nll[place + 1])
    return [gate for gate in gates if gate is not None]


def certified_thresholds(
    fit: ExitTable, rest: ExitTable, units: np.ndarray, params: RoutingParams
) -> tuple[list[float], Certificate]:
    """The thresholds that route most among those whose risk is certified, and what is promised of them.

    One number moves all of them: the share that goes on at each exit.

    Args:
        fit: of the text that gates were fitted on, from which candidates come.
        rest: of the text after it.
        units: of risk (n,) of the rest, see `unit_losses`.
        params: section `routing`.

    Raises:
        StageError: see `certificate_of`.
    """
    above = len(fit.nll) - 1
    shares = 1 - np.arange(1, params.risk_candidates + 1) / params.risk_candidates
    candidates = [fit.thresholds([float(share)] * above) for share in shares]
    routed = [rest.routed_nll(thresholds) for thresholds in candidates]
    found = certificate_of(routed, rest.nll[-1], units, params, "max_prob")
    return [ALWAYS_DEEP] * above if found.chosen is None else candidates[found.chosen], found
