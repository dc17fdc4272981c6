"""One pre-norm decoder layer with Llama's parameter names: RMSNorm, rotary attention, SwiGLU, and an exit norm.

Shapes: B sequences, T tokens, D width, H query heads, G key/value heads, d = D / H width of one head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def rotate_half(x: Tensor) -> Tensor:
    """Turns each pair (x_i, x_{i + d/2}) by 90 degrees, Llama's layout of rotary pairs."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


@dataclass(frozen=True)
class Rows:
    """Where gathered tokens stand: B sequences, at most Q of them in each, padded at the end.

    Args:
        positions: place of each in its sequence (B, Q).
        taken: false where a sequence has fewer than Q (B, Q); its true entries are the gathered tokens in order.
    """

    positions: Tensor
    taken: Tensor

    @classmethod
    def of(cls, mask: Tensor) -> Rows:
        """Of the tokens that are true in mask (B, T); `states[mask]` gathers the same tokens in the same order."""
        counts = mask.sum(dim=1)  # (B,)
        Q = int(counts.max())
        positions = mask.int().argsort(dim=1, descending=True, stable=True)[:, :Q]  # (B, Q)
        return cls(positions, torch.arange(Q, device=mask.device) < counts[:, None])


class Attention(nn.Module):
    """Causal grouped-query self-attention with rotary positions (Su et al. 2021; Ainslie et al. 2023)."""

    inv_freq: Tensor

    def __init__(self, dim: int, num_heads: int, num_kv_heads: int, rope_theta: float) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, dim // num_heads
        self.q_proj = nn.Linear(dim, dim, bias=False)
        self.k_proj = nn.Linear(dim, num_kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(dim, num_kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(dim, dim, bias=False)
        exponents = torch.arange(0, self.head_dim, 2, dtype=torch.float32) / self.head_dim
        self.register_buffer("inv_freq", rope_theta**-exponents, persistent=False)

    def forward(self, x: Tensor, source: Tensor | None = None) -> Tensor:
        """Attention output (B, T, D) of x over keys and values of `source` (B, T, D), by default x itself."""
        B, T, D = x.shape
        H, G, d = self.num_heads, self.num_kv_heads, self.head_dim
        source = x if source is None else source
        if T == 1:  # the softmax over one key is 1: attention returns the value, whatever query and key are
            v = self.v_proj(source).view(B, T, G, d)
            return self.o_proj(v.repeat_interleave(H // G, dim=2).view(B, T, D))
        positions = torch.arange(T, device=x.device)
        q = self.q_proj(x).view(B, T, H, d).transpose(1, 2)  # (B, H, T, d)
        k, v = self.keys_values(source)
        mixed = F.scaled_dot_product_attention(self._rotate(q, positions), k, v, is_causal=True, enable_gqa=G != H)
        return self.o_proj(mixed.transpose(1, 2).reshape(B, T, D))

    def keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Rotated keys and values (B, G, T, d) of tokens (B, T, D) at positions 0..T-1."""
        B, T, _ = x.shape
        k = self.k_proj(x).view(B, T, self.num_kv_heads, self.head_dim).transpose(1, 2)  # (B, G, T, d)
        v = self.v_proj(x).view(B, T, self.num_kv_heads, self.head_dim).transpose(1, 2)  # (B, G, T, d)
        return self._rotate(k, torch.arange(T, device=x.device)), v

    def keys_values_at(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Rotated keys and values (n, G, d) of gathered tokens (n, D) at their positions (n,)."""
        k = self.k_proj(x).view(len(x), self.num_kv_heads, self.head_dim)
        v = self.v_proj(x).view(len(x), self.num_kv_heads, self.head_dim)
        return self._rotate(k, positions.unsqueeze(1)), v

    def _rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """Rotary embedding of x (..., T, d) at positions that broadcast to (..., T)."""
        angles = positions.float().unsqueeze(-1) * self.inv_freq
        angles = torch.cat([angles, angles], dim=-1)  # (..., T, d)
        return x * angles.cos().to(x.dtype) + rotate_half(x) * angles.sin().to(x.dtype)

    def attend(self, x: Tensor, rows: Rows, k: Tensor, v: Tensor) -> Tensor:
        """Attention output (n, D) of gathered tokens x (n, D) over keys and values (B, G, T, d) of their sequences."""
        B, Q = rows.positions.shape
        padded = x.new_zeros(B, Q, self.num_heads * self.head_dim)
        padded[rows.taken] = self.q_proj(x).to(padded.dtype)
        q = padded.view(B, Q, self.num_heads, self.head_dim).transpose(1, 2)  # (B, H, Q, d)
        q = self._rotate(q, rows.positions.unsqueeze(1))
        sees = rows.positions[:, None, :, None] >= torch.arange(k.shape[2], device=x.device)  # (B, 1, Q, T)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=sees, enable_gqa=k.shape[1] != q.shape[1])
        return self.o_proj(mixed.transpose(1, 2).flatten(2)[rows.taken])  # (n, D)


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
        rope_theta: base of the rotary frequencies.
        norm_eps: RMSNorm epsilon.
    """

    def __init__(
        self, dim: int, num_heads: int, num_kv_heads: int, ffn_dim: int, rope_theta: float, norm_eps: float
    ) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(dim, eps=norm_eps)
        self.self_attn = Attention(dim, num_heads, num_kv_heads, rope_theta)
        self.post_attention_layernorm = nn.RMSNorm(dim, eps=norm_eps)
        self.mlp = SwiGLU(dim, ffn_dim)
        self.exit_norm = nn.RMSNorm(dim, eps=norm_eps)

    def forward(self, x: Tensor, source: Tensor | None = None) -> Tensor:
        """Output (B, T, D) of x; keys and values are projected from `source` (B, T, D), by default from x itself."""
        normed = None if source is None else self.input_layernorm(source)
        x = x + self.self_attn(self.input_layernorm(x), normed)
        return x + self.mlp(self.post_attention_layernorm(x))

    def gathered(self, x: Tensor, rows: Rows, source: Tensor) -> Tensor:
        """Output (n, D) of gathered tokens only, whose keys and values come from states of every token.

        Args:
            x: the gathered tokens' states (n, D).
            rows: where they stand.
            source: states (B, T, D) from which this layer projects its keys and values.
        """
        return self.over(x, rows, *self.self_attn.keys_values(self.input_layernorm(source)))

    def over(self, x: Tensor, rows: Rows, k: Tensor, v: Tensor) -> Tensor:
        """Output (n, D) of gathered tokens x (n, D) over given keys and values (B, G, T, d), such as a cache's."""
        x = x + self.self_attn.attend(self.input_layernorm(x), rows, k, v)
        return x + self.mlp(self.post_attention_layernorm(x))
