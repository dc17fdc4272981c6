"""Language models whose every layer can be read as logits (specs: ashem section 2).

Shapes: B sequences, T tokens, D width, V vocabulary, N layers. Layers are numbered from 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from lego.model.layers import Rows, TransformerLayer, rotary_frequencies
from lego.model.losses import Score, exit_confidence, exit_logits, linear_cross_entropy, max_probability, read_exit

BLOCK2_CONTEXTS = ("full", "token", "sequence")
CONTEXT_AT_INFERENCE = {"token": "token", "sequence": "sequence", "historic": "full"}  # by ashem.phase2_context


class BaseTransformer(nn.Module):
    """Decoder-only Transformer with Llama's layers and one exit per layer.

    Args:
        vocab_size: entries of the vocabulary (V).
        dim: width of the residual stream (D); a multiple of 2 * num_heads.
        num_layers: depth (N).
        num_heads: query heads.
        num_kv_heads: key/value heads, must divide num_heads; default num_heads.
        ffn_dim: inner width of the MLP; default 8/3 dim, rounded up to a multiple of 32.
        rope_theta: base of the rotary frequencies.
        rope_scaling: how they are scaled, as in Llama's configuration: None, rope_type linear or rope_type llama3.
        norm_eps: RMSNorm epsilon.
        context: longest sequence it was trained on; None if that is not known.
        init_std: standard deviation of the initial weights; norms start at one.
        tie_embeddings: the output head shares the embedding's weight.
        own_head: layers above the exit have an output head of their own, `deep_head`.

    Raises:
        ValueError: sizes that do not fit each other; the message names them.
    """

    def __init__(
        self,
        vocab_size: int,
        dim: int,
        num_layers: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        ffn_dim: int | None = None,
        rope_theta: float = 10000.0,
        rope_scaling: dict[str, Any] | None = None,
        norm_eps: float = 1e-6,
        context: int | None = None,
        init_std: float = 0.02,
        tie_embeddings: bool = False,
        own_head: bool = False,
    ) -> None:
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        ffn_dim = 32 * math.ceil(8 * dim / 96) if ffn_dim is None else ffn_dim
        counts = {"num_layers": num_layers, "num_heads": num_heads, "num_kv_heads": num_kv_heads}
        if wrong := [name for name, count in counts.items() if count < 1]:
            raise ValueError(f"{wrong[0]} must be at least 1, got {counts[wrong[0]]}")
        if dim % (2 * num_heads):
            raise ValueError(f"dim must be a multiple of 2 * num_heads = {2 * num_heads}, got {dim}")
        if num_heads % num_kv_heads:
            raise ValueError(f"num_kv_heads must divide num_heads = {num_heads}, got {num_kv_heads}")
        self.sizes: dict[str, Any] = {
            "vocab_size": vocab_size,
            "dim": dim,
            "num_layers": num_layers,
            "num_heads": num_heads,
            "num_kv_heads": num_kv_heads,
            "ffn_dim": ffn_dim,
            "rope_theta": rope_theta,
            "rope_scaling": rope_scaling,
            "context": context,
            "norm_eps": norm_eps,
            "init_std": init_std,
            "tie_embeddings": tie_embeddings,
            "own_head": own_head,
        }
        self.num_layers = num_layers
        self.exit_layer = num_layers
        self.block2_context = "full"
        self.embedding = nn.Embedding(vocab_size, dim)
        frequencies = rotary_frequencies(dim // num_heads, rope_theta, rope_scaling)
        self.layers = nn.ModuleList(
            TransformerLayer(dim, num_heads, num_kv_heads, ffn_dim, frequencies, norm_eps) for _ in range(num_layers)
        )
        self.output_head = nn.Linear(dim, vocab_size, bias=False)
        self.deep_head = nn.Linear(dim, vocab_size, bias=False) if own_head else None
        for weight in self.parameters():
            if weight.dim() == 2:
                nn.init.normal_(weight, std=init_std)
        if tie_embeddings:
            self.output_head.weight = self.embedding.weight

    def layer(self, number: int) -> TransformerLayer:
        """The layer of this number, from 1."""
        return cast(TransformerLayer, self.layers[number - 1])

    def run_layers(self, h: Tensor, first: int, last: int) -> Tensor:
        """Applies layers first..last, those above the exit in the model's block2_context.

        Args:
            h: states below layer `first`, (B, T, D).
            first: first layer to run, from 1.
            last: last layer to run; below `first` nothing is run.

        Raises:
            ValueError: the first layer to run reads exit states in `sequence` context, and h holds others.
        """
        boundary = self.num_layers if self.block2_context == "full" else self.exit_layer
        for index in range(first, min(last, boundary) + 1):
            h = self.layers[index - 1](h)
        if last <= boundary:
            return h
        B, T, D = h.shape
        if self.block2_context == "sequence":
            if first > boundary + 1:
                raise ValueError(f"layers above the exit run from layer {boundary + 1} on, got first = {first}")
            source = h
            for index in range(boundary + 1, last + 1):
                h = self.layers[index - 1](h, source)
            return h
        h = h.reshape(B * T, 1, D)
        for index in range(max(first, boundary + 1), last + 1):
            h = self.layers[index - 1](h)
        return h.reshape(B, T, D)

    def head_at(self, layer: int) -> nn.Linear:
        """The output head through which a layer is read."""
        return self.deep_head if self.deep_head is not None and layer > self.exit_layer else self.output_head

    def logits_at(self, h: Tensor, layer: int) -> Tensor:
        """Reads a layer's un-normed output (..., D) as logits (..., V)."""
        return self.head_at(layer)(self.layer(layer).exit_norm(h))

    def loss_at(self, h: Tensor, layer: int, y: Tensor) -> Tensor:
        """Mean cross-entropy in nats of a layer's un-normed output (..., D) for targets (...,)."""
        normed = self.layer(layer).exit_norm(h).reshape(-1, h.shape[-1])  # (n, D)
        return linear_cross_entropy(normed, self.head_at(layer).weight, y.flatten())

    def read_at(self, h: Tensor, layer: int, y: Tensor, scores: Iterable[Score] = ()) -> tuple[Tensor, ...]:
        """Per token (n,) of un-normed outputs (..., D) for targets (...,): loss in nats, right or not, confidence.

        Exit criteria, if given in `scores`, are evaluated too (see `lego.model.exit_criteria`).
        """
        states = h.reshape(-1, h.shape[-1])  # (n, D)
        return read_exit(self.layer(layer).exit_norm(states), self.head_at(layer).weight, y.flatten(), scores, states)

    def scored_logits_at(self, h: Tensor, layer: int, score: Score) -> tuple[Tensor, Tensor]:
        """Logits (n, V) of un-normed outputs (n, D) of a layer, and the exit criterion's score of each (n,)."""
        return exit_logits(self.layer(layer).exit_norm(h), self.head_at(layer).weight, score, h)

    def forward(self, x: Tensor) -> Tensor:
        """Full-depth logits (B, T, V) of token ids (B, T)."""
        return self.logits_at(self.run_layers(self.embedding(x), 1, self.num_layers), self.num_layers)

    def forward_all_layers(self, x: Tensor) -> list[Tensor]:
        """Logits (B, T, V) of every layer, shallow to deep."""
        logits = []
        for layer, h in self.outputs(x, range(1, self.num_layers + 1)):
            logits.append(self.logits_at(h, layer))
        return logits

    def outputs(self, x: Tensor, layers: Iterable[int]) -> Iterator[tuple[int, Tensor]]:
        """Number and un-normed output (B, T, D) of each of the layers, in ascending order, for token ids (B, T)."""
        h, done, above = self.embedding(x), 0, self.exit_layer + 1
        for layer in layers:
            if self.block2_context == "sequence" and layer >= above:  # each is reached anew from the exit states
                h, done = self.run_layers(h, done + 1, self.exit_layer), self.exit_layer
                yield layer, self.run_layers(h, above, layer)
            else:
                h, done = self.run_layers(h, done + 1, layer), layer
                yield layer, h

    def states_at(self, x: Tensor, layer: int) -> Tensor:
        """Un-normed output (B, T, D) of a layer for token ids (B, T).

        Raises:
            ValueError: the model has no such layer.
        """
        if not 1 <= layer <= self.num_layers:
            raise ValueError(f"exit_layer must be in 1..num_layers = {self.num_layers}, got {layer}")
        return self.run_layers(self.embedding(x), 1, layer)

    def forward_to_hidden(self, x: Tensor) -> Tensor:
        """Un-normed output (B, T, D) of the exit layer; StandardTransformer exits at its last layer."""
        return self.states_at(x, self.exit_layer)

    def compute_confidence(self, h: Tensor) -> Tensor:
        """Largest softmax probability at the exit layer (...,) for exit states h (..., D)."""
        normed = self.layer(self.exit_layer).exit_norm(h).reshape(-1, h.shape[-1])  # (n, D)
        return exit_confidence(normed, self.head_at(self.exit_layer).weight).view(h.shape[:-1])

    @torch.no_grad()
    def route(self, x: Tensor, exit_layer: int, threshold: float) -> tuple[Tensor, Tensor]:
        """Logits (B, T, V) of each token at the depth its confidence sends it to, and the confidences (B, T).

        A token leaves at `exit_layer` if its confidence is at least `threshold`; threshold 0.0 is routing off: every
        token takes the full depth.

        Raises:
            ValueError: exit_layer is none of the model's layers.
        """
        h = self.states_at(x, exit_layer)
        both = self.scored_logits_at(h.flatten(0, 1), exit_layer, lambda _, logits: max_probability(logits))
        logits, confidence = both[0].view(*x.shape, -1), both[1].view(x.shape)  # (B, T, V), (B, T)
        if threshold == 0.0:
            return self.logits_at(self.run_layers(h, exit_layer + 1, self.num_layers), self.num_layers), confidence
        hard = confidence < threshold
        logits[hard] = self.logits_at(self.deepen(h, hard, exit_layer), self.num_layers).to(logits.dtype)
        return logits, confidence

    def gathered(self, h: Tensor, mask: Tensor, last: int) -> Tensor:
        """States (n, D) at layer `last` of the tokens true in mask (B, T) alone, from exit states h (B, T, D).

        Keys and values of every layer are projected from the exit states of all tokens (ashem section 5, kv_source
        exit), so a token's result does not depend on which other tokens are computed.
        """
        x = h[mask]  # (n, D)
        if len(x):
            rows, attention = Rows.of(mask), self.layer(last).self_attn
            own = attention.rotary(rows.positions.unsqueeze(1))  # (B, 1, Q, d/2)
            every = attention.rotary(torch.arange(h.shape[1], device=h.device))  # (T, d/2)
            for number in range(self.exit_layer + 1, last + 1):
                layer = self.layer(number)
                x = layer.over(x, rows, *layer.keys_values(h, every), own)
        return x

    def deepen(self, h: Tensor, hard: Tensor, exit_layer: int) -> Tensor:
        """Full-depth states (n_hard, D) of the tokens marked in hard (B, T), from outputs h (B, T, D) of exit_layer."""
        if self.block2_context == "sequence" and exit_layer == self.exit_layer:
            return self.gathered(h, hard, self.num_layers)
        if self.block2_context == "token" and exit_layer >= self.exit_layer:  # the hard tokens need no other token
            return self.run_layers(h[hard].unsqueeze(1), exit_layer + 1, self.num_layers).squeeze(1)
        return self.run_layers(h, exit_layer + 1, self.num_layers)[hard]


