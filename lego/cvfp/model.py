"""The network that turns (context, token) into the next context: blocks of layers, and NewLLMResidual.

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
from typing import cast

import torch
from torch import Tensor, nn

from lego.cvfp.layer import EMA, CVFPLayer, Writes
from lego.cvfp.losses import BATCH, diversity_of


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
        """`next_context` as a function of context (n, d) and token (n, e), without gradient in the weights.

        It spares the calls of modules, which take half the time of a pass token by token, and keeps no statistics. It
        shares the weights' memory: what a step of an optimizer writes in place, it reads too.
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
