"""One pre-norm decoder layer with Llama's parameter names: RMSNorm, rotary attention, SwiGLU, and an exit norm.

Shapes: B sequences, T tokens, D width, H query heads, G key/value heads, d = D / H width of one head.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Rows:
    """Where gathered tokens stand: B sequences, at most Q of them in each, padded at the end.

    Args:
        positions: place of each in its sequence (B, Q).
        taken: false where a sequence has fewer than Q (B, Q); its true entries are the gathered tokens in order.
        packed: every sequence has Q.
        newest: positions are the last Q of every sequence, and the sequences are equally long.
    """

    positions: Tensor
    taken: Tensor
    packed: bool = False
    newest: bool = False

    @classmethod
    def of(cls, mask: Tensor) -> Rows:
        """Of the tokens that are true in mask (B, T); `states[mask]` gathers the same tokens in the same order."""
        counts = mask.sum(dim=1)  # (B,)
        Q = int(counts.max())
        positions = mask.int().argsort(dim=1, descending=True, stable=True)[:, :Q]  # (B, Q)
        return cls(positions, torch.arange(Q, device=mask.device) < counts[:, None])


Rotary = tuple[Tensor, Tensor]


def rotary_frequencies(head_dim: int, theta: float, scaling: dict[str, Any] | None = None) -> Tensor:
    """Angle per position of each pair (head_dim / 2,), scaled for longer contexts as Llama's configurations say.

    Args:
        head_dim: width of one head.
        theta: base of the frequencies.
        scaling: None; rope_type linear with factor; or rope_type llama3 with factor, low_freq_factor, high_freq_factor
            and original_max_position_embeddings: long waves are slowed down by factor, short ones are not.

    Raises:
        ValueError: another rope_type, or a number is missing.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    frequencies = 1.0 / theta**exponents  # theta**-exponents differs in the last bit from Llama's
    if scaling is None:
        return frequencies
    try:
        if scaling["rope_type"] == "linear":
            return frequencies / scaling["factor"]
        if scaling["rope_type"] == "llama3":
            turns = scaling["original_max_position_embeddings"] / (2 * math.pi / frequencies)
            low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
            kept = ((turns - low) / (high - low)).clamp(0, 1)  # 0 = slowed down, 1 = as it is
            return (1 - kept) * frequencies / scaling["factor"] + kept * frequencies
    except KeyError as error:
        raise ValueError(f"rope_scaling lacks {error}, got {scaling}") from None
    raise ValueError(f"rope_scaling must have rope_type linear or llama3, got {scaling}")