class StandardTransformer(BaseTransformer):
    """A plain decoder: exits at its last layer; equal to `transformers.LlamaForCausalLM` with the same weights."""


class DeepSupervisionTransformer(BaseTransformer):
    """A decoder whose tokens may leave at `exit_layer`.

    Args:
        vocab_size, dim, num_layers, num_heads: as in BaseTransformer.
        exit_layer: last layer of block 1, in 1..num_layers.
        routing_threshold: confidence from which a token leaves early; 0.0 = routing off.
        block2_context: what a token sees above the exit: `full` (the states of the layer below), `token` (itself alone)
            or `sequence` (the exit states up to itself).
        **sizes: keyword arguments of BaseTransformer.

    Raises:
        ValueError: exit_layer outside the model, a threshold below 0, or an unknown block2_context.
    """

    def __init__(
        self,
        vocab_size: int,
        dim: int,
        num_layers: int,
        num_heads: int,
        exit_layer: int = 1,
        routing_threshold: float = 0.0,
        *,
        block2_context: str = "full",
        **sizes: Any,
    ) -> None:
        super().__init__(vocab_size, dim, num_layers, num_heads, **sizes)
        if not 1 <= exit_layer <= num_layers:
            raise ValueError(f"exit_layer must be in 1..num_layers = {num_layers}, got {exit_layer}")
        if block2_context not in BLOCK2_CONTEXTS:
            raise ValueError(f"block2_context must be one of {', '.join(BLOCK2_CONTEXTS)}, got {block2_context!r}")
        if not routing_threshold >= 0:  # NaN fails every comparison
            raise ValueError(f"routing_threshold must be at least 0.0, got {routing_threshold}")
        self.exit_layer = exit_layer
        self.routing_threshold = routing_threshold
        self.block2_context = block2_context

    def forward_train(self, x: Tensor) -> dict[str, Any]:
        """Both exits' logits (B, T, V) of all tokens, their confidence (B, T), and the share that would leave early."""
        h = self.forward_to_hidden(x)
        shallow = self.logits_at(h, self.exit_layer)
        confidence = max_probability(shallow)
        return {
            "shallow_logits": shallow,
            "deep_logits": self.logits_at(self.run_layers(h, self.exit_layer + 1, self.num_layers), self.num_layers),
            "confidence": confidence,
            "shallow_ratio": shallow_ratio(confidence, self.routing_threshold),
        }

    def forward_inference(self, x: Tensor) -> tuple[Tensor, dict[str, float]]:
        """Routed logits (B, T, V) and the batch's mean_confidence, shallow_ratio and compute_cost."""
        logits, confidence = self.route(x, self.exit_layer, self.routing_threshold)
        ratio = shallow_ratio(confidence, self.routing_threshold)
        return logits, {
            "mean_confidence": confidence.mean().item(),
            "shallow_ratio": ratio,
            "compute_cost": compute_cost(ratio, self.exit_layer, self.num_layers),
        }


def shallow_ratio(confidence: Tensor, threshold: float) -> float:
    """Share of tokens that leave at the exit layer; 0 when routing is off (threshold 0.0)."""
    return 0.0 if threshold == 0.0 else (confidence >= threshold).float().mean().item()


def compute_cost(ratio: float, exit_layer: int, num_layers: int) -> float:
    """Share of the full depth's layers that are run when `ratio` of the tokens leave early (ashem section 1)."""
    return (ratio * exit_layer + (1 - ratio) * num_layers) / num_layers


def read_result(nll: float, right: int, easy: int, tokens: int, exit_layer: int, num_layers: int) -> dict[str, float]:
    """Accuracy, perplexity, shallow_ratio and compute_cost from sums over tokens: losses in nats, hits, early exits.

    Raises:
        ValueError: there was no token.
    """
    if not tokens:
        raise ValueError("no batches to evaluate: give a re-iterable that yields at least one (x, y)")
    ratio = easy / tokens
    return {
        "acc": right / tokens,
        "ppl": math.exp(min(nll / tokens, 700.0)),  # e^709 is the largest float
        "shallow_ratio": ratio,
        "compute_cost": compute_cost(ratio, exit_layer, num_layers),
    }
