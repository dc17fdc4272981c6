"""One pre-norm decoder layer with Llama's parameter names: RMSNorm, rotary attention, SwiGLU, and an exit norm.

Shapes: B sequences, T tokens, D width, H query heads, G key/value heads, d = D / H width of one head.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def rotate_half(x: Tensor) -> Tensor:
    """Turns each pair (x_i, x_{i + d/2}) by 90 degrees, Llama's layout of rotary pairs."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


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

    def forward(self, x: Tensor) -> Tensor:
        B, T, D = x.shape
        H, G, d = self.num_heads, self.num_kv_heads, self.head_dim
        v = self.v_proj(x).view(B, T, G, d)
        if T == 1:  # the softmax over one key is 1: attention returns the value, whatever query and key are
            return self.o_proj(v.repeat_interleave(H // G, dim=2).view(B, T, D))
        positions = torch.arange(T, device=x.device, dtype=torch.float32)
        angles = torch.outer(positions, self.inv_freq).repeat(1, 2)  # (T, d)
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        q = self.q_proj(x).view(B, T, H, d).transpose(1, 2)  # (B, H, T, d)
        k = self.k_proj(x).view(B, T, G, d).transpose(1, 2)  # (B, G, T, d)
        q = q * cos + rotate_half(q) * sin
        k = k * cos + rotate_half(k) * sin
        mixed = F.scaled_dot_product_attention(q, k, v.transpose(1, 2), is_causal=True, enable_gqa=G != H)
        return self.o_proj(mixed.transpose(1, 2).reshape(B, T, D))


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

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))
