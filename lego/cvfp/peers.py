"""Language models that CVFP is measured against, at equal tokens and parameters (specification, section 12).

Each reads windows of ids (T, S), S streams side by side, and gives logits (T, S, V); recurrent ones hand their state on
from window to window.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lego.cvfp.model import NewLLMResidual
from lego.cvfp.predict import unroll

State = Any
DECAYS = (0.5, 6.0)  # logits of the SSM's first decays: memories of 2 to 400 tokens
EMBEDDING_STD = 0.02  # of the transformer, as GPT-2 begins


class WindowMLP(nn.Module):
    """The last k embeddings, one hidden layer (Bengio et al. 2003).

    Args:
        vocab_size, embed_dim: V and e.
        width: of the hidden layer.
        k: tokens it sees.
    """

    def __init__(self, vocab_size: int, embed_dim: int, width: int, k: int) -> None:
        super().__init__()
        self.k = k
        self.embedding = nn.Embedding(vocab_size, embed_dim)
        self.hidden = nn.Linear(k * embed_dim, width)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocab_size)

    def forward(self, ids: Tensor, state: State) -> tuple[Tensor, State]:
        before = state if state is not None else ids.new_zeros(self.k - 1, ids.shape[1])
        seen = torch.cat([before, ids])  # (k - 1 + T, S)
        vectors = self.embedding(seen)
        stacked = torch.cat([vectors[i : i + len(ids)] for i in range(self.k)], dim=-1)  # (T, S, k e)
        return self.head(self.norm(functional.gelu(self.hidden(stacked)))), seen[len(ids) :]


class Recurrent(nn.Module):
    """GRU (Cho et al. 2014) or LSTM (Hochreiter & Schmidhuber 1997), one layer.

    Args:
        vocab_size, embed_dim: V and e.
        width: of the state.
        kind: `gru` or `lstm`.
    """

    def __init__(self, vocab_size: int, embed_dim: int, width: int, kind: str) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, embed_dim)
        self.cell: nn.RNNBase = (nn.GRU if kind == "gru" else nn.LSTM)(embed_dim, width)
        self.head = nn.Linear(width, vocab_size)

    def forward(self, ids: Tensor, state: State) -> tuple[Tensor, State]:
        rows, state = self.cell(self.embedding(ids), state)
        kept = tuple(one.detach() for one in state) if isinstance(state, tuple) else state.detach()
        return self.head(rows), kept


# of torch.nn's layers, not of lego.model's: a guest does not build on what the house trains, and the contest's numbers
# were made with these
class Transformer(nn.Module):
    """Causal transformer, two layers, learned positions within the window (Vaswani et al. 2017; pre-norm).

    Args:
        vocab_size: V.
        width: of the residual stream; the MLP is four times as wide.
        window: most tokens it sees.
    """

    def __init__(self, vocab_size: int, width: int, window: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, width)
        self.position = nn.Parameter(EMBEDDING_STD * torch.randn(window, 1, width))
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, activation="gelu", norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, vocab_size)
        nn.init.normal_(self.embedding.weight, std=EMBEDDING_STD)

    def forward(self, ids: Tensor, state: State) -> tuple[Tensor, State]:
        mask = nn.Transformer.generate_square_subsequent_mask(len(ids))
        rows = self.layers(self.embedding(ids) + self.position[: len(ids)], mask=mask, is_causal=True)
        return self.head(rows), None


class DiagonalSSM(nn.Module):
    """Two layers of x_t = a x_{t-1} + (1 - a) (B u_t), a fixed per channel, with a gated output (cf. S4D, LRU).

    Args:
        vocab_size: V.
        width: of the residual stream and of the state.
    """

    def __init__(self, vocab_size: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, width)
        decays = torch.linspace(*DECAYS, width)
        self.decay = nn.ParameterList(nn.Parameter(decays.clone()) for _ in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.inward = nn.ModuleList(nn.Linear(width, 2 * width) for _ in range(2))
        self.outward = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.head = nn.Linear(width, vocab_size)

    def forward(self, ids: Tensor, state: State) -> tuple[Tensor, State]:
        rows, kept = self.embedding(ids), []
        for number, decay in enumerate(self.decay):
            value, gate = self.inward[number](self.norms[number](rows)).chunk(2, dim=-1)  # (T, S, w) each
            a = torch.sigmoid(decay)
            x = state[number] if state is not None else value.new_zeros(value.shape[1:])
            steps = []
            for one in value:
                x = a * x + (1 - a) * one
                steps.append(x)
            kept.append(x.detach())
            rows = rows + self.outward[number](torch.stack(steps) * functional.silu(gate))
        return self.head(self.norms[2](rows)), kept


class EndToEnd(nn.Module):
    """A CVFP network in one phase: embedding, blocks, token blocks and head learn together by cross-entropy alone.

    Args:
        network: of any sizes; all of it is trained.
    """

    def __init__(self, network: NewLLMResidual) -> None:
        super().__init__()
        self.network = network.requires_grad_(True)

    def forward(self, ids: Tensor, state: State) -> tuple[Tensor, State]:
        tokens = self.network.embed(ids)  # (T, S, e)
        start = state if state is not None else tokens.new_zeros(ids.shape[1], self.network.context_dim)
        contexts = unroll(self.network, start, tokens)  # (T, S, d)
        written = self.network.read(context=contexts, token=tokens)
        return self.network.logits(context=contexts, token=written), contexts[-1].detach()


def make(kind: str, vocab_size: int, embed_dim: int, width: int, window: int) -> nn.Module:
    """A peer by name: mlp_1, mlp_2, mlp_4, gru, lstm, transformer, ssm.

    Raises:
        ValueError: there is no such peer.
    """
    if kind.startswith("mlp_"):
        return WindowMLP(vocab_size, embed_dim, width, int(kind.removeprefix("mlp_")))
    makers: dict[str, Callable[[], nn.Module]] = {
        "gru": lambda: Recurrent(vocab_size, embed_dim, width, "gru"),
        "lstm": lambda: Recurrent(vocab_size, embed_dim, width, "lstm"),
        "transformer": lambda: Transformer(vocab_size, width, window),
        "ssm": lambda: DiagonalSSM(vocab_size, width),
    }
    if kind not in makers:
        raise ValueError(f"there is no peer {kind}; there are mlp_1, mlp_2, mlp_4, {', '.join(makers)}")
    return makers[kind]()
