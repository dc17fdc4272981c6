"""One layer of CVFP: its formula, its weights and the statistics that it keeps (specification, section 2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from lego.cvfp.moments import RunningMoments

Writes = Literal["both", "context", "token"]
Pair = tuple[Tensor, Tensor]  # weight and bias
EMA = ("centroid_ema", "ema_buffer", "ema_target", "ema_live")


class LayerWeights(NamedTuple):
    """Weight and bias of each part of a layer, None of those that it lacks."""

    fnn: Pair
    gate: Pair | None
    proposal: Pair | None
    context_norm: Pair | None
    token_norm: Pair | None

    def detached(self) -> LayerWeights:
        fnn, *others = (None if pair is None else (pair[0].detach(), pair[1].detach()) for pair in self)
        return LayerWeights(cast(Pair, fnn), *others)


def _pair(part: Any) -> Pair:
    return part.weight, part.bias


@dataclass(frozen=True)
class LayerForm:
    """What the formula of a layer is; see CVFPLayer."""

    context_dim: int
    embed_dim: int
    mix: float
    update: str
    writes: Writes

    def step(self, weights: LayerWeights, context: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
        """Context (n, d) and token (n, e) after the layer: the one place of its formula."""
        z = torch.cat([context, token], dim=-1)  # (n, d + e)
        u = torch.relu(functional.linear(z, *weights.fnn))  # (n, h)
        if weights.gate is not None and weights.proposal is not None:
            old = {"both": z, "context": context, "token": token}[self.writes]
            proposal, gate = functional.linear(u, *weights.proposal), functional.linear(z, *weights.gate)
            new = torch.lerp(old, torch.tanh(proposal), torch.sigmoid(gate))
        elif self.writes == "both":
            d = self.context_dim  # two sums, not z + u: LayerNorm would copy its halves, a fifth of the time
            context, token = context + u[..., :d], token + u[..., d:]
            return self.normalized(context, weights.context_norm), self.normalized(token, weights.token_norm)
        else:
            new = (
                context + u[..., : self.context_dim] if self.writes == "context" else token + u[..., self.context_dim :]
            )
        if self.writes != "token":
            context = self.normalized(new[..., : self.context_dim], weights.context_norm)
        if self.writes != "context":
            token = self.normalized(new[..., -self.embed_dim :], weights.token_norm)
        return context, token

    def context_step(self, weights: LayerWeights, context: Tensor, token: Tensor) -> Tensor:
        """The context of `step` alone, without the rows of the weights that only write the token vector."""
        if self.update == "gated" or self.writes != "both":
            return self.step(weights, context, token)[0]
        (weight, bias), d = weights.fnn, self.context_dim
        u = torch.relu(functional.linear(torch.cat([context, token], dim=-1), weight[:d], bias[:d]))  # (n, d)
        return self.normalized(context + u, weights.context_norm)

    def normalized(self, rows: Tensor, norm: Pair | None) -> Tensor:
        """Rows (n, m) of which a share `mix` is normalized."""
        if norm is None:
            return rows
        normalized = functional.layer_norm(rows, rows.shape[-1:], *norm)
        return normalized if self.mix == 1 else (1 - self.mix) * rows + self.mix * normalized


class CVFPLayer(nn.Module):
    """One step f(context, token) -> (context, token) (specification, section 2).

    z = [context; token], u = ReLU(W z + b). `relu` adds u to both; `gated` moves each by a gate towards a signed
    proposal, tanh(P u) (section 12). A share layernorm_mix of the result is normalized.

    Args:
        context_dim, embed_dim: widths d and e.
        hidden_dim: must be d + e.
        layernorm_mix: share of the result that LayerNorm replaces; 0 = no LayerNorm.
        update: `relu` or `gated`.
        writes: what the layer changes; the other half is handed on as it is.
        diversity: which statistics it keeps, if any of the EMA kinds.
        ema_momentum: of those.

    Raises:
        ValueError: hidden_dim is not d + e.
    """

    def __init__(
        self,
        *,
        context_dim: int,
        embed_dim: int,
        hidden_dim: int,
        layernorm_mix: float,
        update: str,
        writes: Writes,
        diversity: str,
        ema_momentum: float,
    ) -> None:
        super().__init__()
        if hidden_dim != context_dim + embed_dim:
            raise ValueError(
                f"hidden_dim must be context_dim + embed_dim = {context_dim + embed_dim}, got {hidden_dim}"
            )
        self.form = LayerForm(context_dim, embed_dim, layernorm_mix, update, writes)
        self.diversity = diversity
        written = {"both": hidden_dim, "context": context_dim, "token": embed_dim}[writes]
        self.fnn = nn.Linear(hidden_dim, hidden_dim)
        if update == "gated":
            self.gate = nn.Linear(hidden_dim, written)
            self.proposal = nn.Linear(hidden_dim, written)
        if layernorm_mix:
            if writes != "token":
                self.context_norm = nn.LayerNorm(context_dim)
            if writes != "context":
                self.token_norm = nn.LayerNorm(embed_dim)
        self.statistics = RunningMoments(dim=context_dim, momentum=ema_momentum) if diversity in EMA else None
        self._latest: Tensor | None = None

    def forward(self, *, context: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
        """Context (n, d) and token (n, e) after the layer; their order cannot be confused, as both are named.

        Raises:
            ValueError: a context or token of another width.
        """
        self._require_sizes(context, token)
        context, token = self.form.step(self.weights(), context, token)
        self._remember(context)
        return context, token

    def next_context(self, *, context: Tensor, token: Tensor) -> Tensor:
        """The context (n, d) of `forward` alone; see LayerForm."""
        self._require_sizes(context, token)
        context = self.form.context_step(self.weights(), context, token)
        self._remember(context)
        return context

    def weights(self) -> LayerWeights:
        """The parameters by part."""
        fnn, *others = (getattr(self, name, None) for name in LayerWeights._fields)
        return LayerWeights(_pair(fnn), *(None if part is None else _pair(part) for part in others))

    def _require_sizes(self, context: Tensor, token: Tensor) -> None:
        d, e = self.form.context_dim, self.form.embed_dim
        if context.shape[-1] != d or token.shape[-1] != e:
            raise ValueError(
                f"context must be (n, {d}) and token (n, {e}), got {tuple(context.shape)} and {tuple(token.shape)}"
            )

    def _remember(self, context: Tensor) -> None:
        if self.statistics is not None and self.training:
            self._latest = context

    def get_distribution_loss(self) -> Tensor:
        """The diversity loss of the EMA kinds from the contexts of the last call, which the statistics then take in.

        Raises:
            ValueError: the layer keeps no statistics, or saw no context in training mode since.
        """
        if self.statistics is None or self._latest is None:
            raise ValueError("this layer has no contexts to take statistics of; choose an EMA diversity and train()")
        rows, moments, self._latest = self._latest.reshape(-1, self.form.context_dim), self.statistics, None
        first = not int(moments.steps)
        if self.diversity == "centroid_ema":
            loss = -(rows - moments.mean).norm(dim=-1).mean() if not first else rows.sum() * 0
            moments.update(rows)
            if first:  # the first one is the centre, with variance 1
                moments.mean.copy_(rows.detach().mean(0))
                moments.var.fill_(1)
            return loss
        if self.diversity == "ema_target":
            wanted = (rows - moments.mean) / (moments.var + torch.finfo(rows.dtype).eps).sqrt()
            moments.update(rows)
            return functional.mse_loss(rows, wanted.detach())
        if self.diversity == "ema_live":
            mean, var = moments.moved_debiased(rows)
            moments.update(rows)
        else:  # ema_buffer: the literal form, on buffers, which has no gradient (B5)
            moments.update(rows)
            mean, var = moments.mean, moments.var
        return mean.square().mean() + (var - 1).square().mean()
