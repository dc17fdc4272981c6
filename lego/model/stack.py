"""A stack of Transformer layers: how states run through it, of all tokens and of the hard ones alone.

Shapes: B sequences, T tokens, D width, N layers. Layers are numbered from 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from lego.model.blocks import Block
from lego.model.climb import Climb, last_of
from lego.model.layers import TransformerLayer, fitting_sizes, rotary_frequencies
from lego.model.reached import Reached

BLOCK2_CONTEXTS = ("full", "token", "sequence")
CONTEXT_AT_INFERENCE = {"token": "token", "sequence": "sequence", "historic": "full"}  # by ashem.phase2_context


class LayerStack(nn.Module):
    """The embedding, Llama's layers and the output heads of a decoder-only Transformer, and its states at every layer.

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
        given = {
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
        self.sizes: dict[str, Any] = fitting_sizes(given)
        num_kv_heads, ffn_dim = self.sizes["num_kv_heads"], self.sizes["ffn_dim"]
        self.generation_config: dict[str, Any] = {}  # of the checkpoint it comes from: stop ids and the like
        self.num_layers = num_layers
        self.exit_layer = num_layers
        self.branched_at: int | None = None
        self.blocks: tuple[Block, ...] = ()  # above the exit
        self.branch_rank = 0  # of what branch layers learn in training; 0 = whole matrices
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

    @property
    def heads(self) -> list[nn.Linear]:
        """The output heads: block 1's, and block 2's where it has its own."""
        return [self.output_head] + ([] if self.deep_head is None else [self.deep_head])

    @property
    def branch_layer(self) -> int:
        """Layer whose output block 2 begins at."""
        return self.exit_layer if self.branched_at is None else self.branched_at

    @property
    def branches(self) -> int:
        """Layers above the exit that repeat layers branch_layer + 1 to exit_layer on their keys and values."""
        return self.exit_layer - self.branch_layer

    @property
    def repeats_any(self) -> bool:
        """Whether any layer above the exit repeats another."""
        return any(block.repeats for block in self.blocks)

    @property
    def own_layers(self) -> list[int]:
        """Layers above the exit with keys and values of their own."""
        return [number for block in self.blocks for number in block.own]

    @property
    def exits(self) -> tuple[int, ...]:
        """Last layer of each block."""
        return (self.exit_layer, *(block.last for block in self.blocks))

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
            ValueError: the first layer to run reads exit states in `sequence` context, and h holds others; or block 2
                begins below the exit, and h is the output of a later layer than it begins at.
        """
        boundary = self.num_layers if self.block2_context == "full" else self.exit_layer
        if self.repeats_any and last > boundary:
            return self._run_branched(h, first, last)
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

    def _run_branched(self, h: Tensor, first: int, last: int) -> Tensor:
        """`run_layers` to a layer above the exit, where a block begins below the end of the one before."""
        if first > self.branch_layer + 1:
            what = f"layers above the exit run from the output of layer {self.branch_layer} on"
            raise ValueError(f"{what}, got first = {first}")
        h = self.run_layers(h, first, self.branch_layer)
        return self.gathered(h, torch.ones(h.shape[:2], dtype=torch.bool, device=h.device), last).view_as(h)

    def trunk(self, x: Tensor) -> Tensor:
        """Un-normed output (B, T, D) of the layer that block 2 begins at, or the embedding, for token ids (B, T)."""
        return self.run_layers(self.embedding(x), 1, self.branch_layer)

    def outputs(self, x: Tensor, layers: Iterable[int]) -> Iterator[tuple[int, Tensor]]:
        """Number and un-normed output (B, T, D) of each of the layers, in ascending order, for token ids (B, T).

        Raises:
            ValueError: see `states_at`.
        """
        wanted, h, done = sorted({self._known(layer) for layer in layers}), self.embedding(x), 0
        above = self.block2_context == "sequence" and max(wanted, default=0) > self.exit_layer
        first = self.branch_layer if above else self.num_layers  # up to it each layer reads the one below
        for layer in wanted:
            if layer <= first:
                h, done = self.run_layers(h, done + 1, layer), layer
                yield layer, h
        if above:
            h = self.run_layers(h, done + 1, first)
            yield from self._outputs_above(h, [layer for layer in wanted if layer > first])

    def _outputs_above(self, h: Tensor, wanted: list[int]) -> Iterator[tuple[int, Tensor]]:
        """`outputs` from outputs h (B, T, D) of the layer that block 2 begins at, in `sequence` context."""
        if not self.repeats_any:
            source = h
            for number in range(self.exit_layer + 1, wanted[-1] + 1):
                h = self.layer(number)(h, source)
                if number in wanted:
                    yield number, h
            return
        reached, every = self.reach(h, each=True), torch.ones(h.shape[:2], dtype=torch.bool, device=h.device)
        for number, state in enumerate(reached.states, self.branch_layer):
            if number in wanted:
                yield number, state
        for number, x in self._above_exit(reached, every, wanted[-1]):
            if number in wanted:
                yield number, x.view_as(h)

    def states_at(self, x: Tensor, layer: int) -> Tensor:
        """Un-normed output (B, T, D) of a layer for token ids (B, T).

        Raises:
            ValueError: the model has no such layer.
        """
        return self.run_layers(self.embedding(x), 1, self._known(layer))

    def _known(self, layer: int) -> int:
        if not 1 <= layer <= self.num_layers:
            raise ValueError(f"exit_layer must be in 1..num_layers = {self.num_layers}, got {layer}")
        return layer

    def forward_to_hidden(self, x: Tensor) -> Tensor:
        """Un-normed output (B, T, D) of the exit layer; StandardTransformer exits at its last layer."""
        return self.states_at(x, self.exit_layer)

    def gathered(self, h: Tensor, mask: Tensor, last: int, reached: Reached | None = None) -> Tensor:
        """States (n, D) at layer `last` of the tokens true in mask (B, T) alone.

        They are computed from outputs h (B, T, D) of the layer that block 2 begins at, or from what is `reached` there.
        Keys and values of branch layers are block 1's, those of the layers above are projected from the exit states of
        all tokens (ashem sections 5 and 8), so a token's result does not depend on which other tokens are computed.
        """
        x = h[mask]  # (n, D)
        if not len(x):
            return x
        if reached is None:
            deepest = min(self.exit_layer, self.branch_layer + last - self.exit_layer)  # of block 1, that `last` needs
            reached = self.reach(h, deepest, whole=any(number <= last for number in self.own_layers))
        return last_of(self._above_exit(reached, mask, last), x)

    def reach(
        self, h: Tensor, deepest: int | None = None, whole: bool = True, begin: int | None = None, each: bool = False
    ) -> Reached:
        """Block 1 from outputs h (B, T, D) of the layer that block 2 begins at, with what branch layers read of it.

        Args:
            h: outputs of that layer.
            deepest: layer to go to; default the exit.
            whole: whether the deepest layer's own output is wanted too, not its keys and values alone.
            begin: that layer, of a model that has no block 2 yet.
            each: keep the outputs of the layers between the first and the last too.
        """
        deepest = self.exit_layer if deepest is None else deepest
        begin = self.branch_layer if begin is None else begin
        every = self.layer(1).self_attn.rotary(torch.arange(h.shape[1], device=h.device))  # (T, d/2)
        states, keys_values = [h], list[tuple[Tensor, Tensor]]()
        for number in range(begin + 1, deepest + 1):
            layer = self.layer(number)
            keys_values.append(layer.keys_values(h, every))
            if whole or number < deepest:
                h = layer.over_all(h, *keys_values[-1], every)
                states = [*states, h] if each else [states[0], h]
        return Reached(states, keys_values)

    def _above_exit(self, reached: Reached, mask: Tensor, last: int) -> Iterator[tuple[int, Tensor]]:
        """Number and output (n, D) of each layer above the exit up to `last`, of the tokens true in mask (B, T)."""
        climb = Climb(self.layer, self.blocks, reached, mask)
        for block in self.blocks:
            if block.first <= last:
                yield from climb.through(block, last)

    def deepened(self, reached: Reached, mask: Tensor) -> Tensor:
        """States (n, D) at the end of the last block of the tokens true in mask (B, T), from what it reads."""
        climb = Climb(self.layer, self.blocks, reached, mask, self.blocks[-1])
        return last_of(climb.through(self.blocks[-1]), reached.states[0])

    def exit_at(self, x: Tensor, layer: int) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """`states_at`, and a function that takes the tokens marked in (B, T) from there to the last layer (n, D)."""
        first = min(self._known(layer), self.branch_layer) if self.repeats_any else self._known(layer)
        start = self.run_layers(self.embedding(x), 1, first)
        reached = self.reach(start) if first < layer == self.exit_layer else None
        h = self.run_layers(start, first + 1, layer) if reached is None else reached.states[-1]
        return h, lambda hard: self.deepen(start, hard, first, reached)

    def deepen(self, h: Tensor, hard: Tensor, layer: int, reached: Reached | None = None) -> Tensor:
        """Full-depth states (n_hard, D) of the tokens marked in hard (B, T), from outputs h (B, T, D) of a layer.

        That is the exit, or where block 2 begins below it the layer that it begins at; what is `reached` from there
        need not be computed again.
        """
        if layer == self.num_layers:
            return h[hard]
        if self.block2_context == "sequence" and layer == self.branch_layer:
            return self.gathered(h, hard, self.num_layers, reached)
        if self.block2_context == "token" and layer >= self.exit_layer:  # the hard tokens need no other token
            return self.run_layers(h[hard].unsqueeze(1), layer + 1, self.num_layers).squeeze(1)
        return self.run_layers(h, layer + 1, self.num_layers)[hard]