def fitting_sizes(given: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a LayerStack, those left open filled in.

    Raises:
        ValueError: they do not fit each other; the message names them.
    """
    sizes = dict(given)
    if sizes["num_kv_heads"] is None:
        sizes["num_kv_heads"] = sizes["num_heads"]
    if sizes["ffn_dim"] is None:
        sizes["ffn_dim"] = 32 * math.ceil(8 * sizes["dim"] / 96)
    if wrong := [name for name in ("num_layers", "num_heads", "num_kv_heads") if sizes[name] < 1]:
        raise ValueError(f"{wrong[0]} must be at least 1, got {sizes[wrong[0]]}")
    dim, heads, kv_heads = sizes["dim"], sizes["num_heads"], sizes["num_kv_heads"]
    if dim % (2 * heads):
        raise ValueError(f"dim must be a multiple of 2 * num_heads = {2 * heads}, got {dim}")
    if heads % kv_heads:
        raise ValueError(f"num_kv_heads must divide num_heads = {heads}, got {kv_heads}")
    return sizes


def rotated(x: Tensor, rotary: Rotary) -> Tensor:
    """Turns each pair (x_i, x_{i + d/2}) of x (..., d), Llama's layout, by cosines and sines (..., d/2)."""
    cos, sin = (part.to(x.dtype) for part in rotary)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class Attention(nn.Module):
    """Causal grouped-query self-attention with rotary positions (Su et al. 2021; Ainslie et al. 2023)."""

    inv_freq: Tensor

    def __init__(self, dim: int, num_heads: int, num_kv_heads: int, frequencies: Tensor) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, dim // num_heads
        self.q_proj = nn.Linear(dim, dim, bias=False)
        self.k_proj = nn.Linear(dim, num_kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(dim, num_kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(dim, dim, bias=False)
        self.register_buffer("inv_freq", frequencies, persistent=False)

    def forward(self, x: Tensor, source: Tensor | None = None) -> Tensor:
        """Attention output (B, T, D) of x over keys and values of `source` (B, T, D), by default x itself."""
        B, T, D = x.shape
        H, G, d = self.num_heads, self.num_kv_heads, self.head_dim
        source = x if source is None else source
        if T == 1:  # the softmax over one key is 1: attention returns the value, whatever query and key are
            v = self.v_proj(source).view(B, T, G, d)
            return self.o_proj(v.repeat_interleave(H // G, dim=2).view(B, T, D))
        rotary = self.rotary(torch.arange(T, device=x.device))
        q = self.q_proj(x).view(B, T, H, d).transpose(1, 2)  # (B, H, T, d)
        k, v = self.keys_values(source, rotary)
        mixed = F.scaled_dot_product_attention(rotated(q, rotary), k, v, is_causal=True, enable_gqa=G != H)
        return self.o_proj(mixed.transpose(1, 2).reshape(B, T, D))

    def keys_values(self, x: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor]:
        """Rotated keys and values (B, G, T, d) of tokens (B, T, D)."""
        B, T, _ = x.shape
        k = self.k_proj(x).view(B, T, self.num_kv_heads, self.head_dim).transpose(1, 2)  # (B, G, T, d)
        v = self.v_proj(x).view(B, T, self.num_kv_heads, self.head_dim).transpose(1, 2)  # (B, G, T, d)
        return rotated(k, rotary), v

    def rotary(self, positions: Tensor) -> Rotary:
        """Cosines and sines (..., d/2) of positions (...); the same for every layer."""
        angles = positions.float().unsqueeze(-1) * self.inv_freq  # (..., d/2)
        return angles.cos(), angles.sin()

    def attend(self, x: Tensor, rows: Rows, k: Tensor, v: Tensor, rotary: Rotary) -> Tensor:
        """Attention output (n, D) of gathered tokens x (n, D) over keys and values (B, G, T, d) of their sequences."""
        (B, Q), T, H, d = rows.positions.shape, k.shape[2], self.num_heads, self.head_dim
        q = self.q_proj(x)
        if not rows.packed:
            padded = q.new_zeros(B, Q, H * d)
            padded[rows.taken] = q
            q = padded
        q = rotated(q.view(B, Q, H, d).transpose(1, 2), rotary)  # (B, H, Q, d)
        sees, whole = None, rows.newest and Q == T
        if not rows.newest or 1 < Q < T:  # else causal, or one query that sees everything
            sees = rows.positions[:, None, :, None] >= torch.arange(T, device=x.device)  # (B, 1, Q, T)
        grouped = k.shape[1] != H
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=sees, is_causal=whole, enable_gqa=grouped)
        mixed = mixed.transpose(1, 2).reshape(B, Q, H * d)
        return self.o_proj(mixed.flatten(0, 1) if rows.packed else mixed[rows.taken])  # (n, D)


class SwiGLU(nn.Module):
    """Gated MLP (Shazeer 2020)."""

    def __init__(self, dim: int, ffn_dim: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(dim, ffn_dim, bias=False)
        self.up_proj = nn.Linear(dim, ffn_dim, bias=False)
        self.down_proj = nn.Linear(ffn_dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class TransformerLayer(nn.Module):
    """Decoder layer that owns the norm through which its output is read as logits.

    Args:
        dim: width of the residual stream.
        num_heads: query heads.
        num_kv_heads: key/value heads; must divide num_heads.
        ffn_dim: inner width of the MLP.
        frequencies: of rotary positions (d / 2,), see rotary_frequencies.
        norm_eps: RMSNorm epsilon.
    """

    def __init__(
        self, dim: int, num_heads: int, num_kv_heads: int, ffn_dim: int, frequencies: Tensor, norm_eps: float
    ) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(dim, eps=norm_eps)
        self.self_attn = Attention(dim, num_heads, num_kv_heads, frequencies)
        self.post_attention_layernorm = nn.RMSNorm(dim, eps=norm_eps)
        self.mlp = SwiGLU(dim, ffn_dim)
        self.exit_norm = nn.RMSNorm(dim, eps=norm_eps)

    def forward(self, x: Tensor, source: Tensor | None = None) -> Tensor:
        """Output (B, T, D) of x; keys and values are projected from `source` (B, T, D), by default from x itself."""
        normed = None if source is None else self.input_layernorm(source)
        x = x + self.self_attn(self.input_layernorm(x), normed)
        return x + self.mlp(self.post_attention_layernorm(x))

    def keys_values(self, source: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor]:
        """This layer's rotated keys and values (B, G, T, d) of states (B, T, D)."""
        return self.self_attn.keys_values(self.input_layernorm(source), rotary)

    def without_keys_values(self) -> None:
        """Takes its key and value projections away: it then runs by `over` alone, on those of another layer."""
        del self.self_attn.k_proj, self.self_attn.v_proj

    def over_all(self, x: Tensor, k: Tensor, v: Tensor, rotary: Rotary) -> Tensor:
        """Output (B, T, D) of all tokens x over their keys and values (B, G, T, d); rotary factors (T, d/2)."""
        B, T, _ = x.shape
        positions = torch.arange(T, device=x.device).expand(B, T)
        rows = Rows(positions, torch.ones_like(positions, dtype=torch.bool), packed=True, newest=True)
        return self.over(x.flatten(0, 1), rows, k, v, rotary).view_as(x)

    def over(self, x: Tensor, rows: Rows, k: Tensor, v: Tensor, rotary: Rotary) -> Tensor:
        """Output (n, D) of gathered tokens only, over given keys and values of their sequences.

        Args:
            x: the gathered tokens' states (n, D).
            rows: where they stand.
            k, v: keys and values (B, G, T, d), of every token so far or from a cache.
            rotary: of the rows' positions, (B, 1, Q, d/2).
        """
        x = x + self.self_attn.attend(self.input_layernorm(x), rows, k, v, rotary)
        return x + self.mlp(self.post_attention_layernorm(x))
