"""Language models whose every layer can be read as logits (specs: ashem section 2).

Shapes: B sequences, T tokens, D width, V vocabulary, N layers. Layers are numbered from 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lego.model.blocks import blocks_above
from lego.model.losses import (
    Score,
    exit_confidence,
    exit_logits,
    linear_cross_entropy,
    max_probability,
    read_exit,
    read_mixture,
)
from lego.model.stack import BLOCK2_CONTEXTS, LayerStack


class BaseTransformer(LayerStack):
    """Decoder-only Transformer with Llama's layers and one exit per layer; built as LayerStack."""

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

    def read_mixed(
        self, exits: Tensor, last: Tensor, y: Tensor, mixed: Score, scores: Iterable[Score] = ()
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """What `read_at` says of the exit; and of mixtures of both loss, right or not, nats expected to be spared (n,).

        Args:
            exits, last: un-normed outputs (n, D) of the exit layer and of the last one.
            y: targets (n,).
            mixed: logits of both -> log-probabilities, see Gate.mixed.
            scores: exit criteria.
        """
        k, n = self.exit_layer, self.num_layers
        both = [(self.layer(at).exit_norm(h), self.head_at(at).weight) for at, h in ((k, exits), (n, last))]
        found = read_mixture(both[0], both[1], mixed, y, scores, exits)
        return found[:-3], found[-3:]

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

    def compute_confidence(self, h: Tensor, layer: int | None = None) -> Tensor:
        """Largest softmax probability (...,) for states h (..., D) of the exit layer, or of another one."""
        layer = self.exit_layer if layer is None else layer
        normed = self.layer(layer).exit_norm(h).reshape(-1, h.shape[-1])  # (n, D)
        return exit_confidence(normed, self.head_at(layer).weight).view(h.shape[:-1])

    @torch.no_grad()
    def route(self, x: Tensor, exit_layer: int, threshold: float) -> tuple[Tensor, Tensor]:
        """Logits (B, T, V) of each token at the depth its confidence sends it to, and the confidences (B, T).

        A token leaves at `exit_layer` if its confidence is at least `threshold`; threshold 0.0 is routing off: every
        token takes the full depth.

        Raises:
            ValueError: exit_layer is none of the model's layers.
        """
        h, deepen = self.exit_at(x, exit_layer)
        both = self.scored_logits_at(h.flatten(0, 1), exit_layer, lambda _, logits: max_probability(logits))
        logits, confidence = both[0].view(*x.shape, -1), both[1].view(x.shape)  # (B, T, V), (B, T)
        if threshold == 0.0:
            every = torch.ones_like(confidence, dtype=torch.bool)
            return self.logits_at(deepen(every).view_as(h), self.num_layers), confidence
        hard = confidence < threshold
        logits[hard] = self.logits_at(deepen(hard), self.num_layers).to(logits.dtype)
        return logits, confidence


class StandardTransformer(BaseTransformer):
    """A plain decoder: exits at its last layer; equal to `transformers.LlamaForCausalLM` with the same weights."""


class DeepSupervisionTransformer(BaseTransformer):
    """A decoder whose tokens may leave at `exit_layer`.

    Args:
        vocab_size, dim, num_layers, num_heads: as in LayerStack.
        exit_layer: last layer of block 1, in 1..num_layers.
        routing_threshold: confidence from which a token leaves early; 0.0 = routing off.
        block2_context: what a token sees above the exit: `full` (the states of the layer below), `token` (itself alone)
            or `sequence` (the exit states up to itself).
        branch_layer: layer whose output block 2 begins at, b; default exit_layer, k. Below it the first k - b layers
            above the exit repeat layers b + 1 to k on their keys and values (ashem section 8); context `sequence`.
        later_blocks: of each block after block 2 the number of its layers, among num_layers, and how many of these, its
            first ones, repeat the last ones of the block below (see lego.model.blocks); context `sequence`.
        **sizes: keyword arguments of LayerStack.

    Raises:
        ValueError: exit_layer or branch_layer outside the model, a threshold below 0, an unknown block2_context, or
            blocks that do not fit each other.
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
        branch_layer: int | None = None,
        later_blocks: Sequence[Sequence[int]] = (),
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
        self.branched_at = branch_layer
        if not 0 <= self.branch_layer <= exit_layer or self.branches > num_layers - exit_layer:
            least = max(0, 2 * exit_layer - num_layers)
            raise ValueError(f"branch_layer must be in {least}..exit_layer = {exit_layer}, got {branch_layer}")
        if self.branches and block2_context != "sequence":
            raise ValueError(f"branch_layer below the exit needs block2_context sequence, got {block2_context!r}")
        if later_blocks and block2_context != "sequence":
            raise ValueError(f"later_blocks need block2_context sequence, got {block2_context!r}")
        self.blocks = blocks_above(exit_layer, num_layers, self.branches, later_blocks)
        for number in (number for block in self.blocks for number in block.repeating):
            self.layer(number).without_keys_values()

    def forward_train(self, x: Tensor) -> dict[str, Any]:
        """Both exits' logits (B, T, V) of all tokens, their confidence (B, T), and the share that would leave early."""
        states = dict(self.outputs(x, sorted({self.exit_layer, self.num_layers})))
        shallow = self.logits_at(states[self.exit_layer], self.exit_layer)
        confidence = max_probability(shallow)
        return {
            "shallow_logits": shallow,
            "deep_logits": self.logits_at(states[self.num_layers], self.num_layers),
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
