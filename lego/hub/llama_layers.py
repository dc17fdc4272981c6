"""Llama's layers as a routed model runs them: over all tokens, over a token alone, over the exit states of all tokens.

Shapes: B sequences, Q new tokens, H rows of them that are computed, S tokens in the cache, D width.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, apply_rotary_pos_emb, eager_attention_forward


@dataclass(frozen=True)
class Watched:
    """What a caller asked to see of every layer; None is not asked for.

    A token that left has no states above the exit: there its exit state stands for them, and it attends to nothing.

    Args:
        states: the embeddings (B, Q, D), and every layer's output.
        attentions: every layer's weights (B, heads, Q, S).
        chosen: numbers of the states that are wanted, negative ones from the end; None = all.
    """

    states: list[Tensor] | None = None
    attentions: list[Tensor] | None = None
    chosen: tuple[int, ...] | None = None

    @property
    def anything(self) -> bool:
        return self.states is not None or self.attentions is not None

    def outputs(self, last: Tensor) -> tuple[tuple[Tensor | None, ...] | None, tuple[Tensor, ...] | None]:
        """States and attentions as outputs hold them: as in Llama, the last state (B, Q, D) is the normed one."""
        states: tuple[Tensor | None, ...] | None = None
        if self.states is not None:
            states, count = (*self.states[:-1], last), len(self.states)
            if self.chosen is not None:
                states = tuple(h if {i, i - count} & {*self.chosen} else None for i, h in enumerate(states))
        return states, None if self.attentions is None else tuple(self.attentions)

    def add_state(self, h: Tensor) -> None:
        if self.states is not None:
            self.states.append(h)

    def add_above(self, exits: Tensor, deep: Tensor | None, x: Tensor) -> None:
        """Takes in a layer's output above the exit: x (n, D) where deep (B, Q), else (B, Q, D) of all tokens."""
        if self.states is not None:
            if deep is not None:
                merged = exits.clone()
                merged[deep] = x
                x = merged
            self.states.append(x)

    def add_weights(self, deep: Tensor | None, weights: Tensor | None) -> None:
        """Takes in attention weights above the exit: (n, heads, S) where deep (B, Q), else (B, heads, Q, S)."""
        if self.attentions is not None:
            if deep is not None:
                spread = torch.zeros_like(self.attentions[0]).transpose(1, 2)  # (B, Q, heads, S)
                if weights is not None:
                    spread[deep] = weights
                weights = spread.transpose(1, 2)
            if weights is not None:
                self.attentions.append(weights)


