"""The network that turns (context, token) into the next context: layers, blocks and NewLLMResidual.

Names of the weights, as `load_state_dict` takes them (l counts the layers of block b):
    token_embedding.weight (V, e)         embed_norm.{weight,bias} (e,)
    blocks.b.layers.l.fnn.weight (h, d + e), .fnn.bias (h,)    columns: context first, then token; rows the same
    blocks.b.layers.l.context_norm.{weight,bias} (d,)          absent where layernorm_mix is 0
    blocks.b.layers.l.token_norm.{weight,bias} (e,)            absent where layernorm_mix is 0
    token_output.{weight (V, d + e), bias (V,)}
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from lego.cvfp.losses import BATCH, diversity_of
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


@dataclass(frozen=True)
class Reader:
    """What read the next token out of contexts: weight (V, d) and bias (V,), where phase 2's head may start."""

    weight: Tensor
    bias: Tensor


def _keeps_statistics(diversity: str, writes: Writes, last: bool) -> bool:
    """Every layer for the kinds that average over layers, else the one whose context leaves the network."""
    return writes != "token" and (diversity in ("ema_buffer", "ema_live") or (diversity in EMA and last))


class CVFPBlock(nn.Module):
    """Layers in sequence.

    Args:
        layers: of the block.
    """

    def __init__(self, *, layers: Sequence[CVFPLayer]) -> None:
        super().__init__()
        self.layers = cast(Sequence[CVFPLayer], nn.ModuleList(layers))

    def forward(self, *, context: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
        """Context (n, d) and token (n, e) after all layers."""
        for layer in self.layers:
            context, token = layer(context=context, token=token)
        return context, token

    def get_distribution_loss(self) -> Tensor:
        """Mean of its layers' losses; see CVFPLayer."""
        return torch.stack([layer.get_distribution_loss() for layer in self.layers]).mean()


class NewLLMResidual(nn.Module):
    """Embedding, blocks and head (specification, section 2; `LLM` is the same class).

    With `token_structure` the blocks write contexts alone, and as many token blocks write the token vector from
    (context, token): parameters of their own, so that phase 2 cannot change the contexts (section 12).

    Args:
        vocab_size, context_dim, embed_dim, hidden_dim: V, d, e and h = d + e.
        layer_structure: layers of each block.
        token_structure: layers of each token block; empty = the blocks write both.
        layernorm_mix, update: see CVFPLayer.
        head: `context_then_token` reads [context; token], `context` and `token` one of them.
        diversity: of phase 1's loss; see `lego.cvfp.losses` and CVFPLayer.
        normalize: of the centroid kinds.
        ema_momentum: of the EMA kinds.
        init_weight_std, init_bias_std: of the linear layers' normal initialization.
        init_embedding_std: of the embedding's.

    Raises:
        ValueError: hidden_dim is not context_dim + embed_dim.
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        context_dim: int,
        embed_dim: int,
        hidden_dim: int,
        layer_structure: Sequence[int],
        token_structure: Sequence[int],
        layernorm_mix: float,
        update: str,
        head: str,
        diversity: str,
        normalize: str,
        ema_momentum: float,
        init_weight_std: float,
        init_bias_std: float,
        init_embedding_std: float,
    ) -> None:
        super().__init__()
        if hidden_dim != context_dim + embed_dim:
            raise ValueError(
                f"hidden_dim must be context_dim + embed_dim = {context_dim + embed_dim}, got {hidden_dim}"
            )
        self.vocab_size, self.context_dim, self.embed_dim = vocab_size, context_dim, embed_dim
        self.head, self.diversity, self.normalize = head, diversity, normalize

        def blocks(structure: Sequence[int], writes: Writes) -> Sequence[CVFPBlock]:
            made = [
                [
                    CVFPLayer(
                        context_dim=context_dim,
                        embed_dim=embed_dim,
                        hidden_dim=hidden_dim,
                        layernorm_mix=layernorm_mix,
                        update=update,
                        writes=writes,
                        diversity=diversity if _keeps_statistics(diversity, writes, last) else "none",
                        ema_momentum=ema_momentum,
                    )
                    for last in (block == len(structure) - 1 and layer == layers - 1 for layer in range(layers))
                ]
                for block, layers in enumerate(structure)
            ]
            return cast(Sequence[CVFPBlock], nn.ModuleList(CVFPBlock(layers=layers) for layers in made))

        self.token_embedding = nn.Embedding(vocab_size, embed_dim)
        self.embed_norm = nn.LayerNorm(embed_dim)
        self.blocks = blocks(layer_structure, "context" if token_structure else "both")
        self.token_blocks = blocks(token_structure, "token")
        read = {"context": context_dim, "token": embed_dim}.get(head, context_dim + embed_dim)
        self.token_output = nn.Linear(read, vocab_size)
        self._initialize(init_weight_std, init_bias_std, init_embedding_std)

    def _initialize(self, weight_std: float, bias_std: float, embedding_std: float) -> None:
        for module in (one for block in (*self.blocks, *self.token_blocks) for one in block.modules()):
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=weight_std)
                nn.init.normal_(module.bias, std=bias_std) if bias_std else nn.init.zeros_(module.bias)
        nn.init.normal_(self.token_embedding.weight, std=embedding_std)
        self.token_embedding.weight.requires_grad_(False)
        for parameter in self.token_output.parameters():  # enabled by phase 2 (B20)
            nn.init.zeros_(parameter)
            parameter.requires_grad_(False)

    def embed(self, ids: Tensor) -> Tensor:
        """Normalized embeddings (n, e) of ids (n,): the one way from ids to vectors (B16)."""
        return self.embed_norm(self.token_embedding(ids))

    def forward(self, *, context: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
        """The next context (n, d) and the token vector (n, e) of contexts before (n, d) and embeddings (n, e)."""
        written = token
        for block in self.blocks:
            context, written = block(context=context, token=written)
        return context, written

    def next_context(self, *, context: Tensor, token: Tensor) -> Tensor:
        """The next context (n, d) of `forward` alone, which spares what only the token vector needs."""
        *layers, last = (layer for block in self.blocks for layer in block.layers)
        for layer in layers:
            context, token = layer(context=context, token=token)
        return last.next_context(context=context, token=token)

    def frozen_step(self) -> Callable[[Tensor, Tensor], Tensor]:
        """`next_context` as a function of context (n, d) and token (n, e), of the weights as they are now.

        It spares the calls of modules, which take half the time of a pass token by token.
        """
        layers = [(layer.form, layer.weights().detached()) for block in self.blocks for layer in block.layers]

        def step(context: Tensor, token: Tensor) -> Tensor:
            for form, weights in layers[:-1]:
                context, token = form.step(weights, context, token)
            form, weights = layers[-1]
            return form.context_step(weights, context, token)

        return step

    def read(self, *, context: Tensor, token: Tensor) -> Tensor:
        """Token vector (n, e) that the token blocks make of contexts (n, d) and embeddings (n, e)."""
        for block in self.token_blocks:
            _, token = block(context=context, token=token)
        return token

    def logits(self, *, context: Tensor, token: Tensor) -> Tensor:
        """Logits (n, V) of the next token from a context (n, d) and a token vector (n, e)."""
        read = {"context": context, "token": token}
        return self.token_output(read.get(self.head, torch.cat([context, token], dim=-1)))

    def get_distribution_loss(self, contexts: Tensor | None = None) -> Tensor:
        """The diversity loss: of contexts (n, d) for batch kinds, of the layers' own statistics for EMA kinds.

        Raises:
            ValueError: a batch kind, and no contexts.
        """
        if contexts is None and self.diversity not in EMA:
            raise ValueError(f"the diversity {self.diversity} is computed from contexts; give them")
        if contexts is not None and self.diversity in BATCH:
            return diversity_of(contexts, self.diversity, self.normalize)
        if self.diversity in ("ema_buffer", "ema_live"):
            return torch.stack([block.get_distribution_loss() for block in self.blocks]).mean()
        if self.diversity in EMA:  # of the context that leaves the network
            return self.blocks[-1].layers[-1].get_distribution_loss()
        return torch.zeros(()) if contexts is None else contexts.sum() * 0


LLM = NewLLMResidual
