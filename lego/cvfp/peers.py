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

from lego.cvfp.predict import columns, windows
from lego.cvfp.sections import PeersParams
from lego.progress import track
from lego.steps import build_scheduler

State = Any


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
        self.position = nn.Parameter(0.02 * torch.randn(window, 1, width))
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, activation="gelu", norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, vocab_size)
        nn.init.normal_(self.embedding.weight, std=0.02)

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
        decays = torch.linspace(0.5, 6.0, width)  # memories of 2 to 400 tokens
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


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def width_for(kind: str, budget: int, vocab_size: int, embed_dim: int, window: int) -> int:
    """The width, a multiple of 4, whose parameters come nearest to a budget."""

    def size(width: int) -> int:
        with torch.device("meta"):
            return count(make(kind, vocab_size, embed_dim, width, window))

    low, high = 4, 4096
    while high - low > 4:
        middle = (low + high) // 8 * 4
        low, high = (middle, high) if size(middle) <= budget else (low, middle)
    return min((low, high), key=lambda width: abs(size(width) - budget))


def train_peer(
    model: nn.Module,
    ids: Tensor,
    settings: PeersParams,
    epochs: int,
    lr: float,
    seed: int,
    after_epoch: Callable[[int], None],
) -> None:
    """Trains a peer on a text, in place, with a cosine schedule.

    Args:
        model: reads windows.
        ids: train text (n,).
        settings: section `peers`.
        epochs: passes over the text.
        lr: peak rate.
        seed: of the borders of windows.
        after_epoch: told the number of each finished epoch.
    """
    generator, text = torch.Generator().manual_seed(seed), columns(ids, settings.streams)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=settings.weight_decay, fused=True)
    total = len(text) - 1
    steps = epochs * (-(-total // settings.window) + 1)
    scheduler = build_scheduler(optimizer, "cosine", settings.warmup_steps, steps, 0.0)
    for epoch in range(epochs):
        first = int(torch.randint(1, settings.window + 1, (1,), generator=generator))
        state: State = None
        model.train()
        parts = list(windows(total, settings.window, first))
        for part in track(parts, len(parts), f"epoch {epoch + 1}/{epochs}", "window"):
            logits, state = model(text[part], state)
            loss = functional.cross_entropy(logits.flatten(0, 1), text[part.start + 1 : part.stop + 1].flatten())
            if not torch.isfinite(loss):
                raise FloatingPointError(f"the loss is {loss.item()} in epoch {epoch + 1}; lower its rate")
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), settings.grad_clip)
            optimizer.step()
            scheduler.step()
        after_epoch(epoch)


@torch.no_grad()
def peer_loss(model: nn.Module, ids: Tensor, window: int) -> float:
    """Mean loss in nats of a text (n,), read from its start in one stream.

    A model without state sees half a window before each prediction; one with state, all of the text before.
    """
    model.eval()
    state, total, n = None, 0.0, len(ids) - 1
    if isinstance(model, Transformer):
        return _overlapping(model, ids, window)
    for part in windows(n, window, window):
        logits, state = model(ids[part][:, None], state)
        wanted = ids[part.start + 1 : part.stop + 1]
        total += float(functional.cross_entropy(logits[:, 0], wanted, reduction="sum"))
    return total / n


def _overlapping(model: nn.Module, ids: Tensor, window: int) -> float:
    """Windows that overlap by half, of which the second half is judged; the first window is judged whole."""
    n, half, total = len(ids) - 1, window // 2, 0.0
    starts = [0, *range(half, max(half, n - half), half)]
    for start in starts:
        stop = min(start + window, n)
        logits, _ = model(ids[start:stop][:, None], None)
        judged = 0 if start == 0 else half
        wanted = ids[start + 1 + judged : stop + 1]
        total += float(functional.cross_entropy(logits[judged:, 0], wanted, reduction="sum"))
    return total / n