@dataclass(frozen=True)
class Reading:
    """What every layer is given.

    Args:
        mask: of attention (B, 1, Q, S); None = causal.
        rotary: cosines and sines (B, Q, d) of the new tokens.
        cache: takes in keys and values; None = nothing is remembered.
        seen: tokens that it held before.
        attention: name of transformers' implementation.
        watched: takes in what layers do.
        kwargs: handed on to Llama's own layers.
        below: states (B, Q, D) below each layer of block 1 that a branch layer repeats, and its keys and values where
            there is a cache.
    """

    mask: Tensor | None
    rotary: tuple[Tensor, Tensor]
    cache: Cache | None
    seen: int
    attention: str
    watched: Watched
    kwargs: dict[str, Any]
    below: list[tuple[Tensor, tuple[Tensor, Tensor] | None]] = field(default_factory=list)

    def rotary_of(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines (B, H, d) of the tokens at `rows` (B, H)."""
        cos, sin = (
            part.expand(rows.shape[0], -1, -1).gather(1, rows.unsqueeze(-1).expand(-1, -1, part.shape[-1]))
            for part in self.rotary
        )
        return cos, sin

    def mask_of(self, rows: Tensor) -> Tensor:
        """What the tokens at `rows` (B, H) may see, (B, 1, H, S): their rows of the causal mask."""
        if self.mask is not None:
            mask = self.mask.expand(rows.shape[0], -1, -1, -1)
            return mask.gather(2, rows[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[-1]))
        newest = self.rotary[0].shape[1] + self.seen
        return (rows + self.seen)[:, None, :, None] >= torch.arange(newest, device=rows.device)

    def own_weights(self) -> Tensor:
        """Attention weights (B, heads, Q, S) of tokens that see themselves alone."""
        weights = torch.zeros_like((self.watched.attentions or [])[0])
        every = torch.arange(weights.shape[2], device=weights.device)
        weights[:, :, every, every + self.seen] = 1
        return weights


class Recorded:
    """A cache that keeps what it returned: the keys and values of every token so far, however it stores them."""

    def __init__(self, cache: Cache) -> None:
        self.cache, self.found = cache, (torch.empty(0), torch.empty(0))

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.found = self.cache.update(*args, **kwargs)
        return self.found


def repeated(layer: Any, h: Tensor, reading: Reading) -> Tensor:
    """Llama's own layer over all tokens, noting what a branch layer needs of it."""
    if reading.cache is None:  # its keys and values are projected again where they are needed
        reading.below.append((h, None))
        return whole(layer, h, reading)
    cache = Recorded(reading.cache)
    output = whole(layer, h, reading, cache)
    reading.below.append((h, cache.found))
    return output


def whole(layer: Any, h: Tensor, reading: Reading, cache: Any = None) -> Tensor:
    """Llama's own layer over all tokens."""
    attentions, hook = reading.watched.attentions, None
    if attentions is not None:  # the layer itself drops them
        hook = layer.self_attn.register_forward_hook(lambda _, __, output: attentions.append(output[1]))
    try:
        return layer(
            h,
            attention_mask=reading.mask,
            position_embeddings=reading.rotary,
            past_key_values=cache or reading.cache,
            **reading.kwargs,
        )
    finally:
        if hook is not None:
            hook.remove()


def alone(layer: LlamaDecoderLayer, x: Tensor) -> Tensor:
    """A layer for tokens (..., D) that see themselves alone: attention returns the value."""
    attention, groups = layer.self_attn, layer.self_attn.num_key_value_groups
    v = attention.v_proj(layer.input_layernorm(x)).unflatten(-1, (-1, attention.head_dim))  # (..., G, d)
    x = x + attention.o_proj(v.repeat_interleave(groups, dim=-2).flatten(-2))
    return x + layer.mlp(layer.post_attention_layernorm(x))


def over_exits(
    layer: LlamaDecoderLayer,
    x: Tensor,
    exits: Tensor,
    mask: Tensor | None,
    rotary: tuple[Tensor, Tensor],
    reading: Reading,
) -> tuple[Tensor, Tensor | None]:
    """A layer for rows x (B, H, D), over keys and values of the exit states (B, Q, D) of all tokens.

    Returns:
        its output (B, H, D), and attention weights (B, heads, H, S) where the implementation has them.
    """
    k, v = keys_values(layer, exits, reading)
    if reading.cache is not None:
        k, v = reading.cache.update(k, v, layer.self_attn.layer_idx)
    return over(layer, x, k, v, mask, rotary, reading)


def over_block1(
    layer: LlamaDecoderLayer,
    x: Tensor,
    below: Tensor,
    frozen: LlamaDecoderLayer,
    found: tuple[Tensor, Tensor] | None,
    mask: Tensor | None,
    rotary: tuple[Tensor, Tensor],
    reading: Reading,
) -> tuple[Tensor, Tensor | None]:
    """A branch layer for rows x (B, H, D), over keys and values of the layer of block 1 that it repeats.

    Args:
        below: states (B, Q, D) below that layer, of all tokens.
        frozen: that layer.
        found: its keys and values, if there is a cache.
    """
    k, v = keys_values(frozen, below, reading) if found is None else found
    return over(layer, x, k, v, mask, rotary, reading)


def keys_values(layer: LlamaDecoderLayer, h: Tensor, reading: Reading) -> tuple[Tensor, Tensor]:
    """Rotated keys and values (B, G, Q, d) of a layer for states (B, Q, D) below it."""
    attention = layer.self_attn
    source = layer.input_layernorm(h)
    shape = (*source.shape[:2], -1, attention.head_dim)
    k = attention.k_proj(source).view(shape).transpose(1, 2)  # (B, G, Q, d)
    v = attention.v_proj(source).view(shape).transpose(1, 2)  # (B, G, Q, d)
    return apply_rotary_pos_emb(k, k, *reading.rotary)[0], v


def over(
    layer: LlamaDecoderLayer,
    x: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    rotary: tuple[Tensor, Tensor],
    reading: Reading,
) -> tuple[Tensor, Tensor | None]:
    """A layer for rows x (B, H, D) over keys and values (B, G, S, d), and its attention weights (B, heads, H, S)."""
    if not x.shape[1]:
        return x, None
    attention = layer.self_attn
    if mask is not None and mask.dtype is torch.bool:  # a static cache has slots beyond the newest token
        mask = F.pad(mask, (0, k.shape[2] - mask.shape[-1]))
    q = attention.q_proj(layer.input_layernorm(x)).view(*x.shape[:2], -1, attention.head_dim).transpose(1, 2)
    q, _ = apply_rotary_pos_emb(q, q, *rotary)  # (B, heads, H, d)
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(reading.attention, eager_attention_forward)
    dropout = attention.attention_dropout if attention.training else 0.0
    mixed, weights = attend(attention, q, k, v, mask, dropout=dropout, scaling=attention.scaling)
    x = x + attention.o_proj(mixed.reshape(*x.shape[:2], -1))
    return x + layer.mlp(layer.post_attention_layernorm(x)), weights
